"""The scale bank against a plain Python list, over random histories."""

import math
import random

import pytest
import torch

from qat.config import ScalingConfig
from qat.errors import UserError
from qat.quant.kernels import dispatch
from qat.quant.scaling import FP32_MAX, ScaleBank, to_scale


def make(algo="max", window=4, settle_steps=0, tensors=3, target=15.0, **scaling) -> ScaleBank:
    names = [f"layer{i}/weight" for i in range(tensors)]
    return ScaleBank(names, [target] * tensors, ScalingConfig(algo=algo, window=window, **scaling), settle_steps)


def record(bank: ScaleBank, index: int, amax: float) -> None:
    """Record an amax as a quantizer does."""
    slot = bank.amax_slot(index)
    if slot is not None:
        dispatch.record_amax(torch.tensor([0.0, -amax]), slot)


def tick(bank: ScaleBank, step: int, amaxes: list[float]) -> torch.Tensor:
    bank.begin_step(step, 1)
    for index, amax in enumerate(amaxes):
        record(bank, index, amax)
    amax, overshoot = bank.tick()
    assert amax.tolist() == pytest.approx(amaxes, nan_ok=True)
    return overshoot


def predict(algo: str, history: list[float], window: int, alpha: float) -> float:
    """The paper's rules on a list, newest last."""
    if algo == "max":
        return max(history[-window:])
    if algo == "exp_smooth" and len(history) > 1:
        return alpha * history[-1] + (1 - alpha) * history[-2]
    return history[-1]


@pytest.mark.parametrize("window", [2, 3, 16])
@pytest.mark.parametrize("algo", ["current", "most_recent", "exp_smooth", "max"])
def test_against_a_list(algo, window):
    generator = random.Random(f"{algo}{window}")
    bank = make(algo, window, alpha=0.3)
    history = [[], [], []]
    for step in range(1, 60):
        amaxes = [generator.lognormvariate(0, 2) for _ in history]
        tick(bank, step, amaxes)
        for past, amax in zip(history, amaxes, strict=True):
            past.append(amax)
        rule = "most_recent" if algo == "current" else algo
        expected = [15.0 / predict(rule, past, window, 0.3) for past in history]
        assert bank.scale.tolist() == pytest.approx(expected, rel=1e-6)


def test_a_learned_scale_begins_at_the_first_amax_and_follows_its_slope():
    bank = make("lsq", tensors=3, lr=0.5)
    bank._learned[2] = False  # as of a gradient
    tick(bank, 1, [3.0, 6.0, 5.0])
    assert bank.scale.tolist() == pytest.approx([5, 2.5, 3])
    for slope, value in zip(bank.slopes, (-0.2, 100.0, 100.0), strict=True):
        slope.fill_(value)
    tick(bank, 2, [30.0, 30.0, 30.0])
    # 1 / 5 + 0.5 * 0.2; 1 / 2.5 halves at most; gradients use the last amax.
    assert bank.scale.tolist() == pytest.approx([1 / 0.3, 2 / 0.4, 0.5])
    assert not any(slope.any() for slope in bank.slopes)
    bank.slopes[0].fill_(math.nan)
    bank.begin_step(3, 1)
    bank.tick(torch.tensor(False))
    tick(bank, 4, [1.0, 1.0, 1.0])
    assert bank.scale.tolist() == pytest.approx([1 / 0.3, 2 / 0.4, 15])
    assert make("most_recent").slopes is None


def test_the_ring_forgets():
    bank = make("max", window=4, tensors=1)
    amaxes = [100.0, 1.0, 1.0, 1.0, 1.0, 2.0]
    scales = []
    for step, amax in enumerate(amaxes, start=1):
        tick(bank, step, [amax])
        scales.append(bank.scale.item())
    # The 100 rules for exactly four ticks, its own and three more.
    assert scales == pytest.approx([0.15, 0.15, 0.15, 0.15, 15.0, 7.5])


def test_largest_micro_batch_counts():
    bank = make("most_recent", tensors=2)
    bank.begin_step(1, 1)
    for amax in (3.0, 5.0, 4.0):
        record(bank, 0, amax)
    bank.tick()
    assert bank.scale[0].item() == 3.0
    assert bank.scale[1].item() == 1.0  # never seen: keeps its scale


def test_four_cases():
    amax = torch.tensor([2.0, 1e-45, 0.0, math.inf, math.nan])
    scale = to_scale(amax, torch.tensor(15.0), torch.full_like(amax, 7.0))
    assert scale.tolist() == [7.5, FP32_MAX, 7.0, 7.0, 7.0]


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_bad_amax_does_not_enter_the_history(bad):
    bank = make("max", window=8, tensors=1)
    for step, amax in enumerate([2.0, 3.0, bad, 1.0], start=1):
        tick(bank, step, [amax])
        assert bank.scale.isfinite().all()
    assert bank.scale.item() == 5.0
    assert bank.history.isfinite().all()


def test_first_step_scales_by_its_own_amax():
    bank = make("max", tensors=1)
    bank.begin_step(1, 1)
    assert bank.scale_of(0, torch.tensor([1.0, -6.0])).item() == 2.5
    tick(bank, 1, [6.0])
    bank.begin_step(2, 1)
    assert bank.scale_of(0, torch.tensor([100.0])).item() == 2.5


def test_current_always_scales_by_its_own_amax():
    bank = make("current", window=1, tensors=1)
    for step, amax in enumerate([1.0, 5.0, 3.0], start=1):
        bank.begin_step(step, 1)
        assert bank.scale_of(0, torch.tensor([amax])).item() == 15.0 / amax
        tick(bank, step, [amax])


@pytest.mark.parametrize(
    ("observe", "discard", "filled"),
    [(True, True, 0), (True, False, 3), (False, False, 0)],
)
def test_warmup(observe, discard, filled):
    bank = make(observe_in_warmup=observe, discard_after_warmup=discard, window=8, tensors=1)
    for step in (1, 2, 3):
        bank.begin_step(step, 4)
        assert not bank.quantizing and bank.recording == (filled > 0)
        record(bank, 0, float(step))
        bank.tick()
    bank.begin_step(4, 4)
    assert bank.quantizing and bank.recording
    assert (bank.written.item(), bank.unseen) == (filled, frozenset() if filled else {0})
    if filled:
        assert bank.scale.item() == 5.0


def test_update_every_holds_the_scale():
    bank = make("most_recent", update_every=3, tensors=1)
    scales = []
    for step in range(1, 9):
        tick(bank, step, [float(step)])
        scales.append(round(15 / bank.scale.item()))
    assert scales == [1, 1, 1, 4, 4, 4, 7, 7]


@pytest.mark.parametrize("guard", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("algo", ["current", "most_recent", "exp_smooth", "max"])
def test_a_guard_divides_every_scale_and_counts_as_predicted(algo, guard):
    """And only that: the history has the amaxes themselves."""
    plain, guarded = make(algo), make(algo, guard=guard)
    for step, amaxes in enumerate(([2.0, 3.0, 0.0], [4.0, 1.0, 7.0], [5.0, 6.0, 7.0]), start=1):
        overshoots = [tick(bank, step, amaxes) for bank in (plain, guarded)]
        torch.testing.assert_close(overshoots[1], overshoots[0] / 2**guard)
        seen = torch.tensor([1.0, 1.0, float(step > 1)])  # the scale of a tensor without a history stays 1
        torch.testing.assert_close(guarded.scale, plain.scale / 2 ** (guard * seen))
        assert torch.equal(guarded.history, plain.history)
        own = [bank.scale_of(2, torch.tensor([-3.0])) for bank in (plain, guarded)]
        torch.testing.assert_close(own[1], own[0] / 2**guard)


def test_a_guarded_tensor_may_grow_by_the_guard_while_its_scale_is_held():
    """The vendor's protocol: ten steps with one scale, and an octave of headroom."""
    bank = make("most_recent", update_every=10, guard=1.0, tensors=1, target=224.0)
    scales, overshoots = [], []
    for step in range(1, 22):
        bank.begin_step(step, 1)
        scales.append(bank.scale_of(0, torch.tensor(float(step))).item())
        overshoots.append(tick(bank, step, [float(step)]).item())
    assert scales == pytest.approx([112.0] * 11 + [112 / 11] * 10)
    assert overshoots == pytest.approx([0.5, *(s / 2 for s in range(2, 12)), *(s / 22 for s in range(12, 22))])


def test_scales_are_not_held_before_there_are_any():
    """The first quantized step was spoiled, so the next one is the first that tells of amaxes."""
    bank = make("max", window=4, update_every=3, tensors=1)
    bank.begin_step(1, 1)
    record(bank, 0, math.inf)
    bank.tick(torch.tensor(False))
    assert bank.scale_of(0, torch.tensor(6.0)).item() == 2.5
    tick(bank, 2, [3.0])
    assert not bank.unseen and bank.scale.item() == 5.0


@pytest.mark.parametrize("nothing", [0.0, math.inf, math.nan])
@pytest.mark.parametrize("tick_by", ["step", "call"])
def test_a_tensor_of_which_nothing_was_seen_scales_by_its_own_amax_until_then(tick_by, nothing):
    """An idle or overflown first tick, of one tensor alone, leaves no scale of 1 behind for `update_every` ticks."""
    bank = make("most_recent", update_every=10, tick=tick_by, tensors=2)
    scales = []
    for number, amax in enumerate([nothing, nothing, 3.0, 5.0], start=1):
        bank.begin_step(number if tick_by == "step" else 1, 1)
        scales.append([bank.scale_of(index, torch.tensor(5.0)).item() for index in (0, 1)])
        record(bank, 0, 5.0)
        record(bank, 1, amax)
        bank.tick()
    assert scales == [[3.0, 3.0]] * 3 + [[3.0, 5.0]]
    assert bank.scale.tolist() == [3.0, 5.0]  # the first is held since the first tick, the other since the third


@pytest.mark.parametrize("algo", ["most_recent", "exp_smooth", "max"])
@pytest.mark.parametrize("amaxes", [[3.0, 0.0], [3.0, 0.0, 0.0], [0.0, 3.0], [0.0, 0.0, 3.0], [3.0, math.inf, 0.0]])
def test_an_idle_tensor_keeps_its_prediction(algo, amaxes):
    """A module that does not run in a step, or whose gradient is zero, has an amax of 0."""
    bank = make(algo, tensors=1)
    for step, amax in enumerate(amaxes, start=1):
        tick(bank, step, [amax])
    assert bank.scale.item() == 5.0 and bank.history.isfinite().all()
    assert tick(bank, 9, [3.0]).item() == 1.0  # the overshoot


def test_settle_runs_most_recent_first():
    # The released code: until a tenth of the steps the last amax, updated each tick; then the algorithm, held.
    bank = make("max", window=16, settle_steps=4, update_every=4, tensors=1)
    predicted = []
    for step, amax in enumerate([9.0, 1.0, 2.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0], start=1):
        tick(bank, step, [amax])
        predicted.append(round(15 / bank.scale.item()))
    assert predicted == [9, 1, 2, 3, 9, 9, 9, 9, 9]


def test_tick_by_call_has_a_history_after_the_first_call():
    bank = make("max", tick="call", tensors=1)
    bank.begin_step(1, 1)
    record(bank, 0, 1.0)
    bank.tick()
    assert not bank.unseen
    record(bank, 0, 3.0)
    bank.tick()
    assert (bank.written.item(), bank.scale.item()) == (2, 5.0)


def test_overshoot():
    bank = make("most_recent", tensors=2)
    tick(bank, 1, [2.0, 4.0])
    bank.begin_step(2, 1)
    record(bank, 0, 3.0)
    assert bank.tick()[1].tolist() == pytest.approx([1.5, 0.0])


def test_a_pause_leaves_no_trace():
    bank = make("max", tensors=1)
    tick(bank, 1, [2.0])
    before = {name: tensor.clone() for name, tensor in bank.state_dict().items()}
    bank.begin_step(2, 1)
    with bank.paused():
        record(bank, 0, 100.0)
        assert bank.scale_of(0, torch.tensor([100.0])).item() == 7.5
    assert bank.quantizing and bank.recording and not torch.cat(bank.amaxes).any()
    assert all(torch.equal(before[name], tensor) for name, tensor in bank.state_dict().items())


def test_state_continues_exactly():
    generator = random.Random(3)
    amaxes = [[generator.lognormvariate(0, 1) for _ in range(3)] for _ in range(20)]
    whole, first = make(window=5), make(window=5)
    for step, row in enumerate(amaxes, start=1):
        tick(whole, step, row)
        if step <= 12:
            tick(first, step, row)
    second = make(window=5)
    second.load_state_dict(first.state_dict())
    for step in range(13, 21):
        tick(second, step, amaxes[step - 1])
    assert all(torch.equal(second.state_dict()[k], v) for k, v in whole.state_dict().items())


def test_other_tensors_are_refused():
    with pytest.raises(UserError, match=r"have no history of \[4, 3\] torch.float32"):
        make(tensors=3).load_state_dict(make(tensors=2).state_dict())
