"""Cross-entropy: in pieces as in one, with what it must not do seen from outside."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from qat.models.loss import distilled_losses, token_losses
from qat.utils import device

SIZES = {
    "vocab_size": 101,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def tokens() -> torch.Tensor:
    return torch.randint(101, (3, 12), generator=torch.Generator().manual_seed(1))


def gradients(model, **how) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    losses = token_losses(model, tokens(), **how)
    losses.mean().backward()
    return losses.detach(), [p.grad.clone() for p in model.parameters()]


def test_the_loss_is_hugging_faces_and_shifting_twice_is_shifting_its_labels_again():
    model, batch = llama(), tokens()
    with torch.no_grad():
        once = model(input_ids=batch, labels=batch).loss
        twice = model(input_ids=batch[:, :-1], labels=batch[:, 1:]).loss
        ours = [token_losses(model, batch, shift) for shift in ("once", "twice")]
        logits = model(input_ids=batch[:, :-1]).logits
    assert [losses.shape for losses in ours] == [(3, 11), (3, 10)]
    torch.testing.assert_close(ours[0].mean(), once)
    torch.testing.assert_close(ours[1].mean(), twice)
    plain = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    torch.testing.assert_close(ours[0].mean(), plain)


@pytest.mark.parametrize("shift", ["once", "twice"])
def test_each_position_predicts_the_token_it_should(shift):
    model, distance = llama(), {"once": 1, "twice": 2}[shift]
    logits = model(tokens()).logits
    losses = token_losses(model, tokens(), shift)
    assert losses.shape == (3, 12 - distance)
    for row in range(3):
        for position in range(12 - distance):
            wanted = F.cross_entropy(logits[row, position], tokens()[row, position + distance])
            torch.testing.assert_close(losses[row, position], wanted)


@pytest.mark.parametrize("shift", ["once", "twice"])
@pytest.mark.parametrize("rows", [1, 7])
def test_in_pieces_it_is_the_same_and_never_holds_all_logits(shift, rows):
    model, sizes = llama(), []
    whole = gradients(model, label_shift=shift)
    model.lm_head.register_forward_hook(lambda *a: sizes.append(a[2].numel()))
    pieces = gradients(model, label_shift=shift, largest_logits=rows * 101)
    torch.testing.assert_close(pieces, whole)
    count = -(-whole[0].numel() // rows)
    assert max(sizes) <= rows * 101 and len(sizes) == 2 * count  # forward, and again in the backward pass


@pytest.mark.parametrize("rows", [1, 127, 128, 200, 255, 256])
def test_pieces_are_of_a_multiple_of_128_rows_where_so_many_fit(rows):
    """Other numbers of rows keep products from the fastest kernels."""
    model, sizes = llama(), []
    model.lm_head.register_forward_hook(lambda *call: sizes.append(len(call[2])))
    batch = torch.randint(101, (30, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        token_losses(model, batch, largest_logits=rows * 101 + 100)
    assert sum(sizes) == 300 and set(sizes[:-1]) == {rows if rows < 128 else rows // 128 * 128}


def distilled(model, teacher, **how) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """(objective, cross-entropy, gradients of the mean objective)"""
    model.zero_grad()
    objective, cross_entropy = distilled_losses(model, teacher, tokens(), **how)
    objective.mean().backward()
    return objective.detach(), cross_entropy, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_distillation_is_the_kl_divergence_from_the_teacher(share):
    model, teacher = llama(), llama(seed=1).requires_grad_(False)
    ours, cross_entropy, gradients_of_ours = distilled(model, teacher, distill=share)
    model.zero_grad()
    logs = [each(input_ids=tokens()[:, :-1]).logits.log_softmax(-1) for each in (model, teacher)]
    plain = F.kl_div(*logs, reduction="none", log_target=True).sum(-1)
    own = token_losses(model, tokens())
    torch.testing.assert_close(cross_entropy, own.detach())
    wanted = share * plain + (1 - share) * own
    wanted.mean().backward()
    torch.testing.assert_close(ours, wanted.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients_of_ours, [p.grad for p in model.parameters()], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("rows", [1, 7, 100])
def test_distillation_in_pieces_is_the_same_and_never_holds_more_logits(rows):
    model, teacher, sizes = llama(), llama(seed=1).requires_grad_(False), []
    whole = distilled(model, teacher, distill=0.5)
    for each in (model, teacher):
        each.lm_head.register_forward_hook(lambda *call: sizes.append(call[2].numel()))
    torch.testing.assert_close(distilled(model, teacher, distill=0.5, largest_logits=2 * rows * 101), whole)
    assert max(sizes) <= rows * 101


@pytest.mark.parametrize("arithmetic", ["fp32", "bf16"])
@pytest.mark.parametrize("rows", [7, 100])
def test_a_teacher_that_is_the_model_leaves_no_gradient_at_all(arithmetic, rows):
    model, teacher = llama(), llama().requires_grad_(False)
    with device.autocast(arithmetic):
        objective, _, gradients_of_ours = distilled(model, teacher, distill=1.0, largest_logits=2 * rows * 101)
    assert not objective.any() and not any(each.any() for each in gradients_of_ours)


@pytest.mark.parametrize("pieces", [1, 11, 33])
def test_in_bf16_the_gradient_of_the_head_does_not_depend_on_the_pieces(pieces):
    """Gradients of pieces add up in FP32. Autocast's cache of the weight in BF16 would make it the sum's precision."""
    model = llama()
    exact = gradients(model)[1][-1]
    with device.autocast("bf16"):
        rounded = gradients(model, largest_logits=33 * 101 // pieces)[1][-1]
    assert 0 < (rounded - exact).norm() <= 2**-8 * exact.norm()


def test_a_model_that_does_more_to_its_logits_is_asked_for_them():
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=0.1)).eval()
    losses = token_losses(model, tokens(), largest_logits=101)
    logits = model(tokens()[:, :-1]).logits
    assert logits.abs().max() <= 0.1
    torch.testing.assert_close(losses, F.cross_entropy(logits.transpose(1, 2), tokens()[:, 1:], reduction="none"))
