"""The stage lists that make the simulated schedule shortest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from mindspeed_mm.plan.auto import best_cuts, layer_costs, legal_ends, lists_of_cuts
from mindspeed_mm.plan.estimate import stage_work
from mindspeed_mm.plan.flops import Work
from mindspeed_mm.plan.schedule import Timeline, check_micro_batches, simulate
from mindspeed_mm.plan.stage import StagePlan, Tower

if TYPE_CHECKING:
    from mindspeed_mm.config import Qwen2VLConfig

ROUNDS = 4
"""Candidates are compared over this many micro-batches per pipeline rank at most: enough for a steady state."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What a micro-batch costs forward and backward, per layer and part; in FLOPs or in seconds."""

    forward: Work
    backward: Work

    def of_stages(self, plan: StagePlan) -> tuple[list[float], list[float]]:
        """Forward and backward of every stage, in forward order."""
        return (
            [stage_work(self.forward, stage) for stage in plan.stages],
            [stage_work(self.backward, stage) for stage in plan.stages],
        )


def simulate_plan(plan: StagePlan, costs: Costs, num_micro_batches: int) -> Timeline:
    """The schedule of a plan; times are in the unit of `costs`."""
    forward, backward = costs.of_stages(plan)
    return simulate(forward, backward, pp_size=plan.pp_size, vp_size=plan.vp_size, num_micro_batches=num_micro_batches)


def best_plan(
    model: Qwen2VLConfig,
    costs: Costs,
    *,
    tp_size: int = 1,
    pp_size: int,
    vp_size: int = 1,
    num_micro_batches: int,
    given: StagePlan | None = None,
) -> StagePlan:
    """The plan whose simulated schedule is shortest, as far as moving layers between stages one at a time finds it.

    The search starts from the cuts whose slowest stage is fastest, and from `given`; so it never ends behind them. Cuts
    that leave a pipeline rank with frozen layers only are not considered.

    Args:
        given: a plan of the same sizes to start from as well.
    Raises:
        ConfigError: the schedule does not take this number of micro-batches.
    """
    check_micro_batches(pp_size, vp_size, num_micro_batches)
    forward, backward = layer_costs(model, costs.forward), layer_costs(model, costs.backward)
    search = _Search(
        [0.0, *accumulate(forward)],
        [0.0, *accumulate(backward)],
        pp_size,
        vp_size,
        min(num_micro_batches, ROUNDS * pp_size),
        legal_ends(model, pp_size, vp_size),
    )
    both = [first + second for first, second in zip(forward, backward, strict=True)]
    starts = [tuple(best_cuts(both, pp_size * vp_size, search.is_legal))]
    if given is not None:
        cuts = (0, *accumulate(sum(len(stage.layers(tower)) for tower in Tower) for stage in given.stages))
        if search.are_legal(cuts):
            starts.append(cuts)
    results = [search.improve(cuts) for cuts in starts]
    lists = lists_of_cuts(min(results)[1], model.vision_layers, pp_size)
    return StagePlan.from_lists(
        model.model_id,
        *lists,
        tp_size=tp_size,
        vision_layers=model.vision_layers,
        text_layers=model.text_decoder.num_layers,
        is_tied=model.text_decoder.is_tied,
    )


Cuts = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Search:
    forward_before: Sequence[float]
    """Cost of all layers before each one."""
    backward_before: Sequence[float]
    pp_size: int
    vp_size: int
    num_micro_batches: int
    is_legal: Callable[[int, int], bool]

    def are_legal(self, cuts: Cuts) -> bool:
        return all(first < second for first, second in pairwise(cuts)) and all(
            self.is_legal(stage, end) for stage, end in enumerate(cuts[1:])
        )

    def length(self, cuts: Cuts, limit: float) -> float:
        """Length of the schedule; some number not below `limit` where it is sure to be that long."""
        forward = [self.forward_before[end] - self.forward_before[start] for start, end in pairwise(cuts)]
        backward = [self.backward_before[end] - self.backward_before[start] for start, end in pairwise(cuts)]
        slowest = max(
            sum(forward[rank :: self.pp_size]) + sum(backward[rank :: self.pp_size]) for rank in range(self.pp_size)
        )
        if slowest * self.num_micro_batches >= limit:
            return slowest * self.num_micro_batches
        return simulate(
            forward,
            backward,
            pp_size=self.pp_size,
            vp_size=self.vp_size,
            num_micro_batches=self.num_micro_batches,
        ).length

    def improve(self, cuts: Cuts) -> tuple[float, Cuts]:
        """Take the first move that makes the schedule shorter, until there is none."""
        length = self.length(cuts, float("inf"))
        while True:
            for other in self.neighbours(cuts):
                shorter = self.length(other, length)
                if shorter < length * (1 - 1e-9):
                    cuts, length = other, shorter
                    break
            else:
                return length, cuts

    def neighbours(self, cuts: Cuts) -> Iterator[Cuts]:
        """Cuts with one layer taken from a stage and given to another; those between shift by one."""
        inner = range(1, len(cuts) - 1)
        for first in inner:
            for last in range(first, len(cuts) - 1):
                for step in (-1, 1):
                    moved = tuple(cut + step if first <= at <= last else cut for at, cut in enumerate(cuts))
                    if self.are_legal(moved):
                        yield moved
