"""What the rest of the house may ask of the machine: device, dtype, memory, fused operations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

import torch

if TYPE_CHECKING:
    from torch import Tensor


class RmsNorm(Protocol):
    """RMS norm over the last dimension: (x [..., h], weight [h] of the same dtype, eps) -> [..., h]."""

    def __call__(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...


class Swiglu(Protocol):
    """Gated unit over the last dimension: [..., 2 f] -> [..., f]; SiLU on the first half, times the second half."""

    def __call__(self, x: Tensor) -> Tensor: ...


class Rotary(Protocol):
    """Rotation by halves: (x [s, n, d], cos [s, d], sin [s, d]) -> [s, n, d]; cos and sin repeat their half table."""

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor: ...


class VarlenAttention(Protocol):
    """Attention inside the segments of one row.

    q [s, n, d], k [s, g, d] and v [s, g, d] (n a multiple of g) with cu_seqlens, an int32 CPU tensor
    [segments + 1] that starts at 0, give [s, n, d]. `scale` multiplies the scores; `causal` hides later tokens.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, scale: float) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class FusedOps:
    """The fused operations of a platform; None where plain torch is used."""

    rms_norm: RmsNorm | None = None
    swiglu: Swiglu | None = None
    rotary: Rotary | None = None
    varlen_attention: VarlenAttention | None = None
    varlen_dtypes: frozenset[torch.dtype] = frozenset()
    """dtypes that varlen_attention takes; other tensors go to the reference attention."""


class Backend(NamedTuple):
    """The distributed backend that is really used, and what the log must say about it ("" if nothing)."""

    name: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class MemoryStats:
    """Memory of this process on its device, in bytes; on CPU both are resident set sizes."""

    allocated_bytes: int
    peak_bytes: int


class Platform(ABC):
    """One kind of machine: where tensors live, how processes talk, what `torch.cuda` names stand for."""

    name: ClassVar[str]
    """Word of --device; also the torch device type."""
    environment_defaults: ClassVar[Mapping[str, str]] = {}
    """Environment variables that are set before the device is first used, if the user has not set them."""

    def __init__(self) -> None:
        self.local_rank = 0

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return torch.device(self.name, self.local_rank)

    @property
    @abstractmethod
    def attention(self) -> str:
        """Name of the attention backend that is used unless the user asks for another one."""

    @property
    @abstractmethod
    def fused(self) -> FusedOps:
        """Fused operations; each may be None."""

    @property
    @abstractmethod
    def supports_bf16(self) -> bool:
        """Whether bf16 training works here."""

    @abstractmethod
    def backend_for(self, requested: str) -> Backend:
        """The torch.distributed backend for the user's --distributed-backend."""

    @abstractmethod
    def set_device(self, local_rank: int) -> None:
        """Bind this process to the device with this index.

        Raises:
            SetupError: the machine has no such device.
        """

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the device has finished."""

    @abstractmethod
    def manual_seed(self, seed: int) -> None:
        """Seed the generators of the host and of the device."""

    @abstractmethod
    def rng_state(self) -> Tensor:
        """State of the device's generator, a uint8 tensor on the CPU; on CPU that is the host's generator."""

    @abstractmethod
    def set_rng_state(self, state: Tensor) -> None:
        """Put back what rng_state() gave."""

    @abstractmethod
    def memory(self) -> MemoryStats:
        """Memory in use now and at its peak since the last reset."""

    @abstractmethod
    def reset_peak_memory(self) -> None:
        """Start a new peak, where the platform can."""

    def prepare(self) -> tuple[str, ...]:
        """Set the numeric switches of the platform before the first kernel; returns lines for the log."""
        return ()

    def enable_determinism(self) -> None:
        """Make repeated runs equal bit for bit, at a cost in speed. Call it before the first kernel."""
        torch.use_deterministic_algorithms(True)

    def cuda_names(self) -> Mapping[str, object]:
        """Values of `torch.cuda.X` (dotted below it) under this platform, for code that only knows CUDA."""
        return {}

    def redirect_device(self, device: object) -> object:
        """The device that stands for `device`: "cuda", "cuda:1" or torch.device("cuda") become this platform's."""
        return device

    def type_name(self, name: str) -> str:
        """What `Tensor.type()` must answer to code that compares with "torch.cuda.FloatTensor" and its like."""
        return name


def is_cuda_device(device: object) -> bool:
    """Whether a device argument names CUDA, as text or as a torch.device."""
    if isinstance(device, str):
        return device == "cuda" or device.startswith("cuda:")
    return isinstance(device, torch.device) and device.type == "cuda"


def host_seed(seed: int) -> None:
    """Seed the CPU generator alone: torch.manual_seed also calls torch.cuda.manual_seed_all, which is redirected."""
    torch.default_generator.manual_seed(seed)
