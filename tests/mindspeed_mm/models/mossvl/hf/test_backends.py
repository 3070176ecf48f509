"""Attention functions of transformers' registry (flash-attn and relatives) get what they need.

flash-attn itself needs a GPU; a stand-in with its interface computes the same on the CPU and checks its arguments.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from mindspeed_mm.models.mossvl.hf.attention import TextMask
from tests.mindspeed_mm.models.mossvl.golden import golden_batch, golden_model

calls: list[str] = []


def stand_in(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """[b, n, s, d] -> [b, s, n, d], by explicit masks."""
    groups = q.shape[1] // k.shape[1]
    assert groups == module.num_key_value_groups
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    rows, columns = q.shape[2], k.shape[2]
    if "cu_seq_lens_q" in options:
        calls.append("frames")
        bounds = options["cu_seq_lens_q"]
        assert bounds.dtype == torch.int32
        assert options["is_causal"] is False
        assert options["max_length_q"] == int(bounds.diff().max())
        segment = torch.bucketize(torch.arange(rows), bounds[1:], right=True)
        visible = segment[:, None] == segment[None]
    else:
        calls.append("text")
        assert module.is_causal
        visible = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
        if attention_mask is not None:
            assert attention_mask.shape == (q.shape[0], columns)
            visible = visible & attention_mask[:, None, None] | torch.eye(rows, columns, dtype=torch.bool)
    scores = (q @ k.transpose(2, 3) * options["scaling"]).masked_fill(~visible, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2), None


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    AttentionInterface.register("moss_stand_in", stand_in)


def test_a_registered_function_serves_text_and_frames() -> None:
    calls.clear()
    model = golden_model("moss_stand_in")
    assert model(**golden_batch()).loss.item() == pytest.approx(4.077848, abs=2e-5)
    assert calls == ["frames"] * 3 + ["text"] * 2  # cross-attention stays with SDPA


def test_a_registered_function_generates() -> None:
    batch = golden_batch("A")
    batch.pop("labels")
    ids = [
        golden_model(attention).generate(**batch, max_new_tokens=4, do_sample=False, eos_token_id=63).tolist()
        for attention in ("moss_stand_in", "eager")
    ]
    assert ids[0] == ids[1]


@pytest.mark.parametrize(
    ("padding", "num_new", "num_past", "is_causal", "has_mask"),
    [
        (None, 5, 0, True, False),
        ([[1, 1, 1, 0, 0]], 5, 0, True, False),
        ([[0, 0, 1, 1, 1]], 5, 0, False, True),
        (None, 1, 4, False, False),
        ([[0, 1, 1, 1, 1]], 1, 4, False, True),
        (None, 2, 3, False, True),
        (None, 1, 0, False, False),
    ],
)
def test_a_mask_is_built_only_where_causality_is_not_enough(
    padding: list[list[int]] | None, num_new: int, num_past: int, is_causal: bool, has_mask: bool
) -> None:
    given = None if padding is None else torch.tensor(padding)
    mask = TextMask.build(given, num_new=num_new, num_past=num_past, is_dense=False, device=torch.device("cpu"))
    assert (mask.is_causal, mask.visible is not None) == (is_causal, has_mask)
    if mask.visible is not None:
        assert mask.visible.shape[-2:] == (num_new, num_past + num_new)
        assert bool(mask.visible.any(-1).all())


def test_no_text_that_sees_a_frame_still_has_gradients_everywhere() -> None:
    """Data-parallel engines wait for every parameter."""
    model = golden_model().train()
    model(**golden_batch("B")).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
