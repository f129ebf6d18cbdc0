"""Export a finished run as a Hugging Face folder of 8-bit codes, and load such a folder.

    config.json         the model, and how its linears are coded (`qat.export.hf_quantizer.CodesConfig`)
    model.safetensors   <linear>.weight as uint8 codes, .weight_scale and .input_scale in FP32, everything else in BF16;
                        in several files above 5 GB
    README.md           the model card, with the run's results
    SHA256SUMS          checksums of the safetensors
    and generation_config.json and the tokenizer's files

The loaded model equals the one that W8A8 evaluation scored (`qat.eval.subject.Subject`), bit for bit, where that was
scored in FP32 or with benchmark.arithmetic=export. A BF16 run is scored as it was trained by default, with an FP32
residual stream and FP32 logits, and an export rounds these to BF16.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qat.config import CHOICES, Config
from qat.errors import ConfigError, UserError, first_line, nearest
from qat.eval.subject import Subject
from qat.export import hf_quantizer, model_card
from qat.export.hf_quantizer import CodesConfig
from qat.quant.convert import quantized_linears
from qat.quant.kernels import dispatch
from qat.runs.folder import Run
from qat.utils import device, environment, files

_LARGEST_FILE, _SUMS = "5GB", "SHA256SUMS"
_ARITHMETIC = {"bf16": torch.bfloat16, "fp32": torch.float32}


def export(cfg: Config) -> Path:
    """Write the finished run that `cfg` describes to `export.out`, by default `<run folder>/export`; return the folder.

    The write is atomic, and only an earlier export of the same run is replaced. Errors: UserError for a run that is not
    finished or has no codes, and for a folder that holds something else.
    """
    run = Run.of(cfg)
    subject = Subject(cfg, run, "w8a8")
    _check_run(cfg, subject)
    out = Path(cfg.export.out) if cfg.export.out else run.path / "export"
    _check_folder(out, run)
    model, tokenizer = subject.build()
    config = _encode_linears(model, cfg, run)
    with files.new_folder(out.absolute()) as temporary:
        model.save_pretrained(temporary, max_shard_size=_LARGEST_FILE)
        tokenizer.init_kwargs.pop("auto_map", None)  # openPangu's names remote code, which is not exported
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(model_card.card(cfg, run, model, config), encoding="utf-8")
        (temporary / _SUMS).write_text(_checksums(temporary))
        _refuse_foreign(out, temporary)
    print(f"export: {out} ({model_card.sizes(model)})", flush=True)
    return out


def load_export(folder: Path | str, arithmetic: str | None = None) -> tuple[nn.Module, object]:
    """Return an exported model, in eval mode on the device, and its tokenizer.

    The run and its configuration are not needed; no pickle is read and no remote code runs. In memory, too, linears
    hold a byte for each weight, and are decoded in each call.

    folder: written by `export`.
    arithmetic: of everything between the roundings, and the dtype of everything but codes and scales: "bf16", "fp32",
        or "auto" (`device.resolve_arithmetic`). None: that of the run's products. Other machines and versions of
        PyTorch than the one that evaluated the run round sums differently.

    Errors: UserError when the folder is no export, is damaged, or is of a later version.
    """
    choices = CHOICES["budget.arithmetic"]
    if arithmetic not in (None, *choices):
        raise UserError(f"arithmetic={arithmetic}: unknown value; {nearest(arithmetic, choices)}")
    source = {"pretrained_model_name_or_path": folder, "trust_remote_code": False, "local_files_only": True}
    config = _read_config(folder)
    if config is None:
        raise UserError(
            f"{folder}: no export (quant_method {hf_quantizer.METHOD} is not in its config.json); run scripts/export.py"
        )
    try:
        if (Path(folder) / _SUMS).exists() and (Path(folder) / _SUMS).read_text() != _checksums(Path(folder)):
            raise ValueError(f"its weights are not those of {_SUMS}")
        arithmetic = device.resolve_arithmetic(arithmetic or config["arithmetic"])
        device.round_sums_once()
        model, info = AutoModelForCausalLM.from_pretrained(
            **source, dtype=_ARITHMETIC[arithmetic], use_safetensors=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(**source)
        wrong = sorted([*info["missing_keys"], *info["unexpected_keys"]])
        if wrong:
            raise ValueError(f"missing or superfluous: {wrong[0]}, the first of {len(wrong)}")
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be loaded ({first_line(error)}); export it, or fetch it, again") from error
    return model.to(device.get_device()).eval(), tokenizer


def _check_run(cfg: Config, subject: Subject) -> None:
    environment.refuse_ranks("export")
    if not cfg.quantized:
        raise ConfigError(f"{subject.run.id} is not quantized and has no codes to export; name a quantized run")
    if not (cfg.quant.weights or cfg.quant.activations):
        raise ConfigError(
            f"quant.weights=false: {subject.run.id} has activations in BF16, too, and nothing to export; name a run "
            f"that quantizes one of them"
        )
    subject.check()


def _check_folder(out: Path, run: Run) -> None:
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() and (_read_config(out) or {}).get("run") != run.id:
        raise ConfigError(f"export.out={out}: exists and is not an export of {run.id}; name another folder")


def _read_config(folder: Path | str) -> dict | None:
    """Return the `quantization_config` of an exported folder; None where there is no export."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    quantization = getattr(config, "quantization_config", None)
    is_ours = isinstance(quantization, dict) and quantization.get("quant_method") == hf_quantizer.METHOD
    return quantization if is_ours else None


def _encode_linears(model: nn.Module, cfg: Config, run: Run) -> CodesConfig:
    """Replace the quantized linears of an evaluated model by `HiF8Linear`; returns the entry for config.json.

    All other parameters become BF16, which loses nothing: evaluation rounds them to BF16 too.
    """
    linears = quantized_linears(model)
    config = CodesConfig(
        **vars(cfg.quant),
        modules=list(linears),
        activation_scheme="dynamic" if cfg.scaling.algo == "current" else "static",
        guard=cfg.scaling.guard,
        arithmetic=device.resolve_arithmetic(cfg.budget.arithmetic),
        run=run.id,
    )
    for name, linear in hf_quantizer.swap_linears(model, config).items():
        weight, activation = (linears[name].quantizers[role] for role in ("weight", "activation"))
        if config.weights:
            original = linears[name].weight
            scale = weight.bank.scale_of(weight.index, original)
            rounding = (config.format, config.overflow, config.target_weight, "codes")
            linear.weight = dispatch.quantize(original, scale, None, *rounding)[1]
            linear.weight_scale = scale.clone()
        if config.activations:
            linear.input_scale = activation.bank.scale[activation.index].clone()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    model.config.quantization_config = config
    return config


def _checksums(folder: Path) -> str:
    """Return the checksums of a folder's weights."""
    return files.checksums(folder.glob("*.safetensors"))


def _refuse_foreign(out: Path, new: Path) -> None:
    """Raise `ConfigError` where the folder of an earlier export has files that the new one lacks."""
    foreign = {path.name for path in out.glob("*")} - {path.name for path in new.iterdir()}
    if foreign:
        raise ConfigError(f"export.out={out}: has {min(foreign)}, which is not of the export; move it elsewhere")
