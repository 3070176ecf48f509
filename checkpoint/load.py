"""Weights for training: one rank's shard of one stage, straight from a Hugging Face or an MM directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from checkpoint.ranges import Sources, fill_segment
from checkpoint.rules.base import RuleSet, Split, StageWeight, Weight
from checkpoint.rules.qwen2vl import qwen2vl_rules
from checkpoint.stores.base import Placement
from checkpoint.stores.hf import CONFIG_FILE, HfStore
from checkpoint.stores.mm import MmStore, choose_iteration, read_plan
from checkpoint.transfer import segments_of
from mindspeed_mm.errors import CheckpointError
from mindspeed_mm.storage import layout
from mindspeed_mm.storage.tensors import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

    from mindspeed_mm.config import Qwen2VLConfig
    from mindspeed_mm.plan import Stage, StagePlan

_MEMORY = Path("memory")


def recognise(path: Path) -> Literal["hf", "mm"]:
    """Which kind of checkpoint a directory holds, by its content.

    Raises:
        CheckpointError: neither, or both.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory; expected a Hugging Face or an MM checkpoint.")
    is_mm = (path / layout.TRACKER).exists() or bool(layout.list_iterations(path))
    is_hf = (path / CONFIG_FILE).is_file() and any(path.glob("*.safetensors"))
    if is_mm and is_hf:
        raise CheckpointError(
            f"{path} holds a Hugging Face and an MM checkpoint at once; keep them in directories of their own."
        )
    if is_mm or is_hf:
        return "mm" if is_mm else "hf"
    raise CheckpointError(
        f"{path} holds no checkpoint: expected {CONFIG_FILE} beside *.safetensors files (Hugging Face), or "
        f"{layout.TRACKER} with 'release' or iter_* (MM)."
    )


def read_stage(
    path: Path,
    model: Qwen2VLConfig,
    plan: StagePlan,
    stage: Stage,
    tp_rank: int,
    *,
    iteration: layout.Iteration | None = None,
) -> dict[str, Tensor]:
    """The weights of one rank: local MM names -> its tensor-parallel shard, dtype as on disk.

    Only the bytes that the rank needs are read. From an MM directory the plan must be the one it was written with.

    Args:
        iteration: of an MM directory; None for the one that the tracker names.
    Raises:
        CheckpointError: the directory is damaged, or does not hold this model, or was cut by another plan.
    """
    path, rules = Path(path), qwen2vl_rules(model)
    if recognise(path) == "hf":
        return _read_from_hf(path, rules, plan, stage, tp_rank)
    return _read_from_mm(path, rules, plan, stage, tp_rank, choose_iteration(path, iteration))


def _read_from_hf(path: Path, rules: RuleSet, plan: StagePlan, stage: Stage, tp_rank: int) -> dict[str, Tensor]:
    store = HfStore.open(path, rules.aliases)
    store.check(rules)
    with Sources() as sources:
        return {
            entry.name: _read(
                sources, entry, store.placements(Weight(entry.rule, entry.layer))[0], plan.tp_size, tp_rank
            )
            for entry in rules.for_stage(plan, stage)
        }


def _read_from_mm(
    path: Path, rules: RuleSet, plan: StagePlan, stage: Stage, tp_rank: int, iteration: layout.Iteration
) -> dict[str, Tensor]:
    saved = read_plan(path, iteration)
    difference = None if saved is None else saved.difference_from(plan)
    if difference is not None:
        raise CheckpointError(
            f"{layout.iteration_dir(path, iteration)} was cut by another plan ({difference}; saved, this run).\n"
            "  Use the layout of the checkpoint, or re-split it with `mm-convert Qwen2VLConverter resplit`."
        )
    store = MmStore.open(path, plan, rules, iteration)
    entries = rules.for_stage(plan, stage)
    found = store.tensors(tp_rank, stage).keys()
    wanted = {entry.name for entry in entries}
    if found != wanted:
        lines = [f"{name} is missing" for name in sorted(wanted - found)]
        lines += [f"{name} has no place on this stage" for name in sorted(found - wanted)]
        shard = store.shard_path((tp_rank, stage.pp_rank))
        raise CheckpointError("\n  ".join([f"{shard} does not hold this stage:", *lines[:8]]))
    with Sources() as sources:
        return {
            entry.name: _read(sources, entry, _as_placement(store.stage_placement(entry, stage, tp_rank)), 1, 0)
            for entry in entries
        }


def _as_placement(tensor: StoredTensor) -> Placement:
    return Placement((tensor,), Split.REPLICATED.layout(1), tensor.shape)


def _read(sources: Sources, entry: StageWeight, source: Placement, tp_size: int, tp_rank: int) -> Tensor:
    """This rank's shard, read into a new tensor."""
    import torch

    split = entry.rule.tp
    tp_layout = split.layout(tp_size)
    number = 0 if split is Split.REPLICATED else tp_rank
    shapes = tp_layout.part_shapes(source.shape)
    target = Placement(
        tuple(StoredTensor(_MEMORY, source.dtype, shape, 0) for shape in shapes), tp_layout, source.shape
    )
    result = torch.empty(shapes[number], dtype=getattr(torch, source.dtype.name))
    view = result.reshape(-1).view(torch.uint8).numpy().data
    for segment in segments_of(str(entry.rule), source, target)[number]:
        fill_segment(sources, segment, view[segment.offset : segment.offset + segment.nbytes])
    return result
