"""Choosing and activating a platform: order of imports, idempotence, errors."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch

from mindspeed_mm.errors import SetupError
from mindspeed_mm.platform import select
from mindspeed_mm.platform.cpu import CpuPlatform
from mindspeed_mm.platform.cuda import CudaPlatform

RunPython = Callable[[str], str]


@pytest.mark.usefixtures("active")
def test_activate_is_idempotent_and_undo_takes_all_back() -> None:
    wrapped = torch.zeros
    select.activate(CpuPlatform())
    assert torch.zeros is wrapped
    select.undo()
    assert select.active_platform() is None
    assert torch.zeros is not wrapped
    with pytest.raises(AssertionError, match="CUDA"):
        torch.cuda.current_device()
    select.activate(CpuPlatform())
    assert torch.cuda.current_device() == torch.device("cpu")


@pytest.mark.usefixtures("active")
def test_two_platforms_do_not_mix() -> None:
    with pytest.raises(RuntimeError, match="platform cpu is active"):
        select.activate(CudaPlatform())


@pytest.mark.usefixtures("active")
def test_megatron_fusions_are_plain_functions() -> None:
    from megatron.core.fusions.fused_bias_swiglu import swiglu
    from megatron.core.jit import jit_fuser

    assert inspect.isfunction(swiglu)
    assert swiglu.__module__ == "megatron.core.fusions.fused_bias_swiglu"
    assert not hasattr(swiglu, "_torchdynamo_orig_callable")
    assert jit_fuser(swiglu) is swiglu
    assert jit_fuser(dynamic=True)(swiglu) is swiglu


def test_torch_compile_is_itself_again(active: CpuPlatform) -> None:
    assert torch.compile.__module__ == "torch"


def test_dynamo_loads_after_activation(run_python: RunPython) -> None:
    # torch.optim imports it; it refuses one function object under two torch names.
    run_python(
        "import torch\n"
        "from mindspeed_mm.platform.select import activate, choose_platform\n"
        "activate(choose_platform('cpu'))\n"
        "import torch._dynamo.trace_rules as rules\n"
        "rules.get_torch_obj_rule_map()\n"
        "assert torch.compile(lambda x: x + torch.zeros(2), backend='eager')(torch.ones(2)).sum() == 2\n"
    )


def test_importing_our_rooms_imports_no_engine(run_python: RunPython) -> None:
    rooms = "config plan ops storage data platform.select platform.groups platform.npu_ops"
    imports = "\n".join(f"import mindspeed_mm.{room}" for room in rooms.split())
    out = run_python(
        f"import os, sys; before = dict(os.environ)\n{imports}\nimport checkpoint\n"
        "print([n for n in ('megatron', 'torch_npu', 'mindspeed', 'transformer_engine') if n in sys.modules])\n"
        "assert dict(os.environ) == before\n"
    )
    assert out.strip() == "[]"


def test_megatron_imported_too_early_is_refused(run_python: RunPython) -> None:
    out = run_python(
        "import megatron.core\n"
        "from mindspeed_mm.platform.select import activate, choose_platform\n"
        "try:\n    activate(choose_platform('cpu'))\nexcept RuntimeError as error:\n    print(error)\n"
    )
    assert "megatron.core was imported before activate()" in out


@pytest.mark.parametrize("device", ["cuda", "npu"])
def test_a_device_that_is_not_there_is_an_error_with_its_reason(device: str) -> None:
    with pytest.raises(SetupError, match=rf"device {device} was asked for .* cannot be used here: \w+") as error:
        select.choose_platform(device)
    assert error.value.exit_code == 11


def test_an_unknown_device_lists_the_known_ones() -> None:
    with pytest.raises(SetupError, match="'tpu' is not known; choose one of cpu, cuda, npu"):
        select.choose_platform("tpu")


def test_the_best_device_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "npu_problem", lambda: "no")
    monkeypatch.setattr(select, "cuda_problem", lambda: "no")
    assert select.choose_platform().name == "cpu"
    monkeypatch.setattr(select, "cuda_problem", lambda: None)
    assert select.choose_platform().name == "cuda"
    monkeypatch.setattr(select, "npu_problem", lambda: None)
    assert select.choose_platform().name == "npu"
    assert select.choose_platform("cpu").name == "cpu"


def test_a_gpu_build_without_gpus_keeps_activation_working(run_python: RunPython) -> None:
    # On CUDA nothing but the optimizer changes, and megatron may have been imported before.
    run_python(
        "import torch, megatron.core\n"
        "from mindspeed_mm.platform.cuda import CudaPlatform\n"
        "from mindspeed_mm.platform.select import activate, undo\n"
        "zeros, compiled = torch.zeros, torch.compile\n"
        "activate(CudaPlatform())\n"
        "from megatron.core import optimizer, jit\n"
        "assert torch.zeros is zeros and torch.compile is compiled and jit.jit_fuser is compiled\n"
        "assert optimizer.Adam.__name__ == 'fused_adam'\n"
    )
