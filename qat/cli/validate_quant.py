"""Which settings of quantization and scaling make sense together; part of `qat.cli.validate`."""

from __future__ import annotations

from qat.config import ROLES, Config, QuantConfig, ScalingConfig
from qat.errors import ConfigError
from qat.quant.formats import FORMATS
from qat.quant.rules import RULES


def check_quant(cfg: Config) -> None:
    """Raise `ConfigError` for quantization and scaling that the types allow and a run does not."""
    if not cfg.quantized:
        return
    q, blocks = cfg.quant, cfg.model.blocks
    if blocks is not None and q.bf16_blocks >= blocks:
        raise ConfigError(
            f"quant.bf16_blocks={q.bf16_blocks}: {cfg.model.name} has {blocks} blocks, so nothing would be quantized; "
            f"the largest valid value is {blocks - 1}"
        )
    if not q.scope:
        raise ConfigError(
            "quant.scope=[]: nothing would be quantized; name linears as in [mlp.down_proj], or use quant=bf16"
        )
    if not (q.weights or q.activations or q.gradients):
        raise ConfigError(
            "quant.weights=false: activations and gradients are off too; switch one on, or use quant=bf16"
        )
    for role in ROLES:
        target, largest = getattr(q, f"target_{role}"), FORMATS[q.format].largest
        if target > largest:  # it could never be reached
            raise ConfigError(
                f"quant.target_{role}={target:g}: above the largest {q.format} value; the nearest valid value is "
                f"{largest:g}"
            )
    if q.rounding == "hybrid" and not (q.gradients and FORMATS[q.format].hybrid):
        fault = f"{q.format} has no hybrid rounding" if q.gradients else "rounds gradients, and quant.gradients=false"
        raise ConfigError(f"quant.rounding=hybrid: {fault}; set quant.rounding=nearest")
    if q.rounding == "hybrid" and q.overflow == "clip" and q.target_gradient > 16:  # up to there it is to nearest
        raise ConfigError("quant.rounding=hybrid: rounds values past the clip again; set quant.overflow=saturate")
    if q.ste == "masked" and (q.overflow == "inf" or not (q.weights or q.activations)):
        why = "quant.overflow=inf clips nothing; set quant.overflow=clip"
        if q.overflow != "inf":
            why = "no weight or input of a linear is rounded; set quant.ste=pass_through"
        raise ConfigError(f"quant.ste=masked: stops the gradients of what is clipped, and {why}")
    if q.bf16_also != sorted(set(q.bf16_also)):
        raise ConfigError(f"quant.bf16_also={q.bf16_also}: name blocks once and in order: {sorted(set(q.bf16_also))}")
    algo = cfg.scaling.algo
    for key in ("alpha", "lr"):  # not `window`, which an experiment sets for all rules
        value, readers = getattr(cfg.scaling, key), [name for name, rule in RULES.items() if key in rule.reads]
        if algo not in readers and value != getattr(ScalingConfig, key):
            raise ConfigError(f"scaling.{key}={value:g}: has no effect with scaling={algo}; set scaling={readers[0]}")
    _check_cage(cfg)
    _check_learning(cfg)
    _check_fp8(cfg)
    if cfg.scaling.algo == "exp_smooth" and cfg.scaling.window < 2:
        raise ConfigError(
            f"scaling.window={cfg.scaling.window}: exp_smooth averages two entries; the smallest valid value is 2"
        )


def _check_cage(cfg: Config) -> None:
    q = cfg.quant
    if not q.cage and q.cage_silent != QuantConfig.cage_silent:
        raise ConfigError(f"quant.cage_silent={q.cage_silent:g}: has no effect without CAGE; set estimator=cage")
    if q.cage and not cfg.optim.master_weights:
        raise ConfigError(
            f"quant.cage={q.cage:g}: draws weights by less than BF16 can hold; set optim.master_weights=true"
        )
    if q.cage and not q.weights:
        raise ConfigError(f"quant.cage={q.cage:g}: weights are not rounded (quant.weights=false); set quant.cage=0")
    if q.cage and cfg.cage_silent_steps >= cfg.steps:
        raise ConfigError(
            f"quant.cage_silent={q.cage_silent:g}: CAGE would be silent in all {cfg.steps} steps; the largest valid "
            f"share is {(cfg.steps - 1) / cfg.steps:.4g}"
        )


def _check_learning(cfg: Config) -> None:
    q, algo = cfg.quant, cfg.scaling.algo
    if not RULES[algo].learns:
        return
    if cfg.scaling.update_every > 1:
        raise ConfigError(
            f"scaling.update_every={cfg.scaling.update_every}: scaling={algo} learns every step; set "
            f"scaling.update_every=1"
        )
    if q.overflow == "inf":
        raise ConfigError(f"quant.overflow=inf: scaling={algo} learns where to clip; set quant.overflow=clip")
    if not (q.weights or q.activations):
        raise ConfigError(
            f"scaling={algo}: learns no scale of gradients, and they alone are rounded; set quant.weights=true"
        )


def _check_fp8(cfg: Config) -> None:
    """quant.gemm=fp8 carries clipped HiF8 values as 16 times themselves in E4M3 (`qat.quant.matmul`)."""
    q = cfg.quant
    if q.gemm != "fp8":
        return
    if q.format != "hif8" or q.operands != "exact":
        key = "format" if q.format != "hif8" else "operands"
        raise ConfigError(
            f"quant.gemm=fp8: with quant.{key}={getattr(q, key)} there is no exact E4M3 form; set quant.gemm=bf16"
        )
    if q.overflow != "clip":
        raise ConfigError(
            f"quant.gemm=fp8: quant.overflow={q.overflow} lets values through that E4M3 cannot hold; set "
            f"quant.overflow=clip"
        )
    if not (q.weights and q.activations and q.gradients):
        raise ConfigError(
            "quant.gemm=fp8: a role that is not quantized has no 8-bit operands; set quant.gemm=bf16 or quantize all"
        )
    rows = cfg.batch[0] * cfg.budget.seq_len
    if rows % 16:
        raise ConfigError(
            f"budget.seq_len={cfg.budget.seq_len}: quant.gemm=fp8 takes micro-batches of a multiple of 16 tokens, not "
            f"{rows}; the nearest valid value is {16 * max(1, round(cfg.budget.seq_len / 16))}"
        )
    for role in ROLES:
        if getattr(q, f"target_{role}") > 15:
            raise ConfigError(
                f"quant.target_{role}={getattr(q, f'target_{role}'):g}: quant.gemm=fp8 holds values up to 15; the "
                f"nearest valid value is 15"
            )
