"""The embedded default: everything on the host, processes talk over gloo."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from mindspeed_mm.platform import host
from mindspeed_mm.platform.base import Backend, FusedOps, MemoryStats, Platform, host_seed, is_cuda_device

MAX_MATMUL_ERROR = 1e-5
"""Largest relative error of a product that still counts as fp32; bf16 inputs give about 2e-3."""

_TYPE_NAMES = {f"torch.{kind}Tensor": f"torch.cuda.{kind}Tensor" for kind in ("Float", "Half", "BFloat16")}
_CPU = torch.device("cpu")


class CpuPlatform(Platform):
    """The host processor."""

    name = "cpu"

    @property
    def device(self) -> torch.device:
        return _CPU

    @property
    def attention(self) -> str:
        return "sdpa"

    @property
    def fused(self) -> FusedOps:
        return FusedOps()

    @property
    def supports_bf16(self) -> bool:
        return True

    def backend_for(self, requested: str) -> Backend:
        if requested == "gloo":
            return Backend("gloo")
        return Backend("gloo", f"--distributed-backend {requested}: no accelerator here, gloo is used")

    def set_device(self, local_rank: int) -> None:
        self.local_rank = local_rank

    def synchronize(self) -> None:
        """Nothing to wait for: every operation has finished when its call returns."""

    def manual_seed(self, seed: int) -> None:
        host_seed(seed)

    def rng_state(self) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)

    def memory(self) -> MemoryStats:
        return MemoryStats(allocated_bytes=_resident_bytes(), peak_bytes=_peak_resident_bytes())

    def reset_peak_memory(self) -> None:
        """The kernel keeps the peak of a process; it cannot be reset without rights on /proc."""

    def prepare(self) -> tuple[str, ...]:
        choice = choose_matmul_precision()
        return (f"fp32 products: {choice.precision} (largest relative error {choice.error:.1e})",)

    def cuda_names(self) -> Mapping[str, object]:
        return {
            "current_device": _current_device,
            "set_device": host.do_nothing,
            "synchronize": host.do_nothing,
            "Stream": host.HostStream,
            "Event": host.HostEvent,
            "stream": host.use_stream,
            "set_stream": host.do_nothing,
            "current_stream": host.current_stream,
            "default_stream": host.current_stream,
            "manual_seed": host_seed,
            "manual_seed_all": host_seed,
            "get_rng_state": _get_rng_state,
            "set_rng_state": _set_rng_state,
            "random.get_rng_state": _get_rng_state,
            "random.set_rng_state": _set_rng_state,
            "nvtx.range_push": host.do_nothing,
            "nvtx.range_pop": host.do_nothing,
            "FloatTensor": torch.FloatTensor,
            "HalfTensor": torch.HalfTensor,
            "BFloat16Tensor": torch.BFloat16Tensor,
            "empty_cache": host.do_nothing,
            "reset_peak_memory_stats": host.do_nothing,
        }

    def redirect_device(self, device: object) -> object:
        return _CPU if is_cuda_device(device) else device

    def type_name(self, name: str) -> str:
        return _TYPE_NAMES.get(name, name)


@dataclass(frozen=True, slots=True)
class MatmulChoice:
    """The precision setting of fp32 products that was kept, and its measured relative error."""

    precision: str
    error: float


def choose_matmul_precision(max_error: float = MAX_MATMUL_ERROR) -> MatmulChoice:
    """Send fp32 products to oneDNN where that stays fp32.

    "medium" allows bf16 inside; processors without bf16 units then take oneDNN's fp32 kernels, which are about twice
    as fast as MKL's on some of them, others really round. Only a measurement tells, so the product is measured on the
    kinds of operand that training uses and the setting goes back to "highest" if it lost precision.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    error = matmul_error()
    if error < max_error:
        return MatmulChoice("medium", error)
    torch.set_float32_matmul_precision(before)
    return MatmulChoice(before, matmul_error())


_MEASURED_SHAPES = ((256, 256, 256), (64, 512, 1024), (1, 128, 96))
"""(rows, inner, columns): square, a linear layer, and one row; kernels are chosen by shape."""


def matmul_error() -> float:
    """Largest error of fp32 products (plain, transposed, batched) against float64, relative to the largest entry."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for rows, inner, columns in _MEASURED_SHAPES:
        a = torch.randn(rows, inner, generator=generator)
        b = torch.randn(inner, columns, generator=generator)
        exact = a.double() @ b.double()
        batched = torch.bmm(a.expand(2, rows, inner), b.expand(2, inner, columns))[1]
        for result in (a @ b, torch.nn.functional.linear(a, b.t().contiguous()), batched):
            worst = max(worst, float((result.double() - exact).abs().max() / exact.abs().max()))
    return worst


def _current_device() -> torch.device:
    # A torch.device and not an index: an int means the current accelerator, and there is none.
    return _CPU


def _get_rng_state(device: object = None) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: object = None) -> None:
    torch.set_rng_state(new_state)


def _resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return _peak_resident_bytes()
    return int(statm.read_text().split()[1]) * resource.getpagesize()


def _peak_resident_bytes() -> int:
    # macOS counts bytes, Linux counts KiB.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
