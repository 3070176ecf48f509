"""The CUDA platform as far as a machine without GPUs shows it: backends, probe, the calls of ragged attention."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from mindspeed_mm.errors import SetupError
from mindspeed_mm.platform import cuda
from mindspeed_mm.platform.cuda import CudaPlatform, cuda_problem, find_varlen_attention


def test_backend_carries_cpu_tensors_over_gloo() -> None:
    platform = CudaPlatform()
    assert platform.backend_for("nccl") == ("cpu:gloo,cuda:nccl", "")
    assert platform.backend_for("gloo").name == "gloo"
    assert "nccl is used" in platform.backend_for("hccl").note


def test_the_probe_names_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cuda.torch.version, "cuda", None)
    assert "is built without CUDA" in str(cuda_problem())
    monkeypatch.setattr(cuda.torch.version, "cuda", "13.0")
    assert "finds no GPU" in str(cuda_problem())
    monkeypatch.setattr(cuda.torch.cuda, "is_available", lambda: True)
    assert cuda_problem() is None


def test_too_many_processes_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda.torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SetupError, match="local rank 2 needs GPU 2, and this machine shows 2"):
        CudaPlatform().set_device(2)


def _row() -> tuple[torch.Tensor, ...]:
    return torch.zeros(6, 4, 8), torch.zeros(6, 2, 8), torch.zeros(6, 2, 8), torch.tensor([0, 2, 6], dtype=torch.int32)


@pytest.mark.parametrize(("causal", "window"), [(True, (-1, 0)), (False, (-1, -1))])
def test_torch_attention_is_called_by_its_signature(
    monkeypatch: pytest.MonkeyPatch, causal: bool, window: tuple[int, int]
) -> None:
    from torch.nn.attention import varlen

    calls: list[Any] = []
    monkeypatch.setattr(cuda, "_has_torch_varlen", lambda: True)
    monkeypatch.setattr(varlen, "varlen_attn", lambda *args, **kwargs: calls.append((args, kwargs)))
    attend = find_varlen_attention()
    assert attend is not None
    q, k, v, cu_seqlens = _row()
    attend(q, k, v, cu_seqlens, causal, 0.5)
    ((args, kwargs),) = calls
    assert args[3].tolist() == args[4].tolist() == [0, 2, 6]
    assert args[5:] == (4, 4)
    assert kwargs == {"scale": 0.5, "window_size": window, "enable_gqa": True}


def test_installed_torch_attention_is_recognised() -> None:
    assert cuda._has_torch_varlen()
    assert CudaPlatform().attention == "varlen"


def test_flash_attention_is_next(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    flash: Any = ModuleType("flash_attn")
    flash.flash_attn_varlen_func = lambda *args, **kwargs: calls.append((args, kwargs))
    monkeypatch.setattr(cuda, "_has_torch_varlen", lambda: False)
    assert find_varlen_attention() is None
    assert CudaPlatform().attention == "sdpa"
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    monkeypatch.setattr(cuda, "find_spec", lambda name: object())
    attend = find_varlen_attention()
    assert attend is not None
    q, k, v, cu_seqlens = _row()
    attend(q, k, v, cu_seqlens, True, 0.5)
    ((args, kwargs),) = calls
    assert args[5:] == (4, 4)
    assert kwargs == {"softmax_scale": 0.5, "causal": True}
