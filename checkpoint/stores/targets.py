"""Checkpoints to be written: the layout of every file, and where each tensor goes. Nothing touches the disk here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from checkpoint.rules.base import RuleSet, Shape, Split, Weight
from checkpoint.stores.base import Placement
from checkpoint.stores.hf import SINGLE_FILE
from mindspeed_mm.plan import StagePlan
from mindspeed_mm.storage import layout
from mindspeed_mm.storage.safetensors_file import plan_safetensors
from mindspeed_mm.storage.shard import PlannedShard, ShardPlanner
from mindspeed_mm.storage.tensors import Dtype, FileLayout, StoredTensor

CHECKPOINT_VERSION = 3.0

Kind = tuple[Dtype, Shape]
"""Element type and whole shape of a tensor."""
Extend = Callable[[ShardPlanner, tuple[int, int]], Mapping[str, Any]]
"""Gives what a rank's shard holds beside the weights; may ask the planner for tensors."""


@dataclass(frozen=True)
class MmTarget:
    """MM shards of one iteration that are going to be written."""

    layouts: Mapping[Path, FileLayout]
    shards: Mapping[tuple[int, int], PlannedShard]
    """By (tp_rank, pp_rank)."""
    homes: Mapping[str, tuple[Placement, ...]]
    """Canonical name -> every copy."""

    def placements(self, weight: Weight) -> tuple[Placement, ...]:
        """Every copy of a whole tensor."""
        return self.homes[weight.mm]


def plan_mm_target(
    root: Path,
    iteration: layout.Iteration,
    plan: StagePlan,
    rules: RuleSet,
    kinds: Mapping[str, Kind],
    extend: Extend | None = None,
) -> MmTarget:
    """Lay out the shards of a plan.

    Args:
        root: the checkpoint directory.
        kinds: canonical name -> dtype and whole shape.
        extend: more content of each shard; without it a shard holds the weights and `checkpoint_version`.
    """
    shards: dict[tuple[int, int], PlannedShard] = {}
    numbers: dict[tuple[str, int, int], list[int]] = {}
    for pp_rank in range(plan.pp_size):
        for tp_rank in range(plan.tp_size):
            folder = layout.shard_dir(root, iteration, tp_rank, pp_rank, plan.pp_size)
            planner = ShardPlanner(folder / layout.SHARD_FILE)
            tree: dict[str, Any] = {}
            for stage in plan.stages_of_rank(pp_rank):
                chunk = {}
                for rule, layer, name in rules.for_stage(plan, stage):
                    dtype, shape = kinds[rule.mm_name(layer)]
                    split = rule.tp
                    shapes = split.layout(plan.tp_size).part_shapes(shape)
                    chunk[name], number = planner.tensor(dtype, shapes[0 if split is Split.REPLICATED else tp_rank])
                    numbers.setdefault((rule.mm_name(layer), tp_rank, pp_rank), []).append(number)
                tree["model" if plan.vp_size == 1 else f"model{stage.vp_stage}"] = chunk
            tree["checkpoint_version"] = CHECKPOINT_VERSION
            tree.update(extend(planner, (tp_rank, pp_rank)) if extend else {})
            shards[tp_rank, pp_rank] = planner.finish(tree)
    homes = {
        weight.mm: tuple(_mm_placements(weight, plan, kinds[weight.mm][1], shards, numbers)) for weight in rules.weights
    }
    layouts = {shard.path: shard.layout for shard in shards.values()}
    return MmTarget(layouts, shards, homes)


def _mm_placements(
    weight: Weight,
    plan: StagePlan,
    shape: Shape,
    shards: Mapping[tuple[int, int], PlannedShard],
    numbers: Mapping[tuple[str, int, int], list[int]],
) -> Iterable[Placement]:
    tp_layout = weight.rule.tp.layout(plan.tp_size)
    for pp_rank in range(plan.pp_size):
        places = [numbers.get((weight.mm, tp_rank, pp_rank), []) for tp_rank in range(plan.tp_size)]
        for copy in zip(*places, strict=True):
            tensors = [shards[tp_rank, pp_rank].tensors[number] for tp_rank, number in enumerate(copy)]
            if weight.rule.tp is Split.REPLICATED:
                yield from (Placement((tensor,), tp_layout, shape) for tensor in tensors)
            else:
                yield Placement(tuple(tensors), tp_layout, shape)


@dataclass(frozen=True)
class HfTarget:
    """Safetensors files that are going to be written, and their index."""

    layouts: Mapping[Path, FileLayout]
    tensors: Mapping[str, StoredTensor]
    """By hub name."""
    shapes: Mapping[str, Shape]
    """Canonical name -> whole shape."""
    index: bytes | None
    """Content of the index file; None for a single file without one."""

    def placements(self, weight: Weight) -> tuple[Placement, ...]:
        """The tensors of a weight, and the second copy where the target has one."""
        rule, shape = weight.rule, self.shapes[weight.mm]
        copies = [weight.hf] + ([(rule.copy_hf,)] if rule.copy_hf in self.tensors else [])
        return tuple(Placement(tuple(self.tensors[str(name)] for name in names), rule.pack, shape) for names in copies)


def plan_hf_target(
    root: Path,
    rules: RuleSet,
    kinds: Mapping[str, Kind],
    shards: Mapping[str, Sequence[str]],
    metadata: Mapping[str, str],
) -> HfTarget:
    """Lay out safetensors files.

    Args:
        kinds: canonical name -> dtype and whole shape.
        shards: file name -> hub names in their order; see `split_names`.
        metadata: of every file.
    """
    kinds_by_name = hf_kinds(rules, kinds)
    layouts: dict[Path, FileLayout] = {}
    tensors: dict[str, StoredTensor] = {}
    for file, names in shards.items():
        content = {name: kinds_by_name[name] for name in names}
        planned = plan_safetensors(content, metadata)
        path = root / file
        layouts[path] = FileLayout(planned.nbytes, ((0, planned.header),))
        for name, (dtype, shape) in content.items():
            tensors[name] = StoredTensor(path, dtype, shape, planned.offsets[name])
    is_single = list(shards) == [SINGLE_FILE]
    index = None if is_single else _index(shards, sum(tensor.nbytes for tensor in tensors.values()))
    return HfTarget(layouts, tensors, {mm: shape for mm, (_, shape) in kinds.items()}, index)


def hf_kinds(rules: RuleSet, kinds: Mapping[str, Kind]) -> dict[str, Kind]:
    """Hub name -> dtype and shape, second copies included."""
    found: dict[str, Kind] = {}
    for weight in rules.weights:
        dtype, shape = kinds[weight.mm]
        for name, part in zip(weight.hf, weight.rule.pack.part_shapes(shape), strict=True):
            found[name] = (dtype, part)
        if weight.rule.copy_hf:
            found[weight.rule.copy_hf] = (dtype, shape)
    return found


def split_names(rules: RuleSet, kinds: Mapping[str, Kind], max_shard_bytes: int) -> dict[str, list[str]]:
    """File name -> hub names, in the order of the model, no file larger than `max_shard_bytes` unless a tensor is."""
    by_name = hf_kinds(rules, kinds)
    groups: list[list[str]] = [[]]
    size = 0
    for name in (name for weight in rules.weights for name in weight.hf):
        dtype, shape = by_name[name]
        nbytes = prod(shape) * dtype.itemsize
        if groups[-1] and size + nbytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {f"model-{number:05d}-of-{len(groups):05d}.safetensors": names for number, names in enumerate(groups, 1)}


def _index(shards: Mapping[str, Sequence[str]], total_size: int) -> bytes:
    weight_map = {name: file for file, names in shards.items() for name in names}
    content = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(content, indent=2) + "\n").encode()
