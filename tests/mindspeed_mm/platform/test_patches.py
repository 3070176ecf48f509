"""The rows of the table: each does what it says, on CPU, and can be taken back."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mindspeed_mm.platform import replacements
from mindspeed_mm.platform.cpu import CpuPlatform
from mindspeed_mm.platform.patches import PATCHES, Patcher, Phase, apply_patches
from tests.mindspeed_mm.platform.conftest import ROOT

CPU = torch.device("cpu")


class FakeAccelerator(CpuPlatform):
    """A platform whose device torch does not have, to see what is passed on."""

    name = "npu"

    def redirect_device(self, device: object) -> object:
        return "npu:0" if str(device).startswith("cuda") else device


def test_every_row_is_complete_and_names_a_test_that_exists() -> None:
    for row in PATCHES:
        assert row.target
        assert row.reason
        assert row.upstream
        assert row.delete_when
        assert row.platforms <= {"cpu", "cuda", "npu"}
        path, _, function = row.test.partition("::")
        assert f"def {function}(" in (ROOT / path).read_text(), row.test


def test_cuda_needs_two_rows_only() -> None:
    rows = {row.target for row in PATCHES if "cuda" in row.platforms}
    assert rows == {"megatron.core.fp8_utils.quantize_param_shard", "megatron.core.optimizer.Adam"}


def test_undo_restores_every_attribute() -> None:
    owners = [torch, torch.cuda, torch.cuda.random, torch.cuda.nvtx, torch.Tensor, torch.nn.Parameter, torch.amp]
    before = [dict(vars(owner)) for owner in owners]
    patcher = Patcher()
    apply_patches(patcher, CpuPlatform(), Phase.EARLY)
    apply_patches(patcher, CpuPlatform(), Phase.IMPORT)
    changed = [dict(vars(owner)) for owner in owners]
    patcher.undo()
    for owner, old, new in zip(owners, before, changed, strict=True):
        assert vars(owner).keys() == old.keys()
        assert all(vars(owner)[name] is value for name, value in old.items()), owner
        if owner is not torch.nn.Parameter:
            assert any(old.get(name) is not value for name, value in new.items()), owner


def test_patcher_removes_what_was_inherited() -> None:
    class Base:
        word = "base"

    class Derived(Base):
        pass

    patcher = Patcher()
    patcher.set(Derived, "word", "ours")
    patcher.undo()
    assert "word" not in vars(Derived)


@pytest.mark.usefixtures("active")
def test_factories_put_cuda_tensors_on_the_platform() -> None:
    for device in ("cuda", "cuda:1", torch.device("cuda"), torch.cuda.current_device()):
        for tensor in (
            torch.tensor([1.0], device=device),
            torch.as_tensor([1.0], device=device),
            torch.zeros(2, device=device),
            torch.ones(2, device=device),
            torch.empty(2, device=device),
            torch.full((2,), 3.0, device=device),
            torch.arange(3, device=device),
            torch.rand(2, device=device),
            torch.randn(2, device=device),
            torch.randint(0, 2, (2,), device=device),
        ):
            assert tensor.device == CPU
    with torch.device("meta"):
        assert torch.zeros(2).device.type == "meta"
    assert torch.zeros(2, device="meta").device.type == "meta"


@pytest.mark.parametrize("name", replacements.FACTORIES)
def test_factories_pass_other_arguments_on(name: str) -> None:
    seen: list[Any] = []
    call = replacements.with_device_keyword(lambda *args, **kwargs: seen.append((args, kwargs)), FakeAccelerator())
    call(1, dtype=torch.float, device="cuda")
    call(2, device="cpu")
    call(3)
    assert seen == [
        ((1,), {"dtype": torch.float, "device": "npu:0"}),
        ((2,), {"device": "cpu"}),
        ((3,), {}),
    ]


@pytest.mark.usefixtures("active")
def test_tensor_methods_speak_cuda() -> None:
    tensor = torch.ones(2)
    assert tensor.cuda() is tensor
    assert tensor.cuda(non_blocking=True).device == CPU
    assert tensor.to("cuda").device == CPU
    assert tensor.to(torch.device("cuda"), torch.bfloat16).dtype == torch.bfloat16
    assert tensor.to(device="cuda", dtype=torch.float64).dtype == torch.float64
    assert torch.nn.Linear(1, 1).cuda().weight.device == CPU
    assert torch.nn.Linear(1, 1).to("cuda").weight.device == CPU
    assert tensor.type() == "torch.cuda.FloatTensor"
    assert torch.nn.Parameter(tensor.bfloat16()).type() == "torch.cuda.BFloat16Tensor"
    assert torch.ones(1, dtype=torch.int64).type() == "torch.LongTensor"
    assert tensor.type(torch.float64).dtype == torch.float64


def test_tensor_to_passes_other_arguments_on() -> None:
    seen: list[Any] = []
    to: Any = replacements.tensor_to(lambda _, *args, **kwargs: seen.append((args, kwargs)), FakeAccelerator())
    to(None, "cuda", torch.float)
    to(None, device="cuda:0")
    to(None, torch.float)
    assert seen == [(("npu:0", torch.float), {}), ((), {"device": "npu:0"}), ((torch.float,), {})]


def test_autocast_decorators_use_the_platform() -> None:
    seen: list[str] = []

    def custom(function: Any = None, *, device_type: str) -> Any:
        seen.append(device_type)
        return function

    wrapped = replacements.with_device_type(custom, FakeAccelerator())
    wrapped(device_type="cuda")
    wrapped(len, device_type="cpu")
    assert seen == ["npu", "cpu"]


@pytest.mark.usefixtures("active")
def test_streams_events_and_devices_work_without_a_device() -> None:
    torch.cuda.set_device(3)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream(device=torch.cuda.current_device())
    with torch.cuda.stream(stream):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        end.record()
    stream.wait_stream(torch.cuda.default_stream())
    torch.cuda.current_stream().wait_event(stream.record_event())
    assert start.elapsed_time(end) >= 0
    assert torch.cuda.is_available() is False


@pytest.mark.usefixtures("active")
def test_seeding_does_not_call_itself() -> None:
    # torch.manual_seed calls torch.cuda.manual_seed_all, which is redirected.
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.cuda.manual_seed(7)
    assert torch.equal(torch.rand(3), expected)
    torch.cuda.manual_seed_all(7)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.usefixtures("active")
def test_rng_tracker_forks_and_returns(caplog: pytest.LogCaptureFixture) -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    torch.manual_seed(5)
    plain = torch.rand(4)
    torch.manual_seed(11)
    forked = torch.rand(4)
    torch.manual_seed(5)
    tracker = CudaRNGStatesTracker()
    tracker.add("other", 11)
    with caplog.at_level(logging.WARNING), tracker.fork("other"):
        assert torch.equal(torch.rand(2), forked[:2])
    with tracker.fork("other"):
        assert torch.equal(torch.rand(2), forked[2:])
    assert torch.equal(torch.rand(4), plain)
    assert not caplog.records


def test_fp8_helper_is_skipped_without_fp8_parameters() -> None:
    calls: list[Any] = []
    helper = replacements.skip_without_params(lambda *args: calls.append(args))
    helper([], [], [], None)
    assert calls == []
    helper(["weight"], [], [], None)
    assert calls == [(["weight"], [], [], None)]


@pytest.mark.usefixtures("active")
def test_predicted_logits_equal_megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy

    from mindspeed_mm.platform import select

    assert VocabParallelCrossEntropy.calculate_predicted_logits is replacements.calculate_predicted_logits
    select.undo()
    original = VocabParallelCrossEntropy.calculate_predicted_logits
    select.activate(CpuPlatform())
    assert original is not replacements.calculate_predicted_logits
    logits = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([[0, 9], [15, 8], [31, 3]])
    highest = logits.max(dim=-1).values
    for first in (0, 8, 24):
        expected = original(logits.clone(), target, highest, first, first + 8)
        found = replacements.calculate_predicted_logits(logits.clone(), target, highest, first, first + 8)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.shape == theirs.shape
            assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("active")
def test_megatron_optimizer_is_fused() -> None:
    from megatron.core import optimizer

    weight = torch.nn.Parameter(torch.ones(3))
    reference = torch.nn.Parameter(torch.ones(3))
    # The arguments that megatron-core 0.16 passes to Apex's optimizer, and those of 0.12.
    ours = optimizer.Adam(params=[weight], lr=0.1, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8, adam_w_mode=True)
    assert isinstance(optimizer.Adam(params=[weight], lr=0.1), torch.optim.AdamW)
    assert getattr(optimizer, "USING_PYTORCH_OPTIMIZER", False) is False
    plain = torch.optim.AdamW([reference], lr=0.1, weight_decay=0.1, betas=(0.9, 0.99), fused=False)
    for _ in range(3):
        weight.grad = reference.grad = torch.tensor([1.0, -2.0, 0.5])
        ours.step()
        plain.step()
    assert ours.defaults["fused"] is True
    torch.testing.assert_close(weight, reference)
    resumed = optimizer.Adam(params=[weight], lr=0.1)
    resumed.load_state_dict(ours.state_dict())
    assert resumed.state[weight]["step"] == 3


def test_other_fused_optimizers_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class FusedAdam:
        __module__ = "apex.optimizers"

    row = next(row for row in PATCHES if row.target == "megatron.core.optimizer.Adam")
    module = SimpleNamespace(Adam=FusedAdam)
    monkeypatch.setattr("mindspeed_mm.platform.patches.import_module", lambda name: module)
    row.apply(Patcher(), CpuPlatform())
    assert module.Adam is FusedAdam


def test_versions_decide_which_rows_apply() -> None:
    fp8 = next(row for row in PATCHES if "quantize" in row.target)
    assert fp8.concerns(CpuPlatform(), "0.12.1")
    assert not fp8.concerns(CpuPlatform(), "0.16.1")
