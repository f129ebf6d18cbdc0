"""A Hugging Face hub in a thread: the endpoints that `datasets` asks for one data set, with faults on demand."""

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
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves `files`, {path: bytes}, as the data set `name` at `commit` on http://127.0.0.1:<port>.

    requests: what was asked for until now, as (method, path below the data set, bytes sent).
    fault: called with (method, path, range header) of every request before it is answered; returns None or one of
    "stall", "reset", "throttle" (429), "down" (503), "broken" (500), "truncate", "short", "denied" (403), "gone" (404).
    """

    def __init__(self, name: str, files: dict[str, bytes], commit: str = COMMIT):
        self.name, self.files, self.commit = name, files, commit
        self.requests: list[tuple[str, str, int]] = []
        self.fault: Callable[[str, str, str | None], str | None] = lambda *request: None
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
        fault = self.hub.fault(self.command, path, self.headers.get("Range"))
        with contextlib.suppress(OSError):
            if fault == "stall":
                self.hub.released.wait()
            elif fault == "reset":
                # Linger of zero: closing sends RST
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif fault in _STATUS:
                self._send(_STATUS[fault], b"", {"Retry-After": "0"} if fault == "throttle" else {})
                return
            else:
                self._route(path, query, body, fault)
                return
        self.close_connection = True
        self.connection.close()

    def _route(self, path: str, query: str, body: bytes, fault: str | None) -> None:
        hub = self.hub
        if match := re.fullmatch(rf"/api/datasets/{hub.name}(?:/revision/([^/]+))?", path):
            if match[1] not in (None, "main", hub.commit):
                self._missing("RevisionNotFound")
                return
            siblings = [{"rfilename": name} for name in hub.files]
            self._json({"_id": "0", "id": hub.name, "sha": hub.commit, "siblings": siblings, "tags": []})
        elif match := re.fullmatch(rf"/api/datasets/{hub.name}/tree/[^/]+(?:/(.*))?", path):
            entries = hub.entries(match[1] or "", "recursive=true" in query.lower())
            self._json(entries) if entries else self._missing("EntryNotFound")
        elif match := re.fullmatch(rf"/api/datasets/{hub.name}/paths-info/[^/]+", path):
            wanted = json.loads(body)["paths"]
            self._json([entry for entry in hub.entries("", True) if entry["path"] in wanted])
        elif match := re.fullmatch(rf"/datasets/{hub.name}/resolve/([^/]+)/(.*)", path):
            if match[1] not in ("main", hub.commit):
                self._missing("RevisionNotFound")
            elif match[2] not in hub.files:
                self._missing("EntryNotFound")
            else:
                self._file(match[2], fault)
        else:
            self._missing("RepoNotFound")

    def _file(self, name: str, fault: str | None) -> None:
        content, status, headers = self.hub.files[name], 200, {}
        headers["ETag"] = f'"{etag(content)}"'
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            content, status = content[start : end + 1], 206
        if fault == "short":  # and says so: what a proxy does that lost its upstream
            content = content[: len(content) // 2]
        self._send(status, content, headers, sent=len(content) // 2 if fault == "truncate" else None)

    def _json(self, value) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _missing(self, code: str) -> None:
        self._send(404, b"", {"X-Error-Code": code, "X-Error-Message": "not found"})

    def _send(self, status: int, content: bytes, headers: dict[str, str], sent: int | None = None) -> None:
        """`sent`: bytes after which the connection breaks, fewer than were announced."""
        body = b"" if self.command == "HEAD" else content[:sent]
        self.hub.requests.append((self.command, self.path.partition("?")[0], len(body)))
        self.send_response(status)
        for key, value in {"X-Repo-Commit": self.hub.commit, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)
        if sent is not None:
            self.close_connection = True


_STATUS = {"throttle": 429, "down": 503, "broken": 500, "denied": 403, "gone": 404}
