"""Imports go down only: each room of qat/ imports from the rooms below it, never from those above."""

from __future__ import annotations

import ast

from tests.conftest import ROOT

FLOORS = (
    ("errors",),
    ("config",),
    ("utils",),
    ("quant",),
    ("models",),
    ("data",),
    ("runs",),
    ("train",),
    ("eval",),
    ("analysis",),
    ("report",),
    ("studies", "export"),
    ("cli",),
    ("tools",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FORBIDDEN = {  # beside the floors: module -> what it must not import
    "eval": ("train.loop", "train.wandb_log"),  # evaluation scores, and that only
    "report": ("cli", "hydra"),
    "tools.bench": ("tools.plan",),
    "quant.rules": ("torch",),  # runs are named, and command lines checked, without it
}


def imports() -> list[tuple[str, str]]:
    """(module, what it imports) for every import in qat/, names of this project without `qat.`."""
    found = []
    for path in (ROOT / "qat").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT / "qat").with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            typing_only = module == "quant.rules" and names == ["torch"] and node.col_offset
            found += [] if typing_only else [(module, name.removeprefix("qat.")) for name in names]
    return found


def inside(name: str, place: str) -> bool:
    return name == place or name.startswith(f"{place}.")


def test_every_room_has_a_floor():
    assert {path.stem for path in (ROOT / "qat").iterdir() if not path.name.startswith("_")} == set(FLOOR)


def test_imports_go_down():
    rooms = [(module, name, module.split(".")[0], name.split(".")[0]) for module, name in imports()]
    upwards = [
        f"{module} imports {name}"
        for module, name, own, other in rooms
        if own in FLOOR and other in FLOOR and own != other and FLOOR[other] >= FLOOR[own]
    ]
    assert upwards == []


def test_no_room_imports_what_is_not_its_business():
    wrong = [
        f"{module} imports {name}"
        for module, name in imports()
        for place, others in FORBIDDEN.items()
        if inside(module, place) and any(inside(name, other) for other in others)
    ]
    assert wrong == []
