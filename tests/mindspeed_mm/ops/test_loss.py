"""Loss reductions on small literals."""

from __future__ import annotations

import pytest
import torch

from mindspeed_mm.ops.loss import LossKind, reduce_token_losses, sample_of_rows, supervised_rows

LABELS = torch.tensor([-100, 7, 8, -100, -100, 9, -100, -100])
CU_SEQLENS = torch.tensor([0, 4, 7, 8], dtype=torch.int32)
"""Three samples: two supervised tokens, one, none."""


def test_rows_and_their_samples() -> None:
    rows = supervised_rows(LABELS)
    assert rows.tolist() == [1, 2, 5]
    assert sample_of_rows(rows, CU_SEQLENS).tolist() == [0, 0, 1]


@pytest.mark.parametrize(("kind", "expected"), [("default", 3.0), ("token", 9.0), ("sample", 3.5)])
def test_each_kind_weighs_tokens_its_own_way(kind: str, expected: float) -> None:
    losses = torch.tensor([1.0, 3.0, 5.0])
    value = reduce_token_losses(losses, torch.tensor([0, 0, 1]), 3, LossKind(kind))
    assert value.item() == pytest.approx(expected)


@pytest.mark.parametrize("kind", list(LossKind))
def test_nothing_supervised_is_zero_loss_with_zero_gradient_not_nan(kind: LossKind) -> None:
    weight = torch.ones(3, requires_grad=True)
    losses = weight[torch.tensor([], dtype=torch.int64)]
    value = reduce_token_losses(losses, torch.tensor([], dtype=torch.int64), 2, kind)
    value.backward()
    assert value.item() == 0.0
    assert weight.grad is not None
    assert weight.grad.tolist() == [0.0, 0.0, 0.0]
