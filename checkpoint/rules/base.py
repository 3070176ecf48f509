"""Weight rules: how a Hugging Face tensor, a whole MM tensor and its tensor-parallel shards correspond."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from checkpoint.blocks import Block, row_blocks, whole
from checkpoint.blocks import Part as BlockPart
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.plan import Part, Stage, StagePlan, Tower

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]


class Layout:
    """A correspondence between one whole tensor and the parts that it is stored as; all of it follows from `parts`."""

    def parts(self, rows: int, cols: int) -> tuple[BlockPart, ...]:
        """The blocks of every part of a whole tensor of [rows, cols]."""
        raise NotImplementedError

    def part_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """The shape of every part of a whole tensor of `shape`."""
        rows, cols = as_rows(shape)
        shapes = []
        for part in self.parts(rows, cols):
            stored_rows = max((block.stored_row + block.rows for block in part), default=0)
            stored_cols = max((block.stored_col + block.cols for block in part), default=0)
            shapes.append(shape if not shape else (stored_rows, *_trailing(shape, stored_cols)))
        return tuple(shapes)


def as_rows(shape: Shape) -> tuple[int, int]:
    """(rows, cols): dimension 0, and the product of the others; (1, 1) for a scalar."""
    return (shape[0], prod(shape[1:])) if shape else (1, 1)


def _trailing(shape: Shape, cols: int) -> Shape:
    return shape[1:] if prod(shape[1:]) == cols else (cols,)


def join_parts(layout: Layout, parts: Sequence[Tensor], shape: Shape) -> Tensor:
    """The whole tensor of `shape` of its stored parts, which share dtype and device."""
    full = parts[0].new_empty(as_rows(shape))
    for part, blocks in zip(parts, layout.parts(*as_rows(shape)), strict=True):
        flat = part.reshape(as_rows(tuple(part.shape)))
        for block in blocks:
            full[block.row : block.row + block.rows, block.col : block.col + block.cols] = flat[
                block.stored_row : block.stored_row + block.rows, block.stored_col : block.stored_col + block.cols
            ]
    return full.reshape(shape)


def split_parts(layout: Layout, full: Tensor) -> list[Tensor]:
    """The stored parts of a whole tensor; undoes `join_parts`."""
    rows, cols = as_rows(tuple(full.shape))
    flat = full.reshape(rows, cols)
    results = []
    for shape, blocks in zip(layout.part_shapes(tuple(full.shape)), layout.parts(rows, cols), strict=True):
        part = flat.new_empty(as_rows(shape))
        for block in blocks:
            part[block.stored_row : block.stored_row + block.rows, block.stored_col : block.stored_col + block.cols] = (
                flat[block.row : block.row + block.rows, block.col : block.col + block.cols]
            )
        results.append(part.reshape(shape))
    return results


# ---- pack: Hugging Face tensors <-> whole MM tensor ----------------------------------------------------------------


class Pack(Layout):
    """How the tensors of a Hugging Face file make one whole MM tensor."""

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """The whole MM tensor of its Hugging Face tensors."""
        rows = sum(int(tensor.shape[0]) for tensor in tensors)
        return join_parts(self, tensors, (rows, *tensors[0].shape[1:]))

    def split(self, full: Tensor) -> list[Tensor]:
        """The Hugging Face tensors of a whole MM tensor."""
        return split_parts(self, full)

    def shard_problem(self, tp_size: int) -> str | None:
        """Why rows packed like this cannot be split over `tp_size` ranks; None if they can."""
        return None


@dataclass(frozen=True, slots=True)
class Same(Pack):
    """One tensor, unchanged."""

    def parts(self, rows: int, cols: int) -> tuple[BlockPart, ...]:
        """One part: everything."""
        return whole(rows, cols)


@dataclass(frozen=True, slots=True)
class Concat(Pack):
    """`count` tensors of equal size, one below the other."""

    count: int

    def parts(self, rows: int, cols: int) -> tuple[BlockPart, ...]:
        """Equal runs of rows."""
        size = _divide(rows, self.count, "concatenated tensors")
        return row_blocks([[(number * size, size)] for number in range(self.count)], cols)


@dataclass(frozen=True, slots=True)
class Interleaved(Pack):
    """Several tensors dealt out group by group: group 0 of each, then group 1 of each.

    Args:
        groups: number of groups.
        widths: relative number of rows that each tensor has in one group.
        is_fused: the tensors lie one below the other in a single one.
    """

    groups: int
    widths: tuple[int, ...]
    is_fused: bool = False

    def parts(self, rows: int, cols: int) -> tuple[BlockPart, ...]:
        """Runs of `width * unit` rows, one per group and tensor."""
        unit = _divide(rows, self.groups * sum(self.widths), "groups")
        period = sum(self.widths) * unit
        starts = [sum(self.widths[:number]) * unit for number in range(len(self.widths))]
        runs = [
            [(group * period + start, width * unit) for group in range(self.groups)]
            for start, width in zip(starts, self.widths, strict=True)
        ]
        return row_blocks([[run for part in runs for run in part]] if self.is_fused else runs, cols)

    def shard_problem(self, tp_size: int) -> str | None:
        """Groups stay whole."""
        if self.groups % tp_size:
            return f"Number of key-value heads ({self.groups}) must be divisible by TP size ({tp_size})"
        return None


class InterleavedQKV(Interleaved):
    """Query, key and value rows per key-value group: the query heads of a group, its key head, its value head."""

    def __init__(self, groups: int, heads_per_group: int, *, is_fused: bool = False) -> None:
        Interleaved.__init__(self, groups, (heads_per_group, 1, 1), is_fused)


@dataclass(frozen=True, slots=True)
class Unknown(Pack):
    """Not needed: the Hugging Face side is not touched."""

    def parts(self, rows: int, cols: int) -> tuple[BlockPart, ...]:
        """Never asked for."""
        raise ConfigError(
            "weight rules", "the shapes of the model are not known here, so Hugging Face tensors cannot be made."
        )


def _divide(rows: int, count: int, what: str) -> int:
    if rows % count:
        raise ConfigError("weight rules", f"{rows} rows cannot be divided into {count} {what}.")
    return rows // count


# ---- tp: whole MM tensor <-> shards --------------------------------------------------------------------------------


class Split(Enum):
    """How tensor-parallel ranks share a whole tensor; column and row are Megatron's words."""

    REPLICATED = "replicated"
    COLUMN = "column"
    """Dimension 0."""
    COLUMN_GATED = "column_gated"
    """Dimension 0 of a gate stacked on an up projection, each split by itself."""
    ROW = "row"
    """Dimension 1."""

    def layout(self, tp_size: int) -> TpLayout:
        """The layout over `tp_size` ranks; of REPLICATED, the layout of every rank."""
        return TpLayout(self, tp_size)

    def num_parts(self, tp_size: int) -> int:
        """Different shards: 1 where every rank holds the same."""
        return 1 if self is Split.REPLICATED else tp_size

    def shard(self, full: Tensor, tp_size: int) -> list[Tensor]:
        """The shard of every rank."""
        shards = split_parts(self.layout(tp_size), full)
        return shards * tp_size if self is Split.REPLICATED else shards

    def merge(self, shards: Sequence[Tensor]) -> Tensor:
        """The whole tensor of every rank's shard."""
        if self is Split.REPLICATED:
            return shards[0]
        tp_size = len(shards)
        return join_parts(self.layout(tp_size), shards, self.full_shape(tuple(shards[0].shape), tp_size))

    def full_shape(self, shard: Shape, tp_size: int) -> Shape:
        """The shape of the whole tensor of which one rank holds `shard`."""
        if self is Split.REPLICATED or tp_size == 1:
            return shard
        if self is Split.ROW:
            return (shard[0], shard[1] * tp_size, *shard[2:])
        return (shard[0] * tp_size, *shard[1:])

    def problem(self, shape: Shape, tp_size: int) -> str | None:
        """Why a tensor of `shape` cannot be split over `tp_size` ranks; None if it can."""
        if self is Split.REPLICATED:
            return None
        rows, cols = as_rows(shape)
        size, unit, what = (
            (cols, 1, "columns") if self is Split.ROW else (rows, 2 if self is Split.COLUMN_GATED else 1, "rows")
        )
        if size % (tp_size * unit):
            return f"{size} {what} are not divisible by {tp_size * unit}"
        return None


REPLICATED, COLUMN, COLUMN_GATED, ROW = Split


@dataclass(frozen=True, slots=True)
class TpLayout(Layout):
    """A split over a number of ranks."""

    split: Split
    tp_size: int

    def parts(self, rows: int, cols: int) -> tuple[BlockPart, ...]:
        """The blocks of every rank's shard."""
        count = self.split.num_parts(self.tp_size)
        if self.split is Split.ROW:
            size = _divide(cols, count, "tensor-parallel shards")
            return tuple((Block(0, rank * size, rows, size, 0, 0),) for rank in range(count))
        if self.split is Split.COLUMN_GATED:
            half = _divide(rows, 2, "halves")
            size = _divide(half, count, "tensor-parallel shards")
            return row_blocks([[(rank * size, size), (half + rank * size, size)] for rank in range(count)], cols)
        size = _divide(rows, count, "tensor-parallel shards")
        return row_blocks([[(rank * size, size)] for rank in range(count)], cols)


# ---- rules ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightRule:
    """One tensor of the model, or one per layer of a tower, in all its forms.

    Args:
        mm: canonical name, with `{layer}` for the global layer number.
        hf: names of the Hugging Face tensors.
        pack: how those make the whole MM tensor.
        tp: how ranks share it.
        at: the tower whose every layer has one, or the part that it belongs to.
        shape: of the whole MM tensor; None where the model is not known.
        copy_mm: MM name of a second copy, on the stage of a tied output head.
        copy_hf: Hugging Face name of a second copy that some checkpoints hold though the head is tied.
    """

    mm: str
    hf: tuple[str, ...]
    pack: Pack
    tp: Split
    at: Tower | Part
    shape: Shape | None = None
    copy_mm: str | None = None
    copy_hf: str | None = None

    def __str__(self) -> str:
        return self.mm.replace("{layer}", "*")

    def mm_name(self, layer: int | None) -> str:
        """The MM name with this layer number."""
        return self.mm if layer is None else self.mm.format(layer=layer)

    def hf_names(self, layer: int | None) -> tuple[str, ...]:
        """The Hugging Face names of this layer."""
        return self.hf if layer is None else tuple(name.format(layer=layer) for name in self.hf)


class Weight(NamedTuple):
    """One whole tensor of the model."""

    rule: WeightRule
    layer: int | None
    """Global layer number; None for a part."""

    @property
    def mm(self) -> str:
        """Canonical name."""
        return self.rule.mm_name(self.layer)

    @property
    def hf(self) -> tuple[str, ...]:
        """Hugging Face names."""
        return self.rule.hf_names(self.layer)


class StageWeight(NamedTuple):
    """One tensor of a stage."""

    rule: WeightRule
    layer: int | None
    """Global layer number; None for a part."""
    name: str
    """MM name with the stage's local layer number."""


@dataclass(frozen=True)
class RuleSet:
    """Every weight of a family.

    Args:
        aliases: (prefix in a file, prefix in the rules) for names of other generations of a Hugging Face checkpoint.
    """

    family: str
    rules: tuple[WeightRule, ...]
    vision_layers: int
    text_layers: int
    is_tied: bool
    aliases: tuple[tuple[str, str], ...] = ()

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        """Every whole tensor, in the order of the forward pass."""
        found: list[Weight] = []
        for at in (
            Part.PATCH_EMBED,
            Tower.VISION,
            Part.PROJECTOR,
            Part.TOKEN_EMBED,
            Tower.TEXT,
            Part.FINAL_NORM,
            Part.LM_HEAD,
        ):
            rules = [rule for rule in self.rules if rule.at is at]
            if isinstance(at, Part):
                found += [Weight(rule, None) for rule in rules]
            else:
                layers = self.vision_layers if at is Tower.VISION else self.text_layers
                found += [Weight(rule, layer) for layer in range(layers) for rule in rules]
        return tuple(found)

    def for_stage(self, plan: StagePlan, stage: Stage) -> list[StageWeight]:
        """The tensors of one stage with their local names, the copy of a tied head included."""
        found = []
        for rule, layer in self.weights:
            if layer is None:
                if rule.at in stage.parts:
                    found.append(StageWeight(rule, None, rule.mm))
            elif isinstance(rule.at, Tower) and layer in stage.layers(rule.at):
                found.append(StageWeight(rule, layer, rule.mm_name(layer - stage.layers(rule.at).start)))
        if plan.has_head_copy(stage):
            found += [StageWeight(rule, None, rule.copy_mm) for rule in self.rules if rule.copy_mm]
        return found

    def only(self, keep: Iterable[WeightRule]) -> RuleSet:
        """The same set with some of its rules."""
        return replace(self, rules=tuple(keep))

    def tp_problems(self, tp_size: int) -> list[str]:
        """What keeps the tensors from being split over `tp_size` ranks; every reason once."""
        found = []
        for rule in self.rules:
            problem = rule.pack.shard_problem(tp_size) if rule.tp is not Split.REPLICATED else None
            if problem:
                problem = f"{problem} in the {rule.at} tower"
            elif rule.shape is not None:
                problem = rule.tp.problem(rule.shape, tp_size)
                problem = problem and f"{rule}: {problem}"
            if problem:
                found.append(f"{problem}.")
        return list(dict.fromkeys(found))
