"""NVIDIA GPUs: megatron-core's home; almost nothing has to be changed."""

from __future__ import annotations

import inspect
import os
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from mindspeed_mm.errors import SetupError
from mindspeed_mm.platform.base import Backend, FusedOps, MemoryStats, Platform, VarlenAttention

if TYPE_CHECKING:
    from torch import Tensor

_FLASH_DTYPES = frozenset({torch.float16, torch.bfloat16})


class CudaPlatform(Platform):
    """GPUs over NCCL, with gloo for CPU tensors."""

    name = "cuda"

    @property
    def attention(self) -> str:
        return "sdpa" if find_varlen_attention() is None else "varlen"

    @property
    def fused(self) -> FusedOps:
        return FusedOps(varlen_attention=find_varlen_attention(), varlen_dtypes=_FLASH_DTYPES)

    @property
    def supports_bf16(self) -> bool:
        return torch.cuda.is_bf16_supported()

    def backend_for(self, requested: str) -> Backend:
        if requested == "gloo":
            return Backend("gloo", "--distributed-backend gloo: tensors travel through host memory")
        if requested == "nccl":
            return Backend("cpu:gloo,cuda:nccl")
        return Backend("cpu:gloo,cuda:nccl", f"--distributed-backend {requested}: this machine has GPUs, nccl is used")

    def set_device(self, local_rank: int) -> None:
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise SetupError(
                f"local rank {local_rank} needs GPU {local_rank}, and this machine shows {count}.\n"
                "Start no more processes per node than GPUs (--nproc-per-node), or check CUDA_VISIBLE_DEVICES."
            )
        self.local_rank = local_rank
        torch.cuda.set_device(local_rank)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def rng_state(self) -> Tensor:
        return torch.cuda.get_rng_state()

    def set_rng_state(self, state: Tensor) -> None:
        torch.cuda.set_rng_state(state)

    def memory(self) -> MemoryStats:
        return MemoryStats(torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated())

    def reset_peak_memory(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def enable_determinism(self) -> None:
        # cuBLAS reads it when its handle is made; without it torch refuses its products.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        super().enable_determinism()


def cuda_problem() -> str | None:
    """Why no GPU can be used here; None if one can."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA."
    return "torch finds no GPU (driver not loaded, or CUDA_VISIBLE_DEVICES is empty)."


def find_varlen_attention() -> VarlenAttention | None:
    """torch's or flash-attn's attention over ragged rows; None if neither is installed."""
    if _has_torch_varlen():
        return _torch_varlen
    if find_spec("flash_attn") is not None:
        return _flash_varlen
    return None


def _has_torch_varlen() -> bool:
    if find_spec("torch.nn.attention.varlen") is None:
        return False
    # Its first releases had neither a scale nor grouped heads.
    parameters = inspect.signature(import_module("torch.nn.attention.varlen").varlen_attn).parameters
    return {"scale", "window_size", "enable_gqa"} <= parameters.keys()


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, scale: float) -> Tensor:
    varlen_attn = import_module("torch.nn.attention.varlen").varlen_attn
    longest, on_device = _lengths(cu_seqlens, q.device)
    window = (-1, 0) if causal else (-1, -1)
    gqa = q.size(1) != k.size(1)
    return varlen_attn(q, k, v, on_device, on_device, longest, longest, scale=scale, window_size=window, enable_gqa=gqa)


def _flash_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, scale: float) -> Tensor:
    flash = import_module("flash_attn").flash_attn_varlen_func
    longest, on_device = _lengths(cu_seqlens, q.device)
    return flash(q, k, v, on_device, on_device, longest, longest, softmax_scale=scale, causal=causal)


def _lengths(cu_seqlens: Tensor, device: torch.device) -> tuple[int, Tensor]:
    # cu_seqlens lies on the host, so the maximum costs no wait for the device.
    longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
    return longest, cu_seqlens.to(device, non_blocking=True)
