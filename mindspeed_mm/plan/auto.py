"""Stage lists balanced by FLOPs, for `pipeline_num_layers = "auto"`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.plan.flops import SampleShape, Work, training_flops

if TYPE_CHECKING:
    from mindspeed_mm.config import Qwen2VLConfig

NestedLists = tuple[tuple[int, ...], ...]


def balanced_lists(
    model: Qwen2VLConfig, pp_size: int, vp_size: int = 1, shape: SampleShape | None = None
) -> tuple[NestedLists, NestedLists]:
    """Vision and text layers per stage such that the slowest stage is as fast as it can be.

    All contiguous cuts of the layers, vision before text, are considered. Cuts that leave a pipeline rank with frozen
    layers only are not, because such a rank needs `--enable-dummy-optimizer`.

    Args:
        shape: the sample to balance for; `SampleShape()` when not given.
    Returns:
        Two nested lists: one inner tuple per virtual chunk, one entry per pipeline rank.
    """
    costs = layer_costs(model, training_flops(model, shape or SampleShape()))
    cuts = best_cuts(costs, pp_size * vp_size, legal_ends(model, pp_size, vp_size))
    return lists_of_cuts(cuts, model.vision_layers, pp_size)


def legal_ends(model: Qwen2VLConfig, pp_size: int, vp_size: int) -> Callable[[int, int], bool]:
    """Whether stage number s may end before layer e: not if a pipeline rank were left with frozen layers only."""
    most_vision_only = most_vision_only_stages(model, pp_size, pp_size * vp_size)
    return lambda stage, end: end > model.vision_layers or stage < most_vision_only


def lists_of_cuts(cuts: Sequence[int], vision_layers: int, pp_size: int) -> tuple[NestedLists, NestedLists]:
    """Vision and text layers per stage of contiguous cuts through all layers, vision first."""
    vision = [max(0, min(end, vision_layers) - start) for start, end in pairwise(cuts)]
    text = [end - start - count for (start, end), count in zip(pairwise(cuts), vision, strict=True)]
    return _by_chunk(vision, pp_size), _by_chunk(text, pp_size)


def layer_costs(model: Qwen2VLConfig, work: Work) -> list[float]:
    """The cost of every layer in forward order, vision first; each part counts with the layer that it stands beside."""
    vision = [work.vision_layer] * model.vision_layers
    text = [work.text_layer] * model.text_decoder.num_layers
    if vision:
        vision[0] += work.patch_embed
        vision[-1] += work.projector
    text[0] += work.token_embed
    text[-1] += work.lm_head
    return vision + text


def most_vision_only_stages(model: Qwen2VLConfig, pp_size: int, num_stages: int) -> int:
    """How many stages may hold no text without leaving a pipeline rank that trains nothing."""
    encoder = model.image_encoder
    if encoder is None or not encoder.vision_encoder.freeze or model.text_decoder.freeze:
        return num_stages
    # the last chunk of every rank must hold text; the last vision stage also trains when it has a trained projector
    return num_stages - pp_size + (not encoder.vision_projector.freeze)


def best_cuts(costs: Sequence[float], num_stages: int, is_allowed: Callable[[int, int], bool]) -> list[int]:
    """Where to cut `costs` into contiguous, non-empty stages: the slowest as fast as possible, then the most even.

    Args:
        is_allowed: whether stage number s may end before position e.
    Returns:
        `num_stages + 1` positions from 0 to `len(costs)`.
    Raises:
        ConfigError: there is no such cut.
    """
    slowest = _search(costs, num_stages, is_allowed, combine=max)[0]
    # among all cuts that reach the optimum, the least sum of squares
    limit = slowest * (1 + 1e-9)
    return _search(costs, num_stages, is_allowed, combine=lambda done, cost: done + cost * cost, limit=limit)[1]


def _search(
    costs: Sequence[float],
    num_stages: int,
    is_allowed: Callable[[int, int], bool],
    *,
    combine: Callable[[float, float], float],
    limit: float = math.inf,
) -> tuple[float, list[int]]:
    """Dynamic programme over (stage, end position); stages that cost more than `limit` are left out."""
    before = [0.0, *accumulate(costs)]
    end_of_all = len(costs)
    best: list[tuple[float, list[int]] | None] = [(0.0, [0]), *([None] * end_of_all)]
    for stage in range(num_stages):
        following: list[tuple[float, list[int]] | None] = [None] * (end_of_all + 1)
        left = num_stages - stage - 1
        for end in range(stage + 1, end_of_all - left + 1):
            if not is_allowed(stage, end):
                continue
            for start in range(stage, end):
                done = best[start]
                cost = before[end] - before[start]
                if done is None or cost > limit:
                    continue
                value = combine(done[0], cost)
                current = following[end]
                if current is None or value < current[0]:
                    following[end] = (value, [*done[1], end])
        best = following
    result = best[end_of_all]
    if result is None:
        raise ConfigError(
            "stage plan",
            f"{end_of_all} layers cannot be dealt to {num_stages} stages so that each has a layer and every pipeline "
            "rank something to train: use fewer stages.",
        )
    return result


def _by_chunk(counts: Sequence[int], pp_size: int) -> NestedLists:
    return tuple(tuple(counts[start : start + pp_size]) for start in range(0, len(counts), pp_size))
