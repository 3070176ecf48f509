"""What conversions need from a checkpoint on disk: where every copy of a whole tensor lies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from checkpoint.rules.base import Layout, Shape, Weight
from mindspeed_mm.errors import CheckpointError
from mindspeed_mm.storage.tensors import Dtype, StoredTensor

FLOATS = ("bfloat16", "float16", "float32", "float64")
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Placement:
    """One complete copy of a whole tensor: its stored parts and how they make it up."""

    tensors: tuple[StoredTensor, ...]
    layout: Layout
    shape: Shape
    """Of the whole tensor."""

    @property
    def dtype(self) -> Dtype:
        """Element type; all parts have the same."""
        return self.tensors[0].dtype


class WeightStore(Protocol):
    """A checkpoint that holds canonical tensors in some layout."""

    def placements(self, weight: Weight) -> tuple[Placement, ...]:
        """Every copy of a whole tensor; the first one is read, the others must be equal to it."""
        ...


def place(
    weight: Weight, names: Sequence[str], tensors: Sequence[StoredTensor], layout: Layout, shape: Shape
) -> Placement:
    """A placement whose parts have the shapes and the dtype that the whole tensor asks for.

    Raises:
        CheckpointError: a part has another shape, or the parts differ in dtype, or are no floating-point numbers.
    """
    for name, tensor, expected in zip(names, tensors, layout.part_shapes(shape), strict=True):
        if tensor.shape != expected:
            raise CheckpointError(
                f"{tensor.path}: {name} has shape {list(tensor.shape)}; expected {list(expected)} for {weight.mm} of "
                f"{list(shape)}."
            )
        if tensor.dtype != tensors[0].dtype:
            raise CheckpointError(
                f"{tensor.path}: {name} has dtype {tensor.dtype.name}, but {names[0]} has {tensors[0].dtype.name}; "
                f"they become one tensor ({weight.mm})."
            )
    if tensors[0].dtype.name not in FLOATS:
        raise CheckpointError(
            f"{tensors[0].path}: {names[0]} has dtype {tensors[0].dtype.name}; expected one of {', '.join(FLOATS)}."
        )
    return Placement(tuple(tensors), layout, shape)


def check_dtypes(weights: Iterable[tuple[Weight, Placement]]) -> None:
    """Check that all layers of a rule have one dtype.

    Raises:
        CheckpointError: naming every rule whose layers differ.
    """
    first: dict[str, tuple[Weight, Placement]] = {}
    problems = []
    for weight, placement in weights:
        other, reference = first.setdefault(weight.rule.mm, (weight, placement))
        if placement.dtype != reference.dtype:
            problems.append(
                f"{weight.mm} has dtype {placement.dtype.name}, but {other.mm} has {reference.dtype.name} "
                f"({placement.tensors[0].path.name}, {reference.tensors[0].path.name})."
            )
    raise_problems("the layers differ in dtype", problems)


def raise_problems(title: str, problems: Sequence[str]) -> None:
    """Raise one CheckpointError that lists the first problems and counts the rest; nothing happens without problems."""
    if problems:
        more = [f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise CheckpointError("\n  ".join([f"{title}:", *problems[:_SHOWN], *more]))
