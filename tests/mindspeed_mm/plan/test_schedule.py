from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.plan.schedule import Step, Timeline, ideal_length, peak_held, rank_steps, simulate


def run(forward: list[float], backward: list[float], *, pp: int, vp: int = 1, micro_batches: int) -> Timeline:
    return simulate(forward, backward, pp_size=pp, vp_size=vp, num_micro_batches=micro_batches)


def names(steps: list[Step]) -> str:
    return " ".join(f"{'F' if step.is_forward else 'B'}{step.vp_stage}.{step.micro_batch}" for step in steps)


def test_one_forward_one_backward_in_order() -> None:
    assert names(rank_steps(0, 3, 1, 4)) == "F0.0 F0.1 F0.2 B0.0 F0.3 B0.1 B0.2 B0.3"
    assert names(rank_steps(2, 3, 1, 4)) == "F0.0 B0.0 F0.1 B0.1 F0.2 B0.2 F0.3 B0.3"


def test_interleaved_order() -> None:
    # two ranks, two chunks: two forwards of each chunk in turn, backward from the last chunk on
    assert names(rank_steps(1, 2, 2, 4)) == (
        "F0.0 F0.1 F1.0 B1.0 F1.1 B1.1 F0.2 B0.0 F0.3 B0.1 F1.2 B1.2 F1.3 B1.3 B0.2 B0.3"
    )


def test_interleaving_wants_a_multiple_of_the_pipeline_size() -> None:
    with pytest.raises(ConfigError, match="5 micro-batches are not a multiple of the pipeline size 2"):
        rank_steps(0, 2, 2, 5)


@st.composite
def pipelines(draw: st.DrawFn) -> tuple[int, int, int, list[float], list[float]]:
    pp, vp = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    if pp == 1:
        vp = 1
    micro_batches = draw(st.integers(1, 4)) * (pp if vp > 1 else 1)
    times = st.lists(st.integers(0, 9).map(float), min_size=pp * vp, max_size=pp * vp)
    return pp, vp, micro_batches, draw(times), draw(times)


@given(pipelines())
def test_every_step_runs_once_after_its_input_and_alone_on_its_rank(
    pipeline: tuple[int, int, int, list[float], list[float]],
) -> None:
    pp, vp, micro_batches, forward, backward = pipeline
    timeline = run(forward, backward, pp=pp, vp=vp, micro_batches=micro_batches)
    spans = {(b.step.vp_stage * pp + b.pp_rank, b.step.micro_batch, b.step.is_forward): b for b in timeline.blocks}
    assert len(spans) == len(timeline.blocks) == 2 * micro_batches * pp * vp
    for (stage, micro_batch, is_forward), block in spans.items():
        times = forward if is_forward else backward
        assert block.end - block.start == pytest.approx(times[stage])
        sender = (stage - 1 if is_forward else stage + 1, micro_batch, is_forward)
        sends_gradient = any(backward[: stage + 1])
        if 0 <= sender[0] < pp * vp and (is_forward or sends_gradient):
            assert block.start >= spans[sender].end
        if not is_forward:
            assert block.start >= spans[stage, micro_batch, True].end
    for rank in range(pp):
        mine = [block for block in timeline.blocks if block.pp_rank == rank]
        assert all(first.end <= second.start for first, second in pairwise(mine))


@pytest.mark.parametrize(("pp", "vp", "micro_batches"), [(1, 1, 3), (4, 1, 8), (4, 1, 3), (4, 2, 8), (3, 3, 6)])
def test_equal_stages_reach_the_ideal(pp: int, vp: int, micro_batches: int) -> None:
    stages = pp * vp
    timeline = run([1.0] * stages, [2.0] * stages, pp=pp, vp=vp, micro_batches=micro_batches)
    assert timeline.length == pytest.approx(
        ideal_length(3.0 * stages, pp_size=pp, vp_size=vp, num_micro_batches=micro_batches)
    )
    # the textbook's bubble, (p - 1) / (m v + p - 1)
    assert timeline.bubble == pytest.approx((pp - 1) / (micro_batches * vp + pp - 1))


def test_the_slowest_stage_sets_the_pace() -> None:
    timeline = run([1.0, 5.0, 1.0], [2.0, 10.0, 2.0], pp=3, micro_batches=100)
    assert timeline.length == pytest.approx(1500, rel=0.01)
    assert timeline.efficiency == pytest.approx(21 / 45, rel=0.01)


def test_stages_without_backward_at_the_start_wait_for_nobody() -> None:
    timeline = run([1.0, 1.0, 1.0], [0.0, 2.0, 2.0], pp=3, micro_batches=20)
    ends = [block.end for block in timeline.blocks if block.pp_rank == 0 and block.step.is_forward]
    assert ends == [float(number) for number in range(1, 21)]
    behind_a_trained_one = run([1.0, 1.0, 1.0], [2.0, 0.0, 2.0], pp=3, micro_batches=20)
    last = [block for block in behind_a_trained_one.blocks if block.pp_rank == 0][-1]
    assert last.end == behind_a_trained_one.length


def test_a_rank_holds_what_is_between_forward_and_backward() -> None:
    def held(rank: int, micro_batches: int = 8) -> int:
        return peak_held(rank, [1], [0], pp_size=4, num_micro_batches=micro_batches)

    assert [held(rank) for rank in range(4)] == [4, 3, 2, 1]
    assert held(0, 2) == 2
    # interleaved: 2 (p - 1 - r) + (v - 1) p + 1 chunks
    assert [peak_held(rank, [1, 1], [0, 0], pp_size=2, num_micro_batches=8) for rank in range(2)] == [5, 3]


def test_what_backward_needs_counts_while_it_runs() -> None:
    assert peak_held(0, [10], [5], pp_size=1, num_micro_batches=3) == 15
    assert peak_held(1, [10, 100], [0, 7], pp_size=2, num_micro_batches=2) == 20 + 100 + 7
