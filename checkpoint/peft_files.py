"""The directory of a LoRA adapter as `peft` writes and reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint.rules.base import REPLICATED, RuleSet
from checkpoint.stores.base import raise_problems
from checkpoint.stores.hf import hub_name
from mindspeed_mm.config import read_json
from mindspeed_mm.errors import CheckpointError, ConfigError
from mindspeed_mm.storage.files import write_file
from mindspeed_mm.storage.safetensors_file import index_safetensors

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight\Z")
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
}
"""Settings that must have these values: with others an adapter is more than W + alpha / r * B A."""


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """Adapters of Hugging Face linears."""

    rank: int
    alpha: float
    modules: Mapping[str, tuple[Tensor, Tensor]]
    """Hub name of the linear -> A [r, in], B [out, r]."""


def write_peft(
    folder: Path, adapter: PeftAdapter, base: str, aliases: Sequence[tuple[str, str]], *, has_hub_names: bool
) -> int:
    """Write an adapter directory; gives the size of its weight file in bytes.

    Args:
        base: name or path of the base model, for the reader.
        aliases: (prefix of newer names, prefix of the hub).
        has_hub_names: name modules as the hub does, not as transformers 4.52 and later do in memory.
    """
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    for module, (matrix_a, matrix_b) in adapter.modules.items():
        name = module if has_hub_names else _newer_name(module, aliases)
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = matrix_a
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = matrix_b
    data = save(tensors, metadata={"format": "pt"})
    write_file(folder / WEIGHTS_FILE, data)
    config = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(adapter.alpha) if float(adapter.alpha).is_integer() else adapter.alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": adapter.rank,
        "target_modules": _targets(adapter.modules),
        "task_type": "CAUSAL_LM",
    }
    write_file(folder / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())
    return len(data)


def _newer_name(module: str, aliases: Sequence[tuple[str, str]]) -> str:
    for newer, hub in aliases:
        if module.startswith(hub):
            return newer + module[len(hub) :]
    return module


def _targets(modules: Mapping[str, Any]) -> list[str] | str:
    """What peft matches module names with: their last parts, or a pattern where the vision tower is adapted too.

    The last parts of vision linears (`proj`, `0`, `2`) would match modules that have no adapter.
    """
    if not any(name.startswith("visual.") for name in modules):
        return sorted({name.rpartition(".")[2] for name in modules})
    tails = sorted({re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name.partition(".")[2])) for name in modules})
    return ".*(" + "|".join(tails) + ")"


def read_peft(folder: Path, rules: RuleSet) -> PeftAdapter:
    """Read an adapter directory.

    Raises:
        CheckpointError: a file is missing or damaged, a matrix has no partner, or belongs to no linear of the model.
        ConfigError: the adapter is of a kind that MM adapters cannot be.
    """
    from safetensors.torch import load_file

    config = read_json(folder / CONFIG_FILE)
    problems = [
        f"{key} = {config[key]!r} is not supported."
        for key, values in _PLAIN.items()
        if key in config and config[key] not in values
    ]
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank <= 0 or not isinstance(alpha, int | float):
        problems.append(f"r = {rank!r} and lora_alpha = {alpha!r} should be numbers.")
    if problems:
        raise ConfigError(str(folder / CONFIG_FILE), problems)
    assert isinstance(rank, int)
    assert isinstance(alpha, int | float)
    index_safetensors(folder / WEIGHTS_FILE)
    halves = _halves(load_file(folder / WEIGHTS_FILE), rules)
    problems = [f"{module} has only one of lora_A and lora_B" for module, pair in halves.items() if len(pair) != 2]
    problems += [
        f"{module}.lora_{half} has shape {list(matrix.shape)}, but r = {rank}"
        for module, pair in halves.items()
        for half, matrix in pair.items()
        if matrix.dim() != 2 or matrix.shape[0 if half == "A" else 1] != rank
    ]
    raise_problems(f"{folder / WEIGHTS_FILE} cannot be used", problems)
    if not halves:
        raise CheckpointError(f"{folder / WEIGHTS_FILE} holds no adapters.")
    return PeftAdapter(rank, float(alpha), {module: (pair["A"], pair["B"]) for module, pair in halves.items()})


def _halves(tensors: Mapping[str, Tensor], rules: RuleSet) -> dict[str, dict[str, Tensor]]:
    linears = {
        name.removesuffix(".weight")
        for weight in rules.weights
        if weight.rule.tp is not REPLICATED and ".linear_" in weight.rule.mm
        for name in weight.hf
        if name.endswith(".weight")
    }
    halves: dict[str, dict[str, Tensor]] = {}
    strange = []
    for name, tensor in tensors.items():
        match = _NAME.match(name)
        module = hub_name(match[1] + ".", rules.aliases).rstrip(".") if match else ""
        if match is None or module not in linears:
            strange.append(f"{name} belongs to no linear that can be adapted")
            continue
        halves.setdefault(module, {})[match[2]] = tensor
    raise_problems("adapters that the model has no place for", strange)
    return halves
