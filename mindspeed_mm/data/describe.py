"""Samples in a form that people read: decoded tokens, labels and positions."""

from __future__ import annotations

from itertools import groupby

from mindspeed_mm.data.collate import PreparedSample
from mindspeed_mm.data.features import IGNORE_INDEX
from mindspeed_mm.data.tokenizer import TextTokenizer


def describe_example(sample: PreparedSample, tokenizer: TextTokenizer) -> str:
    """One sample as text: its record, ids, decoded inputs and decoded labels; runs of one token are shortened."""
    ids, labels = sample.input_ids.tolist(), sample.labels.tolist()
    learned = [label for label in labels if label != IGNORE_INDEX]
    grids = ", ".join("x".join(map(str, grid)) for grid in sample.grid_thw.tolist()) or "none"
    return "\n".join(
        [
            f"training example: {sample.name} ({len(ids)} tokens, {len(learned)} learned; patch grids: {grids})",
            f"input_ids: {shorten_runs(ids)}",
            f"inputs: {decode_runs(ids, tokenizer)}",
            f"label_ids (each is what its position must predict): {shorten_runs(labels)}",
            f"labels: {tokenizer.decode(learned)}",
        ]
    )


def shorten_runs(ids: list[int]) -> str:
    """Numbers in brackets, with runs of three or more equal ones as `7 (x12)`."""
    parts: list[str] = []
    for value, run in groupby(ids):
        count = len(list(run))
        parts += [f"{value} (x{count})"] if count > 2 else [str(value)] * count
    return f"[{', '.join(parts)}]"


def decode_runs(ids: list[int], tokenizer: TextTokenizer) -> str:
    """The text of ids, with runs of media tokens as `<|image_pad|> (x64)`."""
    text = ""
    for is_media, group in groupby(ids, key=lambda token: token if token in tokenizer.special.media else None):
        run = list(group)
        text += tokenizer.decode(run) if is_media is None else f"{tokenizer.decode(run[:1])} (x{len(run)}) "
    return text
