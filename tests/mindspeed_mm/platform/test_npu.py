"""The NPU platform with a stand-in for torch_npu: probe, redirects, order of activation."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mindspeed_mm.errors import SetupError
from mindspeed_mm.platform.npu import NpuPlatform, npu_problem
from tests.mindspeed_mm.platform.npu_stand_in import StandIn

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"


@pytest.fixture
def torch_npu(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    for name in NpuPlatform.environment_defaults:
        monkeypatch.delenv(name, raising=False)
    module = StandIn()
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    return module


@pytest.mark.parametrize("autoload", [None, "1"])
@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (
            "ImportError('libhccl.so: cannot open shared object file')",
            "cannot open shared object file. Source CANN's set_env.sh first.",
        ),
        ("RuntimeError('Two accelerators cannot be used at the same time')", "Two accelerators cannot be used"),
        ("Exception('ASCEND_OPP_PATH /nowhere does not exist')", "ASCEND_OPP_PATH /nowhere does not exist"),
    ],
)
def test_a_failed_import_gives_the_reason_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failure: str, reason: str, autoload: str | None
) -> None:
    package = tmp_path / "torch_npu"
    package.mkdir()
    (package / "__init__.py").write_text(
        f"import os\nos.environ['{AUTOLOAD}'] = '0'\nimport torch_npu.half\nraise {failure}\n"
    )
    (package / "half.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv(AUTOLOAD, raising=False)
    if autoload is not None:
        monkeypatch.setenv(AUTOLOAD, autoload)
    before = dict(os.environ)
    problem = npu_problem()
    assert problem is not None
    assert problem.startswith("torch_npu cannot be imported: ")
    assert reason in problem
    assert dict(os.environ) == before
    assert not [name for name in sys.modules if name.startswith("torch_npu")]


def test_not_installed_is_a_reason() -> None:
    assert npu_problem() == "torch_npu is not installed."


def test_no_device_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", StandIn(devices=0))
    for name in NpuPlatform.environment_defaults:
        monkeypatch.setenv(name, "kept")
    assert npu_problem() == "torch_npu finds no device (see npu-smi info)."


def test_environment_defaults_do_not_overwrite(torch_npu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    # Every variable is set through monkeypatch first, so that it is taken back after the test.
    for name in NpuPlatform.environment_defaults:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "600")
    assert npu_problem() is None
    assert os.environ["HCCL_CONNECT_TIMEOUT"] == "600"
    assert os.environ["TASK_QUEUE_ENABLE"] == "2"


def test_backend_carries_cpu_tensors_over_gloo() -> None:
    platform = NpuPlatform()
    assert platform.backend_for("nccl") == ("cpu:gloo,npu:hccl", "")
    assert platform.backend_for("hccl") == ("cpu:gloo,npu:hccl", "")
    assert platform.backend_for("gloo").name == "gloo"
    assert "hccl is used" in platform.backend_for("mpi").note


def test_device_methods_reach_the_module(torch_npu: StandIn) -> None:
    platform = NpuPlatform()
    platform.set_device(1)
    assert platform.local_rank == 1
    platform.synchronize()
    platform.manual_seed(4)
    platform.reset_peak_memory()
    assert platform.memory().peak_bytes == 7
    assert platform.supports_bf16
    called = [name for name, _, _ in torch_npu.calls]
    for name in ("npu.set_device", "npu.synchronize", "npu.manual_seed_all", "npu.reset_peak_memory_stats"):
        assert name in called
    with pytest.raises(SetupError, match="local rank 2 needs NPU 2, and this machine shows 2"):
        platform.set_device(2)


def test_prepare_sets_the_numeric_switches(torch_npu: StandIn) -> None:
    NpuPlatform().prepare()
    assert torch_npu.npu.config.allow_internal_format is False
    assert torch_npu.npu.conv.allow_hf32 is False
    assert torch_npu.npu.matmul.allow_hf32 is False
    assert torch_npu.named("npu.set_compile_mode") == [((), {"jit_compile": False})]


def test_random_state_calls_translate_the_device(torch_npu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    # This torch knows no npu, and the platform makes torch devices of that name.
    monkeypatch.setattr(NpuPlatform, "redirect_device", lambda self, d: "npu:0" if d == "cuda" else d)
    names = NpuPlatform().cuda_names()
    names["random.get_rng_state"](device="cuda")  # type: ignore[operator]
    names["set_rng_state"](torch.zeros(16), "cuda")  # type: ignore[operator]
    assert torch_npu.named("npu.get_rng_state") == [((), {"device": "npu:0"})]
    assert torch_npu.named("npu.set_rng_state")[0][0][1] == "npu:0"


def test_type_names_become_cudas() -> None:
    platform = NpuPlatform()
    assert platform.type_name("torch.npu.BFloat16Tensor") == "torch.cuda.BFloat16Tensor"
    assert platform.type_name("torch.FloatTensor") == "torch.FloatTensor"


def test_fused_operations_are_all_there() -> None:
    fused = NpuPlatform().fused
    assert None not in (fused.rms_norm, fused.swiglu, fused.rotary, fused.varlen_attention)
    assert torch.float32 in fused.varlen_dtypes


def test_activation_redirects_before_megatron_is_imported(run_python: Callable[[str], str]) -> None:
    run_python(
        "import sys, torch\n"
        "from tests.mindspeed_mm.platform.npu_stand_in import StandIn\n"
        "torch.utils.rename_privateuse1_backend('npu')\n"
        "module = sys.modules['torch_npu'] = StandIn()\n"
        "torch._register_device_module('npu', module.npu)\n"
        "from mindspeed_mm.platform import patches, select\n"
        "platform = select.choose_platform()\n"
        "assert platform.name == 'npu'\n"
        "platform.set_device(1)\n"
        "assert platform.device == torch.device('npu', 1)\n"
        "assert platform.redirect_device('cuda') == torch.device('npu', 0)\n"
        "assert platform.redirect_device(torch.device('cuda:1')) == torch.device('npu', 1)\n"
        "assert not patches.is_megatron_imported()\n"
        "select.activate(platform)\n"
        "torch.cuda.synchronize(); torch.cuda.nvtx.range_push('x'); torch.cuda.set_device(1)\n"
        "assert module.named('npu.synchronize') and module.named('npu.set_device')[-1] == ((1,), {})\n"
        "assert torch.cuda.Stream is module.npu.Stream and torch.cuda.is_available() is True\n"
        "from megatron.core.fusions.fused_bias_swiglu import swiglu\n"
        "assert type(swiglu).__name__ == 'function'\n"
        "from megatron.core.tensor_parallel import random\n"
        "state = random._get_cuda_rng_state()\n"
        "random._set_cuda_rng_state(state)\n"
        "assert module.named('npu.set_rng_state')[-1][0][0] is state\n"
        "from megatron.core.optimizer import Adam\n"
        "assert Adam.__name__ == 'fused_adam'\n"
        "import torch._dynamo.trace_rules as rules\n"
        "rules.get_torch_obj_rule_map()\n"
        "try:\n    torch.zeros(2, device='cuda')\n"
        "except (RuntimeError, NotImplementedError) as error:\n"
        "    assert 'npu' in str(error).lower() or 'PrivateUse1' in str(error), error\n"
        "else:\n    raise AssertionError('a tensor on a device without kernels')\n"
        "select.undo()\n"
        "assert torch.cuda.Stream is not module.npu.Stream\n"
    )
