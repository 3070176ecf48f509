"""Calls of torch_npu's operators, against a stand-in that records and computes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mindspeed_mm.ops.attention import segment_attention
from mindspeed_mm.platform import npu_ops
from tests.mindspeed_mm.platform.npu_stand_in import OLDEST_LAST_ARGUMENT, SCHEMAS, StandIn


@pytest.fixture
def torch_npu(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    module = StandIn()
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    npu_ops.causal_mask.cache_clear()
    yield module
    npu_ops.causal_mask.cache_clear()


def random_row(bounds: list[int], heads: int = 4, groups: int = 2, size: int = 8) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(bounds[-1], heads, size, generator=generator)
    k, v = (torch.randn(bounds[-1], groups, size, generator=generator) for _ in range(2))
    return q, k, v, torch.tensor(bounds, dtype=torch.int32)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bounds", [[0, 5], [0, 3, 3, 10, 11], [0, 1, 2, 3]])
def test_attention_equals_the_reference(torch_npu: StandIn, causal: bool, bounds: list[int]) -> None:
    q, k, v, cu_seqlens = random_row(bounds)
    expected = segment_attention(q, k, v, cu_seqlens, causal, 0.3)
    torch.testing.assert_close(npu_ops.varlen_attention(q, k, v, cu_seqlens, causal, 0.3), expected)


def test_attention_speaks_the_operators_language(torch_npu: StandIn) -> None:
    q, k, v, cu_seqlens = random_row([0, 3, 10])
    npu_ops.varlen_attention(q, k, v, cu_seqlens, True, 0.5)
    npu_ops.varlen_attention(q, k, v, cu_seqlens, False, 0.25)
    (causal_args, causal), (_, full) = torch_npu.named("npu_fusion_attention")
    assert causal_args[3:] == (4, "TND")
    assert causal["sparse_mode"] == 3
    assert causal["atten_mask"].shape == (2048, 2048)
    assert causal["atten_mask"].dtype == torch.bool
    assert torch.equal(causal["atten_mask"], torch.ones(2048, 2048).triu(1).bool())
    assert causal["actual_seq_qlen"] == causal["actual_seq_kvlen"] == [3, 10]
    assert (causal["scale"], causal["keep_prob"]) == (0.5, 1.0)
    assert full["sparse_mode"] == 0
    assert full["atten_mask"] is None
    assert full["scale"] == 0.25
    # Grouped heads go in unexpanded.
    assert causal_args[1].shape == (10, 2, 8)


def test_the_mask_is_made_once(torch_npu: StandIn) -> None:
    q, k, v, cu_seqlens = random_row([0, 4])
    for _ in range(2):
        npu_ops.varlen_attention(q, k, v, cu_seqlens, True, 1.0)
    first, second = (kwargs["atten_mask"] for _, kwargs in torch_npu.named("npu_fusion_attention"))
    assert first is second


def test_many_segments_are_cut_at_their_borders(torch_npu: StandIn) -> None:
    bounds = list(range(0, 2 * 2100 + 1, 2))
    q, k, v, cu_seqlens = random_row(bounds, heads=2, groups=1, size=4)
    found = npu_ops.varlen_attention(q, k, v, cu_seqlens, True, 1.0)
    calls = torch_npu.named("npu_fusion_attention")
    assert [len(kwargs["actual_seq_qlen"]) for _, kwargs in calls] == [1024, 1024, 52]
    assert [kwargs["actual_seq_qlen"][0] for _, kwargs in calls] == [2, 2, 2]
    torch.testing.assert_close(found, segment_attention(q, k, v, cu_seqlens, True, 1.0))


@pytest.mark.parametrize(
    ("heads", "groups", "bounds", "message"),
    [
        (4, 3, [0, 6], "4 query heads cannot share 3 key and 3 value heads evenly"),
        (4, 2, [1, 6], "cu_seqlens goes from 1 to 6"),
        (4, 2, [0, 5], "cu_seqlens goes from 0 to 5, and the row has tokens 0 to 6"),
    ],
)
def test_what_the_operator_would_not_notice_is_refused(
    heads: int, groups: int, bounds: list[int], message: str
) -> None:
    q, k, v, _ = random_row([0, 6], heads, groups)
    with pytest.raises(ValueError, match=message):
        npu_ops.varlen_attention(q, k, v, torch.tensor(bounds, dtype=torch.int32), True, 1.0)


def test_lengths_on_the_device_are_refused() -> None:
    q, k, v, cu_seqlens = random_row([0, 6])
    with pytest.raises(ValueError, match="cu_seqlens lies on meta"):
        npu_ops.varlen_attention(q, k, v, cu_seqlens.to("meta"), True, 1.0)


def test_rms_norm_gives_equal_dtypes(torch_npu: StandIn) -> None:
    x, weight = torch.randn(3, 8).bfloat16(), torch.rand(8)
    found = npu_ops.rms_norm(x, weight, 1e-5)
    assert found.dtype == torch.bfloat16
    (args, kwargs) = torch_npu.named("npu_rms_norm")[0]
    assert args[1].dtype == torch.bfloat16
    assert kwargs == {"epsilon": 1e-5}
    expected = torch.nn.functional.rms_norm(x.float(), (8,), weight, 1e-5)
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=1e-2)


def test_swiglu(torch_npu: StandIn) -> None:
    x = torch.randn(2, 6)
    expected = torch.nn.functional.silu(x[:, :3]) * x[:, 3:]
    assert torch.equal(npu_ops.swiglu(x), expected)


def test_rotary_goes_in_with_four_dimensions(torch_npu: StandIn) -> None:
    x = torch.randn(5, 3, 8)
    angles = torch.rand(5, 4).repeat(1, 2)
    found = npu_ops.rotary(x, angles.cos(), angles.sin())
    rotated = torch.cat((-x[..., 4:], x[..., :4]), -1)
    torch.testing.assert_close(found, x * angles.cos()[:, None] + rotated * angles.sin()[:, None])
    (args, _) = torch_npu.named("npu_rotary_mul")[0]
    assert [tuple(arg.shape) for arg in args] == [(5, 1, 3, 8), (5, 1, 1, 8), (5, 1, 1, 8)]


def test_half_tables_are_refused() -> None:
    with pytest.raises(ValueError, match="cos has 4 columns and x has 8"):
        npu_ops.rotary(torch.zeros(2, 1, 8), torch.zeros(2, 4), torch.zeros(2, 4))


def test_calls_fit_the_schemas_of_old_and_new_wheels(torch_npu: StandIn) -> None:
    q, k, v, cu_seqlens = random_row([0, 4])
    npu_ops.varlen_attention(q, k, v, cu_seqlens, True, 1.0)
    npu_ops.rms_norm(q, torch.ones(8), 1e-6)
    npu_ops.rotary(q, torch.ones(4, 8), torch.ones(4, 8))
    npu_ops.swiglu(q)
    assert {name for name, _, _ in torch_npu.calls} == SCHEMAS.keys()
    for name, args, kwargs in torch_npu.calls:
        _check_call(name, args, kwargs)


def _check_call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    schema = torch._C.parse_schema(SCHEMAS[name])
    names = [argument.name for argument in schema.arguments]
    last = OLDEST_LAST_ARGUMENT.get(name)
    allowed = names[: names.index(last) + 1] if last else names
    given = [*allowed[: len(args)], *kwargs]
    assert set(given) <= set(allowed), (name, given)
    assert len(set(given)) == len(given)
    required = {argument.name for argument in schema.arguments if not argument.has_default_value()}
    assert required <= set(given)
