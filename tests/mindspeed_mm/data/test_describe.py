"""Samples read well."""

from __future__ import annotations

import torch

from mindspeed_mm.data.collate import PreparedSample
from mindspeed_mm.data.describe import decode_runs, describe_example, shorten_runs
from mindspeed_mm.data.tokenizer import TextTokenizer


def test_runs_are_shortened(tokenizer: TextTokenizer) -> None:
    pad = tokenizer.special.image_pad
    assert shorten_runs([1, 1, 2, 7, 7, 7, 7, 3]) == "[1, 1, 2, 7 (x4), 3]"
    assert (
        decode_runs([*tokenizer.encode("ab"), *[pad] * 5, *tokenizer.encode("c")], tokenizer)
        == "ab<|image_pad|> (x5) c"
    )


def test_example_shows_ids_and_texts_of_inputs_and_labels(tokenizer: TextTokenizer) -> None:
    a, b = tokenizer.encode("a") + tokenizer.encode("b")
    grids = torch.empty(0, 3, dtype=torch.int64)
    sample = PreparedSample("r.json[3]", torch.tensor([a, b]), torch.tensor([b, -100]), grids, ())
    assert describe_example(sample, tokenizer).splitlines() == [
        "training example: r.json[3] (2 tokens, 1 learned; patch grids: none)",
        f"input_ids: [{a}, {b}]",
        "inputs: ab",
        f"label_ids (each is what its position must predict): [{b}, -100]",
        "labels: b",
    ]
