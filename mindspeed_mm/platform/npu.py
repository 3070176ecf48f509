"""Ascend NPUs through torch_npu alone; mindspeed's adaptor is never imported (it cannot live beside megatron.core)."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, ClassVar

import torch

from mindspeed_mm.errors import SetupError
from mindspeed_mm.platform import host, npu_ops
from mindspeed_mm.platform.base import Backend, FusedOps, MemoryStats, Platform, is_cuda_device

_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"

# fmt: off
REDIRECTED = (
    "current_device", "set_device", "device_count", "synchronize", "Stream", "Event", "stream", "set_stream",
    "current_stream", "default_stream", "manual_seed", "manual_seed_all", "empty_cache", "memory_stats",
    "memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved", "reset_peak_memory_stats",
    "get_device_properties", "get_device_name", "is_available", "FloatTensor", "HalfTensor", "BFloat16Tensor",
)
# fmt: on
"""Names that torch.npu has with torch.cuda's meaning."""


class NpuPlatform(Platform):
    """NPUs over HCCL, with gloo for CPU tensors."""

    name = "npu"
    environment_defaults: ClassVar[Mapping[str, str]] = {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "ASCEND_SLOG_PRINT_TO_STDOUT": "0",
        "ASCEND_GLOBAL_LOG_LEVEL": "3",
        "TASK_QUEUE_ENABLE": "2",
        "COMBINED_ENABLE": "1",
        "CPU_AFFINITY_CONF": "1",
        "HCCL_CONNECT_TIMEOUT": "1200",
        "NPU_ASD_ENABLE": "0",
        "ASCEND_LAUNCH_BLOCKING": "0",
        "ACLNN_CACHE_LIMIT": "100000",
    }

    @property
    def attention(self) -> str:
        return "npu_fusion"

    @property
    def fused(self) -> FusedOps:
        return FusedOps(
            rms_norm=npu_ops.rms_norm,
            swiglu=npu_ops.swiglu,
            rotary=npu_ops.rotary,
            varlen_attention=npu_ops.varlen_attention,
            varlen_dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32}),
        )

    @property
    def supports_bf16(self) -> bool:
        return bool(_npu().is_bf16_supported())

    def backend_for(self, requested: str) -> Backend:
        if requested == "gloo":
            return Backend("gloo", "--distributed-backend gloo: tensors travel through host memory")
        if requested in ("nccl", "hccl"):
            return Backend("cpu:gloo,npu:hccl")
        return Backend("cpu:gloo,npu:hccl", f"--distributed-backend {requested}: this machine has NPUs, hccl is used")

    def set_device(self, local_rank: int) -> None:
        count = _npu().device_count()
        if local_rank >= count:
            raise SetupError(
                f"local rank {local_rank} needs NPU {local_rank}, and this machine shows {count}.\n"
                "Start no more processes per node than NPUs (--nproc-per-node), or check ASCEND_RT_VISIBLE_DEVICES."
            )
        self.local_rank = local_rank
        _npu().set_device(local_rank)

    def synchronize(self) -> None:
        _npu().synchronize()

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)
        _npu().manual_seed_all(seed)

    def rng_state(self) -> torch.Tensor:
        return _npu().get_rng_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        _npu().set_rng_state(state)

    def memory(self) -> MemoryStats:
        return MemoryStats(_npu().memory_allocated(), _npu().max_memory_allocated())

    def reset_peak_memory(self) -> None:
        _npu().reset_peak_memory_stats()

    def prepare(self) -> tuple[str, ...]:
        npu = _npu()
        # Private layouts would break the flat parameter buffers and checkpoints. The attribute is write-only.
        npu.config.allow_internal_format = False
        npu.set_compile_mode(jit_compile=False)
        # On by default, and below fp32: parity with the reference needs it off.
        npu.conv.allow_hf32 = False
        npu.matmul.allow_hf32 = False
        return ("NPU: hf32 off, internal formats off, operators are not compiled per shape",)

    def enable_determinism(self) -> None:
        os.environ.setdefault("HCCL_DETERMINISTIC", "true")
        os.environ.setdefault("CLOSE_MATMUL_K_SHIFT", "1")
        super().enable_determinism()

    def cuda_names(self) -> Mapping[str, object]:
        npu = _npu()
        names: dict[str, object] = {name: getattr(npu, name) for name in REDIRECTED}
        for name in ("get_rng_state", "set_rng_state"):
            call = self._with_redirected_device(getattr(npu, name))
            names[name] = names[f"random.{name}"] = call
        # torch.npu has no nvtx.
        names["nvtx.range_push"] = names["nvtx.range_pop"] = host.do_nothing
        return names

    def redirect_device(self, device: object) -> object:
        if not is_cuda_device(device):
            return device
        index = torch.device(device).index  # type: ignore[call-overload]
        return torch.device("npu", _npu().current_device() if index is None else index)

    def type_name(self, name: str) -> str:
        return name.replace("torch.npu.", "torch.cuda.")

    def _with_redirected_device(self, call: Any) -> Any:
        # torch.npu refuses "cuda" here, which is megatron-core's default argument.
        @functools.wraps(call)
        def redirected(*args: Any, **kwargs: Any) -> Any:
            args = tuple(self.redirect_device(arg) for arg in args)
            kwargs = {key: self.redirect_device(value) for key, value in kwargs.items()}
            return call(*args, **kwargs)

        return redirected


def npu_problem() -> str | None:
    """Why no NPU can be used here; None if one can.

    Imports torch_npu if it is installed, under the environment defaults of the platform. A failed import (CANN not
    sourced, a second accelerator, wrong CANN path) leaves nothing behind: neither half of the package in sys.modules,
    nor its change of the autoload variable, nor our defaults.
    """
    if "torch_npu" not in sys.modules and find_spec("torch_npu") is None:
        return "torch_npu is not installed."
    names = (*NpuPlatform.environment_defaults, _AUTOLOAD)
    before = {name: os.environ.get(name) for name in names}
    for name, value in NpuPlatform.environment_defaults.items():
        os.environ.setdefault(name, value)
    problem = _import_problem()
    # torch_npu changes the autoload variable while it is imported and puts it back only on success.
    _restore_environment(before if problem is not None else {_AUTOLOAD: before[_AUTOLOAD]})
    if problem is not None:
        return problem
    # Not torch.accelerator: it answers "npu" even with no device.
    return None if _npu().is_available() else "torch_npu finds no device (see npu-smi info)."


def _import_problem() -> str | None:
    before = set(sys.modules)
    try:
        import_module("torch_npu")
    except Exception as error:
        # ImportError: no CANN. RuntimeError: npu and cuda at once. Bare Exception: wrong CANN path.
        for name in [name for name in sys.modules if name.partition(".")[0] == "torch_npu" and name not in before]:
            del sys.modules[name]
        hint = " Source CANN's set_env.sh first." if isinstance(error, ImportError) else ""
        return f"torch_npu cannot be imported: {error}.{hint}"
    return None


def _restore_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _npu() -> ModuleType:
    return import_module("torch_npu").npu
