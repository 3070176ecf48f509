"""The one table of changes that this project makes to libraries, so that megatron-core runs off CUDA.

Rows are plain wrappers of single functions. A TorchFunctionMode would be shorter and wrong: accelerators run backward
and recompute in a worker thread, where the mode is inactive, and no CPU test shows it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module
from importlib.metadata import version
from typing import Any

from packaging.specifiers import SpecifierSet

from mindspeed_mm.platform import replacements
from mindspeed_mm.platform.base import Platform


class Phase(StrEnum):
    """When a row is applied."""

    EARLY = "early"
    """Before megatron is imported: it binds these names while it is imported."""
    IMPORT = "import"
    """Only while megatron.core is imported; taken back right after."""
    LATE = "late"
    """After megatron.core is imported: these are its own names."""


class Patcher:
    """Sets attributes and remembers what was there."""

    def __init__(self) -> None:
        self._undo: list[tuple[object, str, bool, object]] = []

    def set(self, owner: object, name: str, value: object) -> None:
        """Set `owner.name`; only what lies on the owner itself is remembered, not what it inherits."""
        own = vars(owner)
        self._undo.append((owner, name, name in own, own.get(name)))
        setattr(owner, name, value)

    def wrap(self, owner: object, name: str, wrapper: Callable[[Any], object]) -> None:
        """Set `owner.name` to `wrapper(old)`."""
        self.set(owner, name, wrapper(getattr(owner, name)))

    def undo(self) -> None:
        """Put every attribute back, last first."""
        while self._undo:
            owner, name, was_own, value = self._undo.pop()
            if was_own:
                setattr(owner, name, value)
            else:
                delattr(owner, name)


@dataclass(frozen=True, slots=True)
class Patch:
    """One row: what is changed, why, and when the row can go."""

    target: str
    reason: str
    upstream: str
    """The library's line or behaviour that forces the row."""
    versions: SpecifierSet
    """megatron-core versions that need it."""
    test: str
    """The test that fails without it."""
    delete_when: str
    platforms: frozenset[str]
    phase: Phase
    apply: Callable[[Patcher, Platform], None]

    def concerns(self, platform: Platform, megatron_version: str) -> bool:
        """Whether this platform and this megatron-core need the row."""
        return platform.name in self.platforms and self.versions.contains(megatron_version, prereleases=True)


def megatron_version() -> str:
    """Version of the installed megatron-core, read without importing it."""
    return version("megatron-core")


def apply_patches(patcher: Patcher, platform: Platform, phase: Phase) -> tuple[Patch, ...]:
    """Apply the rows of one phase; returns them."""
    installed = megatron_version()
    rows = tuple(row for row in PATCHES if row.phase is phase and row.concerns(platform, installed))
    for row in rows:
        row.apply(patcher, platform)
    return rows


# ----- what the rows do -------------------------------------------------------------------------------------------


def _cuda_names(patcher: Patcher, platform: Platform) -> None:
    for dotted, value in platform.cuda_names().items():
        module, _, name = f"torch.cuda.{dotted}".rpartition(".")
        patcher.set(import_module(module), name, replacements.own_object(value))


def _factories(patcher: Patcher, platform: Platform) -> None:
    torch = import_module("torch")
    # `with torch.device("meta")` recognises factories by identity in a set that is built once, at its first use.
    # Built after the wrappers are in place it would hold them instead of the functions that they call.
    import_module("torch.utils._device")._device_constructors()
    for name in replacements.FACTORIES:
        patcher.wrap(torch, name, lambda call: replacements.with_device_keyword(call, platform))


def _tensor_methods(patcher: Patcher, platform: Platform) -> None:
    tensor = import_module("torch").Tensor
    patcher.wrap(tensor, "to", lambda call: replacements.tensor_to(call, platform))
    patcher.wrap(tensor, "cuda", lambda call: replacements.tensor_cuda(platform))
    patcher.wrap(tensor, "type", lambda call: replacements.tensor_type(call, platform))


def _autocast_decorators(patcher: Patcher, platform: Platform) -> None:
    amp = import_module("torch.amp")
    for name in ("custom_fwd", "custom_bwd"):
        patcher.wrap(amp, name, lambda call: replacements.with_device_type(call, platform))


def _compile_at_import(patcher: Patcher, platform: Platform) -> None:
    patcher.set(import_module("torch"), "compile", replacements.identity_decorator)


def _rng_helpers(patcher: Patcher, platform: Platform) -> None:
    random = import_module("megatron.core.tensor_parallel.random")
    patcher.set(random, "_get_cuda_rng_state", replacements.get_rng_state)
    patcher.set(random, "_set_cuda_rng_state", replacements.set_rng_state)


def _rng_warning(patcher: Patcher, platform: Platform) -> None:
    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    patcher.set(logger, "filters", [*logger.filters, replacements.drop_generator_warning])


def _quantize_param_shard(patcher: Patcher, platform: Platform) -> None:
    # Both names are bound: the optimizer imported the function by value.
    for module in ("megatron.core.fp8_utils", "megatron.core.optimizer.distrib_optimizer"):
        patcher.wrap(import_module(module), "quantize_param_shard", replacements.skip_without_params)


def _predicted_logits(patcher: Patcher, platform: Platform) -> None:
    loss = import_module("megatron.core.tensor_parallel.cross_entropy").VocabParallelCrossEntropy
    patcher.set(loss, "calculate_predicted_logits", staticmethod(replacements.calculate_predicted_logits))


def _fused_adam(patcher: Patcher, platform: Platform) -> None:
    optimizer = import_module("megatron.core.optimizer")
    if not optimizer.Adam.__module__.startswith("torch."):
        return  # Transformer Engine or Apex is installed and brings a fused Adam of its own.
    patcher.set(optimizer, "Adam", replacements.fused_adam)
    if hasattr(optimizer, "USING_PYTORCH_OPTIMIZER"):
        # When set, torch.optim.AdamW is named directly and its slow default is taken.
        patcher.set(optimizer, "USING_PYTORCH_OPTIMIZER", False)


# ----- the table --------------------------------------------------------------------------------------------------

_SUPPORTED = SpecifierSet(">=0.12.1,<0.17")
_OFF_CUDA = frozenset({"cpu", "npu"})
_EVERYWHERE = frozenset({"cpu", "cuda", "npu"})
_TESTS = "tests/mindspeed_mm/platform/"

PATCHES: tuple[Patch, ...] = (
    Patch(
        target="torch.cuda.{current_device, synchronize, Stream, Event, stream, manual_seed, get_rng_state, ...}",
        reason="megatron-core calls torch.cuda by name for devices, streams, events, seeds and tensor types",
        upstream="megatron/core/pipeline_parallel/p2p_communication.py, timers.py, tensor_parallel/random.py, "
        "transformer/module.py (isinstance tuples at import)",
        versions=_SUPPORTED,
        test=_TESTS + "test_coverage.py::test_every_cuda_name_of_megatron_is_redirected_or_explained",
        delete_when="megatron-core uses torch.accelerator",
        platforms=_OFF_CUDA,
        phase=Phase.EARLY,
        apply=_cuda_names,
    ),
    Patch(
        target="torch.{" + ", ".join(replacements.FACTORIES) + "}",
        reason='tensors are created with device="cuda"',
        upstream='megatron/core/optimizer/clip_grads.py: torch.zeros(1, dtype=torch.float, device="cuda")',
        versions=_SUPPORTED,
        test=_TESTS + "test_patches.py::test_factories_put_cuda_tensors_on_the_platform",
        delete_when="megatron-core creates tensors on the device of its inputs",
        platforms=_OFF_CUDA,
        phase=Phase.EARLY,
        apply=_factories,
    ),
    Patch(
        target="torch.Tensor.{to, cuda, type}",
        reason="tensors are moved with .cuda(), and optimizers accept only the type names torch.cuda.*Tensor",
        upstream="megatron/core/optimizer/optimizer.py: param.type() in ['torch.cuda.HalfTensor', ...]",
        versions=_SUPPORTED,
        test=_TESTS + "test_patches.py::test_tensor_methods_speak_cuda",
        delete_when="megatron-core compares dtypes and uses .to(device)",
        platforms=_OFF_CUDA,
        phase=Phase.EARLY,
        apply=_tensor_methods,
    ),
    Patch(
        target="torch.amp.{custom_fwd, custom_bwd}",
        reason='autograd functions are decorated with device_type="cuda"; autocast state would be read there',
        upstream='megatron/core/tensor_parallel/layers.py: partial(torch.amp.custom_fwd, device_type="cuda")',
        versions=_SUPPORTED,
        test=_TESTS + "test_patches.py::test_autocast_decorators_use_the_platform",
        delete_when="megatron-core passes its device type",
        platforms=_OFF_CUDA,
        phase=Phase.EARLY,
        apply=_autocast_decorators,
    ),
    Patch(
        target="torch.compile",
        reason="fusions compile on first use: a C++ compiler on CPU, an Ascend Triton stack on NPU",
        upstream="megatron/core/jit.py: jit_fuser = torch.compile, bound while megatron.core is imported",
        versions=_SUPPORTED,
        test=_TESTS + "test_activate.py::test_megatron_fusions_are_plain_functions",
        delete_when="megatron-core lets jit_fuser be chosen before it is bound",
        platforms=_OFF_CUDA,
        phase=Phase.IMPORT,
        apply=_compile_at_import,
    ),
    Patch(
        target="megatron.core.tensor_parallel.random.{_get_cuda_rng_state, _set_cuda_rng_state}",
        reason="the setter is queued until CUDA starts, so without CUDA the state is never set and dropout and "
        "recompute use other random numbers than planned",
        upstream="megatron/core/tensor_parallel/random.py: _lazy_call(cb)",
        versions=_SUPPORTED,
        test=_TESTS + "test_patches.py::test_rng_tracker_forks_and_returns",
        delete_when="megatron-core uses torch.accelerator for random states",
        platforms=_OFF_CUDA,
        phase=Phase.LATE,
        apply=_rng_helpers,
    ),
    Patch(
        target="logger megatron.core.tensor_parallel.random",
        reason="on CPU the host's generator is the device's, so every fork of the tracker warns that it changed",
        upstream="megatron/core/tensor_parallel/random.py: CPU RNG state changed within GPU RNG context",
        versions=_SUPPORTED,
        test=_TESTS + "test_patches.py::test_rng_tracker_forks_and_returns",
        delete_when="with the rows of torch.cuda",
        platforms=frozenset({"cpu"}),
        phase=Phase.LATE,
        apply=_rng_warning,
    ),
    Patch(
        target="megatron.core.fp8_utils.quantize_param_shard",
        reason="every step of the distributed optimizer calls it, and without Transformer Engine it raises even if "
        "there are no fp8 parameters",
        upstream="megatron/core/fp8_utils.py 0.12.1: Invalid Transformer Engine version for FP8 distributed optimizer",
        versions=SpecifierSet(">=0.12.1,<0.16"),
        test=_TESTS + "test_patches.py::test_fp8_helper_is_skipped_without_fp8_parameters",
        delete_when="megatron-core 0.12 is no longer supported (0.16 returns early by itself)",
        platforms=_EVERYWHERE,
        phase=Phase.LATE,
        apply=_quantize_param_shard,
    ),
    Patch(
        target="megatron.core.tensor_parallel.cross_entropy.VocabParallelCrossEntropy.calculate_predicted_logits",
        reason="assignment through a boolean mask has a size that the host must wait for; same values without it",
        upstream="megatron/core/tensor_parallel/cross_entropy.py: masked_target[target_mask] = 0",
        versions=_SUPPORTED,
        test=_TESTS + "test_patches.py::test_predicted_logits_equal_megatron",
        delete_when="megatron-core masks with where or multiplication",
        platforms=_OFF_CUDA,
        phase=Phase.LATE,
        apply=_predicted_logits,
    ),
    Patch(
        target="megatron.core.optimizer.Adam",
        reason="torch's fused AdamW is 3-5 times its default on CPU and one kernel per group on accelerators",
        upstream="megatron/core/optimizer/__init__.py: torch.optim.AdamW without fused",
        versions=_SUPPORTED,
        test=_TESTS + "test_patches.py::test_megatron_optimizer_is_fused",
        delete_when="megatron-core or torch chooses the fused implementation by itself",
        platforms=_EVERYWHERE,
        phase=Phase.LATE,
        apply=_fused_adam,
    ),
)


def is_megatron_imported() -> bool:
    """Whether megatron.core has been imported by this process."""
    return "megatron.core" in sys.modules
