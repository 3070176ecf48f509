"""Megatron's contiguous buffers of trained parameters and gradients: their length, padding included, and shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mindspeed_mm.plan.parameters import Parameter

PARAMETER_ALIGNMENT = 64
BUCKET_ALIGNMENT = 128


@dataclass(frozen=True, slots=True)
class Buffer:
    """Where the trained parameters of a chunk lie."""

    places: tuple[tuple[int, int], ...]
    """Start and end of every parameter, in buffer order."""
    buckets: tuple[tuple[int, int], ...]
    """Start and end of every bucket; a bucket is reduced at once."""

    @property
    def length(self) -> int:
        """Values in the buffer, padding included."""
        return self.buckets[-1][1] if self.buckets else 0

    def share(self, dp_rank: int, dp_size: int) -> tuple[int, int]:
        """Values and parameters (whole or in part) that a replica updates under the distributed optimizer."""
        values = pieces = 0
        for start, end in self.buckets:
            size = (end - start) // dp_size
            low, high = start + dp_rank * size, start + (dp_rank + 1) * size
            inside = [max(0, min(last, high) - max(first, low)) for first, last in self.places]
            values += sum(inside)
            pieces += sum(1 for count in inside if count)
        return values, pieces


def lay_out(
    parameters: Sequence[Parameter], *, dp_size: int, is_distributed: bool, bucket_size: int | None = None
) -> Buffer:
    """The buffer of a chunk.

    Args:
        parameters: of the chunk, in its own order; the frozen ones are left out here.
        dp_size: replicas that gradients are summed over, context ranks included.
        is_distributed: the distributed optimizer pads parameters and buckets, so that replicas get equal shares.
        bucket_size: values after which a new bucket starts; one bucket for all when not given.
    Source: _ParamAndGradBuffer of megatron-core, 0.12 to 0.16.
    """
    bucket_alignment = math.lcm(dp_size, BUCKET_ALIGNMENT) if is_distributed else 1
    alignment = PARAMETER_ALIGNMENT if is_distributed else 1
    places: list[tuple[int, int]] = []
    buckets: list[tuple[int, int]] = []
    bucket_start = end = 0

    def close() -> None:
        nonlocal bucket_start, end
        end = _up(end, bucket_alignment)
        buckets.append((bucket_start, end))
        bucket_start = end

    for parameter in reversed([parameter for parameter in parameters if parameter.is_trained]):
        # both copies of a tied embedding must be shared out alike, so each is a bucket of its own
        is_alone = parameter.is_shared and is_distributed
        if is_alone and end > bucket_start:
            close()
        start = _up(end, alignment)
        end = start + parameter.count
        places.append((start, end))
        if is_alone or (bucket_size is not None and end - bucket_start >= bucket_size):
            close()
    if end > bucket_start:
        close()
    return Buffer(tuple(places), tuple(buckets))


def default_bucket_size(pp_rank: int, vp_stage: int, *, dp_size: int, overlaps_reduction: bool) -> int | None:
    """Values per bucket as Megatron's DDP chooses it: only the first chunk of the first rank has several."""
    if not overlaps_reduction or pp_rank > 0 or vp_stage > 0:
        return None
    return max(40_000_000, 1_000_000 * dp_size)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
