"""Loss reductions on small literals."""

from __future__ import annotations

import pytest
import torch

from mindspeed_mm.ops.loss import LossKind, sample_of_rows, supervised_rows, token_weights

LABELS = torch.tensor([-100, 7, 8, -100, -100, 9, -100, -100])
CU_SEQLENS = torch.tensor([0, 4, 7, 8], dtype=torch.int32)
"""Three samples: two supervised tokens, one, none."""


def test_rows_and_their_samples() -> None:
    rows = supervised_rows(LABELS)
    assert rows.tolist() == [1, 2, 5]
    assert sample_of_rows(rows, CU_SEQLENS).tolist() == [0, 0, 1]


@pytest.mark.parametrize(("kind", "expected"), [("default", 3.0), ("token", 9.0), ("sample", 3.5)])
def test_each_kind_weighs_tokens_its_own_way(kind: str, expected: float) -> None:
    weights = token_weights(LABELS, CU_SEQLENS, LossKind(kind))
    losses = torch.tensor([1.0, 3.0, 5.0])
    assert (losses * weights[supervised_rows(LABELS)]).sum().item() == pytest.approx(expected)
    assert weights[LABELS == -100].tolist() == [0.0] * 5


@pytest.mark.parametrize("kind", list(LossKind))
def test_nothing_supervised_weighs_nothing_and_is_not_nan(kind: LossKind) -> None:
    weights = token_weights(torch.full((4,), -100), torch.tensor([0, 4], dtype=torch.int32), kind)
    assert weights.tolist() == [0.0] * 4


def test_parts_of_a_row_add_up_to_the_whole() -> None:
    weights = token_weights(LABELS, CU_SEQLENS, LossKind.PER_SAMPLE)
    losses = torch.arange(8.0)
    parts = [(losses[a:b] * weights[a:b]).sum() for a, b in [(0, 3), (3, 6), (6, 8)]]
    assert sum(parts).item() == pytest.approx((losses * weights).sum().item())
