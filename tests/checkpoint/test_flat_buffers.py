"""The flat state of the distributed optimizer, against Megatron's own arithmetic."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.flat_buffers import flat_layout


def megatron(numels: list[int], alone: list[bool], bucket_size: int | None, dp_size: int) -> tuple[list[int], int]:
    """A transcription of `_ParamAndGradBuffer.__init__` of megatron-core 0.16.1, with padded offsets, then packed."""

    def pad(number: int, divisor: int) -> int:
        return int(math.ceil(number / divisor) * divisor)

    start = bucket_start = bucket = 0
    members, unpadded, ends, index = 0, [], [], {}

    def update(end: int) -> int:
        nonlocal bucket_start, members, bucket
        unpadded.append(end - bucket_start)
        ends.append((bucket_start, pad(end, math.lcm(dp_size, 128))))
        bucket_start, members, bucket = ends[-1][1], 0, bucket + 1
        return bucket_start

    end = 0
    for number in range(len(numels))[::-1]:
        start = pad(start, 64)
        if alone[number] and members > 0:
            start = update(start)
        end = start + numels[number]
        index[number] = (start, bucket)
        members += 1
        start = update(end) if (bucket_size is not None and end - bucket_start >= bucket_size) or alone[number] else end
    if members:
        update(end)
    packed = [sum(unpadded[: index[n][1]]) + index[n][0] - ends[index[n][1]][0] for n in range(len(numels))]
    return packed, sum(unpadded)


@given(
    st.lists(st.tuples(st.integers(1, 400), st.booleans()), min_size=1, max_size=20),
    st.none() | st.integers(1, 1000),
    st.integers(1, 12),
)
@settings(max_examples=300, deadline=None)
def test_the_layout_is_that_of_megatron(params: list[tuple[int, bool]], bucket_size: int | None, dp_size: int) -> None:
    numels, alone = [numel for numel, _ in params], [flag for _, flag in params]
    layout = flat_layout(numels, alone=alone, bucket_size=bucket_size)
    assert (list(layout.starts), layout.numel) == megatron(numels, alone, bucket_size, dp_size)


def test_parameters_fill_a_buffer_from_the_last_one() -> None:
    layout = flat_layout([10, 100, 3], alone=[False] * 3, bucket_size=None)
    assert layout.starts == (192, 64, 0)
    assert layout.numel == 202
