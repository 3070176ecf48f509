"""From the turns of a sample to its token ids and labels, cut to the sequence length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mindspeed_mm.data.sample import UnusableSampleError
from mindspeed_mm.data.template import Turn

IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True)
class Features:
    """One sample as the model sees it, without its pixels."""

    input_ids: Tensor
    """[s] int64."""
    labels: Tensor
    """[s] int64, already shifted: what each position must predict, or -100; the last is -100."""
    media: tuple[int, ...]
    """Numbers of the sample's media that are in `input_ids`, in order."""
    num_cut_tokens: int
    """How many tokens `seq_length` cost the sample."""


@dataclass(frozen=True, slots=True)
class LabelRule:
    """What of a sample is learned, and how long it may be."""

    seq_length: int
    """Most tokens of a sample."""
    train_on_prompt: bool = False
    """Learn prompts, vision pads included, as well as answers."""
    mask_history: bool = False
    """Learn the last answer only; when the sample is too long, the last turns stay instead of the first ones."""


def split_budget(source: int, target: int, budget: int) -> tuple[int, int]:
    """How many tokens of a prompt and of its answer fit into the budget.

    Source: LLaMA-Factory's infer_seqlen, which MindSpeed-MM follows: the longer side gives way first.
    """
    if 2 * target < budget:
        most_target = budget
    elif 2 * source < budget:
        most_target = budget - source
    else:
        most_target = budget * target // (source + target)
    target = min(most_target, target)
    return min(max(budget - target, 0), source), target


def to_features(name: str, turns: Sequence[Turn], rule: LabelRule) -> Features:
    """Ids and labels of a sample.

    Turns are added until `seq_length` is used up; the last one that fits in part is cut at the right ends of its prompt
    and answer. A vision block is never cut: the conversation ends before a turn that would lose any part of one (with
    `mask_history`, where later turns are kept and may speak of that picture, the sample is dropped).

    Raises:
        UnusableSampleError: no turn fits, or nothing that fits is learned. Such samples are dropped and counted rather
            than trained on an answer to a picture that is not there.
    """
    kept = _fit(name, turns, rule)
    ids: list[int] = []
    labels: list[int] = []
    media: list[int] = []
    for number, (turn, source_size, target_size) in enumerate(kept):
        is_learned = not rule.mask_history or number == len(kept) - 1
        source, target = turn.source.ids[:source_size], turn.target.ids[:target_size]
        ids += source + target
        labels += source if rule.train_on_prompt else [IGNORE_INDEX] * source_size
        labels += target if is_learned else [IGNORE_INDEX] * target_size
        for tokens, size in ((turn.source, source_size), (turn.target, target_size)):
            media += [block.medium for block in tokens.blocks if block.stop <= size]
    shifted = [*labels[1:], IGNORE_INDEX]
    if all(label == IGNORE_INDEX for label in shifted):
        raise UnusableSampleError(name, "no token of an answer fits into seq_length", _sizes(turns, rule))
    return Features(torch.tensor(ids), torch.tensor(shifted), tuple(media), _num_tokens(turns) - len(ids))


def _fit(name: str, turns: Sequence[Turn], rule: LabelRule) -> list[tuple[Turn, int, int]]:
    """The turns that fit, in order, with the sizes that their prompts and answers may have."""
    kept: list[tuple[Turn, int, int]] = []
    budget = rule.seq_length
    lost = False
    for turn in reversed(turns) if rule.mask_history else turns:
        source_size, target_size = split_budget(len(turn.source), len(turn.target), budget) if budget > 0 else (0, 0)
        sized = ((turn.source, source_size), (turn.target, target_size))
        lost = any(block.stop > size for tokens, size in sized for block in tokens.blocks)
        if budget <= 0 or lost:
            break
        kept.append((turn, source_size, target_size))
        budget -= source_size + target_size
    if rule.mask_history:
        kept.reverse()
        lost = lost or any(turn.source.blocks or turn.target.blocks for turn in turns[: len(turns) - len(kept)])
    if lost and (rule.mask_history or not kept):
        raise UnusableSampleError(name, "a picture or video does not fit into seq_length", _sizes(turns, rule))
    return kept


def _num_tokens(turns: Sequence[Turn]) -> int:
    return sum(len(turn.source) + len(turn.target) for turn in turns)


def _sizes(turns: Sequence[Turn], rule: LabelRule) -> str:
    return f"{_num_tokens(turns)} tokens, seq_length = {rule.seq_length}"
