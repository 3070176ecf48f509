"""The weight rules of LoRA adapters, derived from those of the weights that they adapt."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from checkpoint.rules.base import COLUMN, COLUMN_GATED, REPLICATED, ROW, RuleSet, Same, Unknown, WeightRule
from mindspeed_mm.errors import CheckpointError

A_SUFFIX, B_SUFFIX = ".lora_A.default.weight", ".lora_B.default.weight"
_ADAPTER = re.compile(r"(.+)\.lora_[AB]\.default\.weight\Z")
_LAYER = re.compile(r"\.layers\.\d+\.")


def is_adapter(name: str) -> bool:
    """The name is that of an adapter matrix in an MM shard."""
    return _ADAPTER.match(name) is not None


def adapted_rules(rules: RuleSet, names: Iterable[str]) -> tuple[WeightRule, ...]:
    """The rules of the base weights that adapters of these local MM names belong to.

    Raises:
        CheckpointError: a name belongs to no linear of the model.
    """
    linears = {rule.mm.removesuffix(".weight"): rule for rule in rules.rules if rule.tp is not REPLICATED}
    found = set()
    for name in names:
        match = _ADAPTER.match(name)
        base = _LAYER.sub(".layers.{layer}.", match[1]) if match else name
        if base not in linears or ".linear_" not in base:
            raise CheckpointError(f"{name} is no adapter of a linear of this model.")
        found.add(base)
    return tuple(rule for base, rule in linears.items() if base in found)


def lora_rules(rules: RuleSet, bases: Sequence[WeightRule]) -> RuleSet:
    """The rules of the adapters of some base weights.

    A column-parallel linear has a whole A and splits B as its weight; a row-parallel one splits A and has a whole B.
    B has the rows of the weight, so it is packed as the weight is.
    """
    derived = []
    for base in bases:
        prefix = base.mm.removesuffix(".weight")
        is_column = base.tp in (COLUMN, COLUMN_GATED)
        pack = base.pack if isinstance(base.pack, Unknown) else Same()
        tp_a, tp_b = (REPLICATED, base.tp) if is_column else (ROW, REPLICATED)
        derived.append(WeightRule(prefix + A_SUFFIX, base.hf, pack, tp_a, base.at))
        derived.append(WeightRule(prefix + B_SUFFIX, base.hf, base.pack, tp_b, base.at))
    return rules.only(derived)
