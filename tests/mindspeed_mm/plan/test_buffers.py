from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mindspeed_mm.plan.buffers import default_bucket_size, lay_out
from mindspeed_mm.plan.parameters import Parameter


def parameters(*counts: int, shared: int | None = None, frozen: int | None = None) -> list[Parameter]:
    return [
        Parameter("text layers", count, is_trained=at != frozen, is_shared=at == shared)
        for at, count in enumerate(counts)
    ]


def test_without_the_distributed_optimizer_nothing_is_padded() -> None:
    buffer = lay_out(parameters(10, 5, 7, frozen=1), dp_size=4, is_distributed=False)
    # in reverse: backward reaches the last parameter first
    assert buffer.places == ((0, 7), (7, 17))
    assert buffer.buckets == ((0, 17),)


def test_the_distributed_optimizer_aligns_parameters_and_buckets() -> None:
    buffer = lay_out(parameters(10, 5, 70), dp_size=3, is_distributed=True)
    assert buffer.places == ((0, 70), (128, 133), (192, 202))
    # 3 equal shares of a multiple of 128
    assert buffer.length == 384


def test_a_tied_copy_is_a_bucket_of_its_own() -> None:
    buffer = lay_out(parameters(10, 200, 30, shared=1), dp_size=2, is_distributed=True)
    assert buffer.buckets == ((0, 128), (128, 384), (384, 512))
    assert lay_out(parameters(10, 200, shared=1), dp_size=2, is_distributed=False).buckets == ((0, 210),)


def test_full_buckets_are_closed() -> None:
    buffer = lay_out(parameters(60, 60, 60), dp_size=1, is_distributed=False, bucket_size=100)
    assert buffer.buckets == ((0, 120), (120, 180))
    assert default_bucket_size(0, 0, dp_size=2, overlaps_reduction=True) == 40_000_000
    assert default_bucket_size(0, 0, dp_size=64, overlaps_reduction=True) == 64_000_000
    assert default_bucket_size(1, 0, dp_size=2, overlaps_reduction=True) is None
    assert default_bucket_size(0, 0, dp_size=2, overlaps_reduction=False) is None


def test_a_chunk_with_nothing_to_train_has_no_buffer() -> None:
    buffer = lay_out(parameters(8, frozen=0), dp_size=2, is_distributed=True)
    assert buffer.length == 0
    assert buffer.share(0, 2) == (0, 0)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=8), st.integers(1, 5), st.sampled_from([None, 300]))
def test_the_shares_of_the_replicas_are_all_parameters(counts: list[int], dp: int, bucket_size: int | None) -> None:
    buffer = lay_out(parameters(*counts), dp_size=dp, is_distributed=True, bucket_size=bucket_size)
    assert sum(buffer.share(rank, dp)[0] for rank in range(dp)) == sum(counts)
    assert sum(buffer.share(rank, dp)[1] for rank in range(dp)) >= len(counts)
