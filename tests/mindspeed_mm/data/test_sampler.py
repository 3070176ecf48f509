"""Laws of the order of samples."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_mm.data.sampler import BaseRandomBatchSampler, epoch_order, evaluation_micro_batches

sizes = st.integers(1, 40)
small = st.integers(1, 4)


def stream(
    num_samples: int, count: int, *, mbs: int = 1, dp: int = 1, consumed: int = 0, seed: int = 7, shuffle: bool = True
) -> list[int]:
    """The first `count` samples of all replicas together, in the order of global micro-batches."""
    samplers = [
        iter(
            BaseRandomBatchSampler(
                num_samples,
                micro_batch_size=mbs,
                dp_rank=rank,
                dp_size=dp,
                seed=seed,
                shuffle=shuffle,
                consumed_samples=consumed,
            )
        )
        for rank in range(dp)
    ]
    found: list[int] = []
    while len(found) < count:
        for sampler in samplers:
            found += next(sampler)
    return found[:count]


@given(sizes, small, small)
def test_every_epoch_holds_every_sample_once(num_samples: int, mbs: int, dp: int) -> None:
    numbers = stream(num_samples, 3 * num_samples, mbs=mbs, dp=dp)
    for epoch in range(3):
        assert sorted(numbers[epoch * num_samples : (epoch + 1) * num_samples]) == list(range(num_samples))


@given(sizes, small, small, small, small)
def test_order_does_not_depend_on_replicas_or_micro_batch_size(
    num_samples: int, mbs: int, dp: int, other_mbs: int, other_dp: int
) -> None:
    count = 2 * num_samples
    expected = stream(num_samples, count)
    assert stream(num_samples, count, mbs=mbs, dp=dp) == expected
    assert stream(num_samples, count, mbs=other_mbs, dp=other_dp) == expected


@given(sizes, small, small, small, small, st.integers(0, 10))
def test_resuming_anywhere_goes_on_exactly_even_with_other_replicas(
    num_samples: int, mbs: int, dp: int, new_mbs: int, new_dp: int, steps: int
) -> None:
    consumed = steps * mbs * dp
    uninterrupted = stream(num_samples, consumed + 30, mbs=mbs, dp=dp)
    assert stream(num_samples, 30, mbs=new_mbs, dp=new_dp, consumed=consumed) == uninterrupted[consumed:]


@settings(max_examples=30)
@given(sizes, small, small)
def test_all_replicas_have_the_same_number_of_full_batches(num_samples: int, mbs: int, dp: int) -> None:
    for rank in range(dp):
        sampler = BaseRandomBatchSampler(num_samples, micro_batch_size=mbs, dp_rank=rank, dp_size=dp, seed=1)
        assert [len(batch) for batch in islice(sampler, 20)] == [mbs] * 20


def test_set_whose_size_no_batch_divides_keeps_replicas_together() -> None:
    """10 samples on 4 replicas, where those of MindSpeed-MM part ways after one epoch."""
    numbers = stream(10, 40, dp=4)
    assert [sorted(numbers[start : start + 10]) for start in range(0, 40, 10)] == [list(range(10))] * 4


def test_seed_and_epoch_change_the_order() -> None:
    orders = {tuple(epoch_order(50, seed=seed, epoch=epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    assert stream(50, 50, seed=1) != stream(50, 50, seed=2)
    assert stream(50, 50, seed=1) == stream(50, 50, seed=1)


def test_order_is_the_same_on_every_machine() -> None:
    assert epoch_order(8, seed=1234, epoch=0).tolist() == [7, 0, 1, 4, 3, 2, 6, 5]


def test_without_shuffle_files_are_read_in_order_again_and_again() -> None:
    assert stream(3, 7, shuffle=False) == [0, 1, 2, 0, 1, 2, 0]


def test_samples_before_the_position_can_be_asked_for_again() -> None:
    sampler = BaseRandomBatchSampler(5, micro_batch_size=2, dp_rank=0, dp_size=1, seed=3)
    batches = list(islice(sampler, 12))
    assert [sampler.micro_batch_at(2 * number) for number in range(12)] == batches


@given(sizes, small, small, small)
def test_evaluation_sees_every_sample_once_in_whole_iterations(num_samples: int, mbs: int, dp: int, steps: int) -> None:
    of_rank = [
        evaluation_micro_batches(num_samples, micro_batch_size=mbs, dp_rank=rank, dp_size=dp, num_micro_batches=steps)
        for rank in range(dp)
    ]
    assert len({len(batches) for batches in of_rank}) == 1
    assert len(of_rank[0]) % steps == 0
    seen = [number for batches in zip(*of_rank, strict=True) for batch in batches for number in batch]
    assert seen == list(range(num_samples))
    assert all(len(batch) <= mbs for batches in of_rank for batch in batches)


@pytest.mark.parametrize(("rank", "expected"), [(0, [[0, 1], [4, 5], [8]]), (1, [[2, 3], [6, 7], [9]])])
def test_rest_of_an_evaluation_is_dealt_evenly(rank: int, expected: list[list[int]]) -> None:
    found = evaluation_micro_batches(10, micro_batch_size=2, dp_rank=rank, dp_size=2, num_micro_batches=1)
    assert found == expected
    padded = evaluation_micro_batches(10, micro_batch_size=2, dp_rank=rank, dp_size=2, num_micro_batches=2)
    assert padded == [*expected, []]
