"""The names that docstrings, comments and pages mention exist."""

from __future__ import annotations

import ast
import functools
import re

from tests.conftest import ROOT

PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "experiments").glob("*.md")]
CODE = [path for folder in ("qat", "scripts", "tests", "conf") for path in (ROOT / folder).rglob("*.*")]


@functools.cache
def members(file) -> set[str]:
    """The dotted names that a module defines or imports, those of its classes included."""
    found = set()

    def walk(node, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                found.add(prefix + child.name)
                if isinstance(child, ast.ClassDef):
                    walk(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.Assign):
                found.update(prefix + target.id for target in child.targets if isinstance(target, ast.Name))
            elif isinstance(child, ast.AnnAssign):
                found.add(prefix + child.target.id)
            elif isinstance(child, (ast.Import, ast.ImportFrom)):
                found.update(alias.asname or alias.name for alias in child.names)

    walk(ast.parse(file.read_text()), "")
    return found


def exists(name: str) -> bool:
    """Return whether `qat.a.b.Thing.member` is a package, a module, or defined in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        place, rest = ROOT.joinpath(*parts[:end]), ".".join(parts[end:])
        if place.is_dir() and not rest:
            return True
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if file.is_file():
                return not rest or rest in members(file)
    return False


def test_names_that_are_mentioned_exist():
    absent = {}
    for path in (*PAGES, *CODE):
        if path.suffix not in (".py", ".md", ".yaml", ".html", ".sh") or path.name == "test_names.py":
            continue
        text = path.read_text()
        named = re.findall(r"`(?:import )?(qat\.[A-Za-z_.]+\w)(?:\(.*?\))?`", text)
        if path.suffix == ".md":
            named += [".".join(each) for each in re.findall(r"^ *from (qat[\w.]*) import (\w+)", text, re.MULTILINE)]
        absent |= {name: str(path.relative_to(ROOT)) for name in named if not exists(name) and name != "qat.hif8"}
    assert absent == {}
