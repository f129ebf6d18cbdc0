"""A Hugging Face hub in a thread: what is asked for one data set or model, with faults on demand."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


FAULTS = {
    "stall": None,  # no answer
    "reset": None,  # the connection breaks
    "truncate": None,  # it breaks within the answer
    "short": None,  # half a file, which says that it is whole: what a proxy makes of a lost connection
    "throttle": 429,
    "broken": 500,
    "down": 503,
    "denied": 403,
    "gone": 404,
}


class Request(NamedTuple):
    method: str
    path: str
    start: int | None = None  # of the range asked for
    sent: int = 0  # bytes


class Hub:
    """Serves `files`, {path: bytes}, as the data set and the model `name` on http://127.0.0.1:<port>, at every commit
    of `commits`; the last of them is the newest.

    requests: what was asked for until now.
    fault: called with every request before it is answered; returns None or one of `FAULTS`.
    """

    def __init__(self, name: str, files: dict[str, bytes]):
        self.name, self.files, self.commits = name, files, [COMMIT]
        self.requests: list[Request] = []
        self.fault: Callable[[Request], str | None] = lambda request: None
        self.released = threading.Event()  # ends the stalls
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def entries(self, folder: str, recursive: bool) -> list[dict]:
        """Files and folders below `folder`, as the tree endpoint lists them."""
        found = {}
        for path, content in self.files.items():
            if not path.startswith(folder and folder + "/"):
                continue
            below = path[len(folder and folder + "/") :].split("/")
            for depth in range(1, len(below)):
                name = "/".join([*filter(None, [folder]), *below[:depth]])
                found[name] = {"type": "directory", "path": name, "oid": etag(name.encode()), "size": 0}
            found[path] = {"type": "file", "path": path, "oid": etag(content), "size": len(content)}
        depth = folder.count("/") + 1 if folder else 0
        return [e for name, e in sorted(found.items()) if recursive or name.count("/") == depth]


def etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    commit = COMMIT
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, _, query = unquote(self.path).partition("?")
        wanted = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        self.asked = Request(self.command, path, int(wanted[1]) if wanted else None)
        self.fault = self.hub.fault(self.asked)
        with contextlib.suppress(OSError):
            if self.fault == "stall":
                self.hub.released.wait()
            elif self.fault == "reset":  # a linger of no time makes closing send RST
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif status := FAULTS.get(self.fault):
                return self._send(status, b"", {"Retry-After": "0"} if status == 429 else {})
            else:
                return self._route(path, query, body)
        self.close_connection = True
        self.connection.close()

    def _route(self, path: str, query: str, body: bytes) -> None:
        hub = self.hub
        if match := re.fullmatch(rf"/api/(?:datasets|models)/{hub.name}(?:/revision/([^/]+))?", path):
            if self._has(match[1] or "main"):
                siblings = [{"rfilename": name} for name in hub.files]
                self._json({"_id": "0", "id": hub.name, "sha": self.commit, "siblings": siblings, "tags": []})
        elif match := re.fullmatch(rf"/api/(?:datasets|models)/{hub.name}/tree/[^/]+(?:/(.*))?", path):
            entries = hub.entries(match[1] or "", "recursive=true" in query.lower())
            self._json(entries) if entries else self._missing("EntryNotFound")
        elif match := re.fullmatch(rf"/api/(?:datasets|models)/{hub.name}/paths-info/[^/]+", path):
            wanted = json.loads(body)["paths"]
            self._json([entry for entry in hub.entries("", True) if entry["path"] in wanted])
        elif match := re.fullmatch(rf"(?:/datasets)?/{hub.name}/resolve/([^/]+)/(.*)", path):
            if self._has(match[1]):
                self._file(match[2]) if match[2] in hub.files else self._missing("EntryNotFound")
        else:
            self._missing("RepoNotFound")

    def _has(self, revision: str) -> bool:
        self.commit = self.hub.commits[-1] if revision == "main" else revision
        if self.commit not in self.hub.commits:
            self._missing("RevisionNotFound")
        return self.commit in self.hub.commits

    def _file(self, name: str) -> None:
        content, status, headers = self.hub.files[name], 200, {}
        headers["ETag"] = f'"{etag(content)}"'
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            content, status = content[start : end + 1], 206
        if self.fault == "short" and self.command == "GET":
            content = content[: len(content) // 2]
        self._send(status, content, headers)

    def _json(self, value) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _missing(self, code: str) -> None:
        self._send(404, b"", {"X-Error-Code": code, "X-Error-Message": "not found"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        body = b"" if self.command == "HEAD" else content
        if self.fault == "truncate":
            body, self.close_connection = body[: len(body) // 2], True
        self.hub.requests.append(self.asked._replace(sent=len(body)))
        self.send_response(status)
        for key, value in {"X-Repo-Commit": self.commit, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)
