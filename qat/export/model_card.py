"""Write the model card of an exported run: results, how it was made, how to load it, and its licence."""

from __future__ import annotations

from pathlib import Path

import jinja2
from huggingface_hub import ModelCardData
from torch import nn

from qat.analysis.compare import comparison_of
from qat.config import ROLES, Config
from qat.export.hf_quantizer import CodesConfig, HiF8Linear
from qat.quant.rules import RULES
from qat.report.text import table
from qat.runs.folder import Run
from qat.utils import files
from qat.utils.environment import commit_name, hardware_name

_TEMPLATE = Path(__file__).with_name("model_card.md")
_HUB_LICENCES = ("apache-2.0", "mit")  # licences of this project's models that the hub has identifiers for


def card(cfg: Config, run: Run, model: nn.Module, config: CodesConfig) -> str:
    """Return README.md of an export: the hub's YAML header and Markdown. model: the exported one."""
    comparison = comparison_of(run, cfg.benchmark.name)
    template = jinja2.Template(
        _TEMPLATE.read_text(encoding="utf-8"), trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    return template.render(
        header=_header(cfg).to_yaml(),
        cfg=cfg,
        config=config,
        run=run.id,
        base=_base(cfg),
        sizes=sizes(model),
        making=_making(cfg, run),
        results=table(comparison) if comparison else None,
        scored_in=run.evaluations()[cfg.benchmark.name]["w8a8"].get("arithmetic") if comparison else None,
    )


def sizes(model: nn.Module) -> str:
    """Return the size of the quantized linears, in codes and in BF16, and of the model, in MB (10^6 bytes)."""
    linears = [module for module in model.modules() if isinstance(module, HiF8Linear)]
    in_codes = sum(tensor.nbytes for linear in linears for tensor in linear.state_dict().values()) / 1e6
    parameters = sum(linear.weight.numel() + (0 if linear.bias is None else linear.bias.numel()) for linear in linears)
    unique = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}  # the head may share its weight
    total = sum(tensor.nbytes for tensor in unique.values()) / 1e6
    in_bf16 = 2 * parameters / 1e6
    return f"{len(linears)} quantized linears in {in_codes:.1f} MB ({in_bf16:.1f} in BF16), all in {total:.1f} MB"


def _header(cfg: Config) -> ModelCardData:
    licence = cfg.model.licence
    terms = {"license": licence.lower() if licence.lower() in _HUB_LICENCES else "other"}
    if terms["license"] == "other":
        terms["license_name"] = licence.partition(" (")[0].lower().replace(" ", "-")
    tags = [cfg.quant.format, "w8a8", "quantization-aware-training"]
    return ModelCardData(
        base_model=_hub_id(cfg), library_name="transformers", pipeline_tag="text-generation", tags=tags, **terms
    )


def _hub_id(cfg: Config) -> str | None:
    """Return the base model's name on the hub; None for one from a package or a local folder."""
    return cfg.model.path if cfg.model.source == "hub" and not Path(files.expand(cfg.model.path)).exists() else None


def _base(cfg: Config) -> str:
    origin = {"package": f" (out of the package {cfg.model.path})", "random": " (random weights)", "hub": ""}
    return _hub_id(cfg) or cfg.model.name + origin[cfg.model.source]


def _making(cfg: Config, run: Run) -> dict[str, str]:
    q, s, b = cfg.quant, cfg.scaling, cfg.budget
    options = "".join(f", {name} {getattr(s, name):g}" for name in RULES[s.algo].reads)
    machine = run.environment()
    targets = [f"{role}s to {getattr(q, f'target_{role}'):g}" for role in ROLES if getattr(q, f"{role}s")]
    return {
        "Experiment": f"{cfg.experiment or 'none'}, protocol {cfg.protocol}, seed {cfg.seed}",
        "Budget": f"{b.name}: {cfg.size} of {cfg.data.name}, "
        + ", ".join(
            [f"learning rate {cfg.optim.lr:g}", f"the first {cfg.bf16_warmup_steps} steps in BF16", *cfg.variations]
        ),
        "Quantized": f"{', '.join(targets)} in {q.format}, "
        f"overflow {q.overflow}; {', '.join(q.scope)} of all blocks but {q.bf16_blocks + len(q.bf16_also)}",
        "Scaling": f"{s.algo}{options}",
        "Arithmetic": b.arithmetic.upper(),
        "Hardware": hardware_name(machine),
        "Code": f"hif8-qat, commit {commit_name(machine.get('git'))}",
    }
