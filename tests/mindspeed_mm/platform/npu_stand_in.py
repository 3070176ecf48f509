"""A module that stands for torch_npu: records every call and computes with plain torch on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

# Printed by the operators of the wheel torch_npu 2.13.0, frozen here for machines without it.
SCHEMAS = {
    "npu_fusion_attention": "npu::npu_fusion_attention(Tensor query, Tensor key, Tensor value, int head_num, "
    "str input_layout, Tensor? pse=None, Tensor? padding_mask=None, Tensor? atten_mask=None, float scale=1., "
    "float keep_prob=1., int pre_tockens=2147483647, int next_tockens=2147483647, int inner_precise=0, "
    "int[]? prefix=None, int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None, int sparse_mode=0, "
    "bool gen_mask_parallel=True, bool sync=False, str softmax_layout='', Tensor? sink=None, "
    "Tensor? dropout_mask=None, int seed=0, int offset=0) -> (Tensor, Tensor, Tensor, Tensor, int, int, int)",
    "npu_rms_norm": "npu::npu_rms_norm(Tensor input, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)",
    "npu_rotary_mul": "npu::npu_rotary_mul(Tensor input, Tensor r1, Tensor r2, str rotary_mode='half', "
    "Tensor? rotate=None) -> Tensor",
    "npu_swiglu": "npu::npu_swiglu(Tensor self, int dim=-1) -> Tensor",
}
OLDEST_LAST_ARGUMENT = {"npu_fusion_attention": "sync"}
"""Wheels for torch 2.1-2.4 end at this argument."""


class StandIn(ModuleType):
    """Use as `sys.modules["torch_npu"]`; `calls` holds (name, positional, keywords) in order."""

    def __init__(self, devices: int = 2) -> None:
        super().__init__("torch_npu")
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        for name, function in (
            ("npu_fusion_attention", fusion_attention),
            ("npu_rms_norm", rms_norm),
            ("npu_rotary_mul", rotary_mul),
            ("npu_swiglu", swiglu),
        ):
            setattr(self, name, self._recorded(name, function))
        self.npu = self._device_module(devices)

    def named(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Calls of one function."""
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]

    def _recorded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            return function(*args, **kwargs)

        return call

    def _device_module(self, devices: int) -> ModuleType:
        npu = ModuleType("torch_npu.npu")
        answers: dict[str, Any] = {
            "current_device": 0,
            "device_count": devices,
            "is_available": devices > 0,
            "is_bf16_supported": True,
            "get_rng_state": torch.zeros(16, dtype=torch.uint8),
            "memory_allocated": 5,
            "max_memory_allocated": 7,
            "memory_reserved": 6,
            "max_memory_reserved": 8,
        }
        silent = (
            "set_device synchronize stream set_stream current_stream default_stream manual_seed manual_seed_all "
            "set_rng_state empty_cache memory_stats reset_peak_memory_stats get_device_properties get_device_name "
            "set_compile_mode"
        )
        for name in [*answers, *silent.split()]:
            setattr(npu, name, self._recorded(f"npu.{name}", self._answer(answers.get(name))))
        npu.Stream, npu.Event = type("Stream", (), {}), type("Event", (), {})  # type: ignore[attr-defined]
        npu.FloatTensor, npu.HalfTensor, npu.BFloat16Tensor = (  # type: ignore[attr-defined]
            torch.FloatTensor,
            torch.HalfTensor,
            torch.BFloat16Tensor,
        )
        npu.config, npu.conv, npu.matmul = SimpleNamespace(), SimpleNamespace(), SimpleNamespace()  # type: ignore[attr-defined]
        return npu

    @staticmethod
    def _answer(value: object) -> Callable[..., object]:
        return lambda *args, **kwargs: value


def fusion_attention(query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, **k: Any) -> Any:
    """The operator's meaning in TND: without a mask sparse_mode is ignored and attention is full."""
    assert input_layout == "TND"
    assert head_num == query.size(1)
    lengths = k["actual_seq_qlen"]
    assert lengths == k["actual_seq_kvlen"]
    assert all(isinstance(length, int) for length in lengths)
    assert len(lengths) <= 1024
    mask = k.get("atten_mask")
    causal = mask is not None and k.get("sparse_mode", 0) in (2, 3)
    if causal:
        assert mask.shape == (2048, 2048)
    repeat = query.size(1) // key.size(1)
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    output = torch.empty_like(query)
    start = 0
    for end in lengths:
        if end > start:
            q, kk, v = (t[start:end].transpose(0, 1) for t in (query, key, value))
            scores = q @ kk.transpose(1, 2) * k.get("scale", 1.0)
            if causal:
                scores = scores.masked_fill(mask[: end - start, : end - start], float("-inf"))
            output[start:end] = (scores.softmax(-1) @ v).transpose(0, 1)
        start = end
    return output, None, None, None, 0, 0, 0


def rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Normalised in fp32."""
    assert gamma.dtype == input.dtype
    rstd = torch.rsqrt(input.float().pow(2).mean(-1, keepdim=True) + epsilon)
    return (input.float() * rstd).to(input.dtype) * gamma, rstd


def rotary_mul(input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half") -> Tensor:
    """x * cos + rotated x * sin, four dimensions only."""
    assert input.dim() == r1.dim() == r2.dim() == 4
    assert input.size(-1) == r1.size(-1) == r2.size(-1)
    first, second = input.chunk(2, -1)
    return input * r1 + torch.cat((-second, first), -1) * r2


def swiglu(input: Tensor, dim: int = -1) -> Tensor:
    """SiLU of the first half times the second."""
    first, second = input.chunk(2, dim)
    return torch.nn.functional.silu(first) * second
