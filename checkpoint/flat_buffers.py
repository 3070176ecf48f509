"""Where parameters lie in the flat state of Megatron's distributed optimizer. Pure arithmetic.

Source: megatron.core.distributed.param_and_grad_buffer (`_ParamAndGradBuffer.__init__`) and
`DistributedOptimizer.get_parameter_state_dp_zero`, which writes a buffer's buckets without the padding behind each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 64
"""Elements; every parameter of a buffer starts at a multiple."""
BUCKET_ALIGNMENT = 128
"""Elements; every bucket does (a larger common multiple with the data-parallel size gives the same result)."""
DEFAULT_BUCKET_SIZE = 40_000_000
"""Elements per bucket where gradients are reduced while backward runs."""


@dataclass(frozen=True, slots=True)
class FlatLayout:
    """The flat state of one buffer."""

    starts: tuple[int, ...]
    """First element of every parameter, in the order in which they were given."""
    numel: int
    """Elements in all."""


def flat_layout(numels: Sequence[int], *, alone: Sequence[bool], bucket_size: int | None) -> FlatLayout:
    """The layout of parameters in a buffer.

    Args:
        numels: elements of every parameter, in the order of the model (buffers are filled from the last one).
        alone: whether a parameter gets a bucket of its own, as tied embeddings do.
        bucket_size: elements after which a bucket is closed; None for one bucket.
    """
    places: dict[int, tuple[int, int]] = {}
    sizes: list[int] = []
    bucket_start = position = 0
    is_open = False

    def close(end: int) -> int:
        nonlocal bucket_start, is_open
        sizes.append(end - bucket_start)
        bucket_start = _up(end, BUCKET_ALIGNMENT)
        is_open = False
        return bucket_start

    for number in reversed(range(len(numels))):
        position = _up(position, ALIGNMENT)
        if alone[number] and is_open:
            position = close(position)
        places[number] = (len(sizes), position - bucket_start)
        position += numels[number]
        is_open = True
        if alone[number] or (bucket_size is not None and position - bucket_start >= bucket_size):
            position = close(position)
    if is_open:
        close(position)
    begins = [sum(sizes[:bucket]) for bucket in range(len(sizes))]
    starts = tuple(begins[places[number][0]] + places[number][1] for number in range(len(numels)))
    return FlatLayout(starts, sum(sizes))


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
