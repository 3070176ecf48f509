"""Pipeline schedules: the order that Megatron runs, its simulation from the times of the stages, and what is held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile

from mindspeed_mm.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Step:
    """Forward or backward of one micro-batch through one chunk of a pipeline rank."""

    vp_stage: int
    micro_batch: int
    is_forward: bool


@dataclass(frozen=True, slots=True)
class Block:
    """A step with its place and its time, in the unit of the stage times."""

    pp_rank: int
    step: Step
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A simulated iteration."""

    pp_size: int
    vp_size: int
    num_micro_batches: int
    blocks: tuple[Block, ...]

    @cached_property
    def length(self) -> float:
        """From the first forward to the end of the last backward."""
        return max(block.end for block in self.blocks)

    def busy(self, pp_rank: int) -> float:
        """Time that a pipeline rank works."""
        return sum(block.end - block.start for block in self.blocks if block.pp_rank == pp_rank)

    @property
    def efficiency(self) -> float:
        """Share of the time that the pipeline ranks work, 0 to 1."""
        return sum(self.busy(rank) for rank in range(self.pp_size)) / (self.pp_size * self.length)

    @property
    def bubble(self) -> float:
        """Share of the time that they wait, 0 to 1."""
        return 1.0 - self.efficiency

    @property
    def ideal_length(self) -> float:
        """Length of the schedule with the same work dealt evenly."""
        work = sum(self.busy(rank) for rank in range(self.pp_size)) / self.num_micro_batches
        return ideal_length(work, pp_size=self.pp_size, vp_size=self.vp_size, num_micro_batches=self.num_micro_batches)

    @property
    def share_of_ideal(self) -> float:
        """That length against this one's: 1 is perfect balance."""
        return self.ideal_length / self.length


def rank_steps(pp_rank: int, pp_size: int, vp_size: int, num_micro_batches: int) -> list[Step]:
    """What a pipeline rank does, in order: 1F1B, or interleaved 1F1B with virtual chunks.

    Source: get_pp_rank_microbatches and get_schedule_table of megatron-core; groups of `pp_size` micro-batches.
    Raises:
        ConfigError: virtual chunks with a number of micro-batches that the pipeline size does not divide.
    """
    check_micro_batches(pp_size, vp_size, num_micro_batches)
    forwards = [
        Step(vp_stage, micro_batch, True)
        for first in range(0, num_micro_batches, pp_size)
        for vp_stage in range(vp_size)
        for micro_batch in range(first, min(first + pp_size, num_micro_batches))
    ]
    to_last = pp_size - pp_rank - 1
    warm_up = to_last if vp_size == 1 else 2 * to_last + (vp_size - 1) * pp_size
    # backward visits the chunks from the last to the first
    backwards = [Step(vp_size - 1 - step.vp_stage, step.micro_batch, False) for step in forwards]
    warm_up = min(warm_up, len(forwards))
    steps = forwards[:warm_up]
    for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
        steps += [forward, backward]
    return steps + backwards[len(forwards) - warm_up :]


def check_micro_batches(pp_size: int, vp_size: int, num_micro_batches: int) -> None:
    """Check that the schedule takes this number of micro-batches.

    Raises:
        ConfigError: virtual chunks with a number that the pipeline size does not divide.
    """
    if vp_size > 1 and num_micro_batches % pp_size:
        raise ConfigError(
            "pipeline schedule",
            f"{num_micro_batches} micro-batches are not a multiple of the pipeline size {pp_size}, which the "
            "interleaved schedule needs: change the global batch size, or use no virtual chunks.",
        )


def simulate(
    forward: Sequence[float], backward: Sequence[float], *, pp_size: int, vp_size: int = 1, num_micro_batches: int
) -> Timeline:
    """Run the schedule with stages of known speed; transfers take no time and wait for nobody.

    The first stages that have no backward pass (nothing is trained at or before them) wait for no gradient either.

    Args:
        forward, backward: time of one micro-batch on every stage, in forward order (`vp_stage * pp_size + pp_rank`),
            in any unit.
    Raises:
        ConfigError: virtual chunks with a number of micro-batches that the pipeline size does not divide.
    """
    last = pp_size * vp_size - 1
    assert len(forward) == len(backward) == last + 1, "one time per stage"
    forward_only = sum(1 for _ in takewhile(lambda time: time == 0, backward))
    orders = [rank_steps(rank, pp_size, vp_size, num_micro_batches) for rank in range(pp_size)]
    at, free = [0] * pp_size, [0.0] * pp_size
    ends: dict[tuple[int, int, bool], float] = {}
    blocks: list[Block] = []
    while len(blocks) < 2 * num_micro_batches * (last + 1):
        before = len(blocks)
        for rank, order in enumerate(orders):
            while at[rank] < len(order):
                step = order[at[rank]]
                stage = step.vp_stage * pp_size + rank
                ready = _ready(ends, stage, last if stage >= forward_only else stage, step)
                if ready is None:
                    break
                start = max(free[rank], ready)
                free[rank] = start + (forward if step.is_forward else backward)[stage]
                ends[stage, step.micro_batch, step.is_forward] = free[rank]
                blocks.append(Block(rank, step, start, free[rank]))
                at[rank] += 1
        assert len(blocks) > before, "every schedule of rank_steps ends"
    return Timeline(pp_size, vp_size, num_micro_batches, tuple(blocks))


def _ready(ends: dict[tuple[int, int, bool], float], stage: int, turn: int, step: Step) -> float | None:
    """When the input of a step is there; None while its sender has not run. Backward starts at stage `turn`."""
    if step.is_forward:
        return 0.0 if stage == 0 else ends.get((stage - 1, step.micro_batch, True))
    sender = (stage, step.micro_batch, True) if stage == turn else (stage + 1, step.micro_batch, False)
    return ends.get(sender)


def ideal_length(work: float, *, pp_size: int, vp_size: int = 1, num_micro_batches: int) -> float:
    """Length of the schedule when every stage does an equal share of `work`, the time of one micro-batch on all stages.

    A schedule has a bubble even then: the (pp_size - 1) / vp_size micro-batches' time of filling and draining.
    """
    return work / pp_size * (num_micro_batches + (pp_size - 1) / vp_size)


def peak_held(
    pp_rank: int,
    kept: Sequence[int],
    working: Sequence[int],
    *,
    pp_size: int,
    num_micro_batches: int,
) -> int:
    """The most that a pipeline rank holds at once.

    Args:
        kept: per virtual chunk, what a micro-batch holds from its forward to its backward.
        working: per virtual chunk, what a backward pass needs on top while it runs.
    """
    held = peak = 0
    for step in rank_steps(pp_rank, pp_size, len(kept), num_micro_batches):
        if step.is_forward:
            held += kept[step.vp_stage]
            peak = max(peak, held)
        else:
            peak = max(peak, held + working[step.vp_stage])
            held -= kept[step.vp_stage]
    return peak
