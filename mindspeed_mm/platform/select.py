"""Which platform a process runs on, and making megatron-core ready for it."""

from __future__ import annotations

import logging
import warnings
from importlib import import_module

from mindspeed_mm.errors import SetupError
from mindspeed_mm.platform.base import Platform
from mindspeed_mm.platform.cpu import CpuPlatform
from mindspeed_mm.platform.cuda import CudaPlatform, cuda_problem
from mindspeed_mm.platform.npu import NpuPlatform, npu_problem
from mindspeed_mm.platform.patches import Patcher, Phase, apply_patches, is_megatron_imported

logger = logging.getLogger(__name__)

DEVICES = ("cpu", "cuda", "npu")


def choose_platform(requested: str | None = None) -> Platform:
    """The platform that the user asked for, or the best one that this machine has (npu, cuda, cpu in this order).

    Raises:
        SetupError: the requested platform cannot be used here; the text gives the reason.
    """
    match requested:
        case "cpu":
            return CpuPlatform()
        case "cuda":
            return _usable(CudaPlatform, "cuda", cuda_problem())
        case "npu":
            return _usable(NpuPlatform, "npu", npu_problem())
        case None:
            if npu_problem() is None:
                return NpuPlatform()
            return CudaPlatform() if cuda_problem() is None else CpuPlatform()
        case _:
            raise SetupError(f"device {requested!r} is not known; choose one of {', '.join(DEVICES)}.")


def _usable(kind: type[Platform], name: str, problem: str | None) -> Platform:
    if problem is not None:
        raise SetupError(
            f"device {name} was asked for (--device or MM_DEVICE) and cannot be used here: {problem}\n"
            "Leave --device away to take what this machine has."
        )
    return kind()


class _Activation:
    """What is patched in this process. Patches change libraries for the whole process, so there is one."""

    def __init__(self) -> None:
        self.platform: Platform | None = None
        self.patcher = Patcher()
        self.imported_by_us = False


_ACTIVATION = _Activation()


def activate(platform: Platform) -> None:
    """Make megatron-core usable on `platform`: early rows, `import megatron.core`, late rows. Idempotent.

    Raises:
        RuntimeError: another platform is active, or megatron.core was imported before (it binds names at import).
    """
    active = _ACTIVATION.platform
    if active is not None:
        if active.name != platform.name:
            raise RuntimeError(f"platform {active.name} is active in this process; {platform.name} cannot be as well")
        return
    if platform.name != "cuda" and is_megatron_imported() and not _ACTIVATION.imported_by_us:
        raise RuntimeError("megatron.core was imported before activate(): it has bound CUDA names already")
    patcher = _ACTIVATION.patcher
    try:
        apply_patches(patcher, platform, Phase.EARLY)
        with warnings.catch_warnings():
            if platform.name != "cuda":
                # Off CUDA they cannot be installed, so nobody can act on the advice.
                warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
            _import_megatron(platform)
            apply_patches(patcher, platform, Phase.LATE)
    except BaseException:
        patcher.undo()
        raise
    _ACTIVATION.platform = platform
    for line in platform.prepare():
        logger.info(line)


def _import_megatron(platform: Platform) -> None:
    at_import = Patcher()
    try:
        apply_patches(at_import, platform, Phase.IMPORT)
        import_module("megatron.core")
    finally:
        at_import.undo()
    _ACTIVATION.imported_by_us = True


def undo() -> None:
    """Restore every patched attribute, for tests; what megatron-core bound at import stays as it is."""
    _ACTIVATION.patcher.undo()
    _ACTIVATION.platform = None


def active_platform() -> Platform | None:
    """The platform of the last activate(), None before it and after undo()."""
    return _ACTIVATION.platform
