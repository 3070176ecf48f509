"""Index arithmetic of rows and heads that are spread over ranks; pure functions of integers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def round_up(length: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `length`."""
    return -(-length // multiple) * multiple


def uneven_ranges(total: int, parts: int) -> list[range]:
    """Contiguous ranges of 0 .. total - 1; the first `total % parts` of them get one more."""
    base, more = divmod(total, parts)
    starts = [part * base + min(part, more) for part in range(parts + 1)]
    return [range(start, stop) for start, stop in pairwise(starts)]


def key_ranges(query_ranges: Sequence[range], repeat: int) -> list[range]:
    """The key-value heads that each range of query heads needs; `repeat` query heads share one.

    A key-value head whose query heads are cut by a border is in both ranges: it is repeated only as far as needed.
    """
    return [range(r.start // repeat, -(-r.stop // repeat)) if r else range(0) for r in query_ranges]
