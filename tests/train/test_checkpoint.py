"""Checkpoints: written whole or not at all, refused when damaged, replaced by the one before."""

from __future__ import annotations

import errno
import json
import os
from concurrent import futures

import pytest
import torch

from qat.errors import UserError
from qat.train import checkpoint
from qat.utils import files


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(step)
    weights = {"layer.weight": torch.randn(4, 3, generator=draw), "layer.bias": torch.randn(4, generator=draw)}
    return {"model": weights, "scales": {"counters": torch.tensor([step, 2, 3])}}


def same(one: dict, other: dict) -> bool:
    groups = one.keys() == other.keys() and all(one[g].keys() == other[g].keys() for g in one)
    return groups and all(torch.equal(one[g][name], other[g][name]) for g in one for name in one[g])


@pytest.fixture
def folder(tmp_path):
    """Two checkpoints, of steps 4 and 8."""
    for step in (4, 8):
        checkpoint.save(tmp_path / "checkpoints", step, tensors(step), {"data": {"epoch": step}})
    return tmp_path / "checkpoints"


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_in_the_background_may_change_meanwhile(tmp_path):
    given = tensors(3)
    changing = [tensor for group in given.values() for tensor in group.values()]
    with checkpoint.Writer(tmp_path) as writer:
        writer.save(3, given, {"data": {}})
        assert changing and not any(given.values())
        for tensor in changing:
            tensor.zero_()
        writer.save(4, tensors(4), {"data": {}})  # waits for the one before
        assert same(checkpoint.load(tmp_path / "step-00000003")[0], tensors(3))
    assert same(checkpoint.latest(tmp_path)[0], tensors(4))


def test_what_goes_wrong_in_the_background_is_raised_at_the_next_chance(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "save_file", lambda *_: (_ for _ in ()).throw(OSError(28, "no space")))
    with pytest.raises(OSError, match="no space"), checkpoint.Writer(tmp_path) as writer:
        writer.save(3, tensors(3), {"data": {}})
        futures.wait([writer._pending], 60)
        writer.check()
        pytest.fail("the error was not raised")
    assert names(tmp_path) == []


def test_what_was_saved_is_loaded(folder):
    found, facts = checkpoint.latest(folder)
    assert same(found, tensors(8)) and (facts["step"], facts["data"]) == (8, {"epoch": 8})
    assert same(checkpoint.load(folder / "step-00000004")[0], tensors(4))
    assert checkpoint.latest(folder / "nowhere") is None


def test_views_and_shared_memory_are_saved_as_their_own_values(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    path = checkpoint.save(tmp_path, 1, {"model": {"transposed": base.t(), "row": base[1]}}, {})
    found = checkpoint.load(path)[0]["model"]
    assert torch.equal(found["transposed"], base.t()) and torch.equal(found["row"], base[1])


def test_checksums_are_of_whole_files_and_no_file_is_read_for_them(tmp_path, monkeypatch):
    of_all_types = {"bf16": torch.ones(3, 5).bfloat16(), "codes": torch.arange(7, dtype=torch.uint8)}
    of_all_types |= {"number": torch.tensor(2.5), "nothing": torch.empty(0, 4), "flags": torch.tensor([True, False])}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_checksum", None)
        path = checkpoint.save(tmp_path, 1, {"model": of_all_types}, {})
    assert same(checkpoint.load(path)[0], {"model": of_all_types})


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_stay(tmp_path, keep):
    for step in range(1, 5):
        checkpoint.save(tmp_path, step, tensors(step), {}, keep=keep)
    assert names(tmp_path) == [f"step-{step:08}" for step in range(5 - keep, 5)]


def test_a_step_saved_again_replaces_the_old_one(folder):
    checkpoint.save(folder, 8, tensors(9), {"again": True})
    found, facts = checkpoint.latest(folder)
    assert same(found, tensors(9)) and facts["again"] and names(folder) == ["step-00000004", "step-00000008"]


@pytest.mark.parametrize("fails", ["save_file", "files.flush", "files.os.rename"])
def test_a_crash_while_writing_leaves_the_checkpoints_that_were_there(folder, fails, monkeypatch):
    def crash(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"qat.train.checkpoint.{fails}", crash)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(folder, 12, tensors(12), {})
    assert [name for name in names(folder) if name.startswith("step-")] == ["step-00000004", "step-00000008"]
    assert checkpoint.latest(folder)[1]["step"] == 8
    checkpoint.save(folder, 12, tensors(12), {})
    assert names(folder) == ["step-00000008", "step-00000012"] and checkpoint.latest(folder)[1]["step"] == 12


def test_on_a_full_disk_one_older_checkpoint_stays_while_the_next_is_written(folder, monkeypatch):
    usage = checkpoint.shutil.disk_usage(folder)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=0))
    before, real = [], checkpoint._write

    def write(*what):
        before.append([path.name for path in sorted(folder.glob("step-*"))])
        real(*what)

    monkeypatch.setattr(checkpoint, "_write", write)
    checkpoint.save(folder, 6, tensors(6), {"data": {}})  # from step 4, because 8 is damaged
    checkpoint.save(folder, 12, tensors(12), {"data": {}})
    assert before == [["step-00000004", "step-00000008"], ["step-00000006"]]
    assert names(folder) == ["step-00000006", "step-00000012"]


def test_what_a_kill_left_unfinished_goes_with_the_next_checkpoint(folder):
    (folder / ".writing-00000010").mkdir()
    (folder / ".writing-00000010" / "model.safetensors").write_bytes(b"half")
    checkpoint.save(folder, 12, tensors(12), {})
    assert names(folder) == ["step-00000008", "step-00000012"]


@pytest.mark.parametrize("code", [errno.ENOTEMPTY, errno.EBUSY])
@pytest.mark.parametrize("call", ["shutil.rmtree", "os.rmdir", "os.unlink"])
def test_a_folder_that_cannot_be_removed_is_a_warning_and_no_checkpoint(folder, call, code, capsys):
    (folder / ".writing-00000012").mkdir()
    (folder / ".writing-00000012" / "model.safetensors").write_bytes(b"half")

    def busy(*_, ignore_errors=False, **__):
        if not ignore_errors:
            raise OSError(code, os.strerror(code))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(call, busy)
        for step in (12, 16, 16):
            checkpoint.save(folder, step, tensors(step), {})
        checkpoint.keep_newest(folder, 1)
    warnings = capsys.readouterr().out.split("\n")[1::2]
    assert len(warnings) == 5  # the unfinished one, 4, 8, 12 and the first 16
    assert all(line.startswith("warning: ") and f"yet ({os.strerror(code)})" in line for line in warnings)
    assert [name for name in names(folder) if not name.startswith(files.REMOVING)] == ["step-00000016"]
    assert checkpoint.latest(folder)[1]["step"] == 16
    checkpoint.keep_newest(folder, 1)
    assert names(folder) == ["step-00000016"]


def truncate(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def flip(path):
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(bytes(content))


def damage_facts(path):
    (path / "facts.json").write_text('{"step": 8, "checksums": {')


def edit_facts(path):
    text = (path / "facts.json").read_text()
    (path / "facts.json").write_text(text.replace('"epoch": 8', '"epoch": 9'))


def empty_facts(path):
    (path / "facts.json").write_text("[]")


def forget_checksums(path):
    (path / "facts.json").write_text(json.dumps({"step": 8}))


DAMAGES = {
    "truncated": truncate,
    "flipped byte": flip,
    "no facts": lambda path: (path / "facts.json").unlink(),
    "no tensors": lambda path: (path / "scales.safetensors").unlink(),
    "half of the facts": damage_facts,
    "edited facts": edit_facts,
    "other facts": empty_facts,
    "no checksums": forget_checksums,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(folder, damage, capsys):
    damage(folder / "step-00000008")
    found, facts = checkpoint.latest(folder)
    assert same(found, tensors(4)) and facts["step"] == 4
    warning = capsys.readouterr().out
    assert warning.startswith(f"warning: {folder}/step-00000008") and warning.count("\n") == 1
    assert "is damaged" in warning
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.load(folder / "step-00000008")


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(folder, capsys):
    for path in folder.iterdir():
        flip(path)
    with pytest.raises(UserError, match=r"^[^\n]*checkpoints: no checkpoint can be read; delete the run folder[^\n]*$"):
        checkpoint.latest(folder)
    assert capsys.readouterr().out.count("warning: ") == 2


def test_an_optimizers_state_survives(tmp_path):
    def build() -> tuple[torch.nn.Module, torch.optim.Optimizer, dict]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        names = {parameter: name for name, parameter in model.named_parameters()}
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True), names

    def step(model, optimizer) -> None:
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer, names = build()
    step(model, optimizer)
    saved = {"model": dict(model.named_parameters()), "optimizer": checkpoint.optimizer_tensors(optimizer, names)}
    assert len(saved["optimizer"]) == 4 * 3 and "0.weight/exp_avg_sq" in saved["optimizer"]
    found = checkpoint.load(checkpoint.save(tmp_path, 1, saved, {}))[0]
    step(model, optimizer)

    again, optimizer, names = build()
    with torch.no_grad():
        for parameter, name in names.items():
            parameter.copy_(found["model"][name])
    checkpoint.load_optimizer(optimizer, names, found)
    step(again, optimizer)
    assert same({"model": model.state_dict()}, {"model": again.state_dict()})


def test_a_parameter_without_a_gradient_yet_continues_exactly():
    def build() -> tuple[torch.optim.AdamW, dict]:
        used, idle = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
        return torch.optim.AdamW([used, idle], lr=0.1, fused=True), {used: "used", idle: "idle"}

    def step(names: dict, *which: str) -> None:
        for parameter, name in names.items():
            parameter.grad = torch.ones(3) if name in which else None

    (first, names), (second, again) = build(), build()
    step(names, "used")
    first.step()
    saved = {name: tensor.clone() for name, tensor in checkpoint.optimizer_tensors(first, names).items()}
    checkpoint.load_optimizer(second, again, {"optimizer": saved})
    with torch.no_grad():
        for parameter, other in zip(again, names, strict=True):
            parameter.copy_(other)
    for optimizer, parameters in ((first, names), (second, again)):
        step(parameters, "used", "idle")
        optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(names, again, strict=True))
