"""Ranges of rows and heads over ranks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mindspeed_mm.ops.context import key_ranges, round_up, uneven_ranges


@given(total=st.integers(0, 200), parts=st.integers(1, 16))
def test_ranges_cover_everything_once_and_differ_by_one_at_most(total: int, parts: int) -> None:
    ranges = uneven_ranges(total, parts)
    assert [i for r in ranges for i in r] == list(range(total))
    sizes = [len(r) for r in ranges]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


@given(groups=st.integers(1, 8), repeat=st.integers(1, 8), parts=st.integers(1, 8))
def test_every_query_head_finds_its_key_head_where_it_goes(groups: int, repeat: int, parts: int) -> None:
    queries = uneven_ranges(groups * repeat, parts)
    for query, key in zip(queries, key_ranges(queries, repeat), strict=True):
        assert {head // repeat for head in query} == set(key)


def test_rounding_up() -> None:
    assert [round_up(n, 4) for n in (0, 1, 4, 5)] == [0, 4, 4, 8]
