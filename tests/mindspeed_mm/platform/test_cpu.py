"""The CPU platform: backend, memory, seeds, precision of products."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mindspeed_mm.platform import cpu
from mindspeed_mm.platform.base import FusedOps
from mindspeed_mm.platform.cpu import CpuPlatform, choose_matmul_precision


@pytest.fixture
def precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_gloo_is_used_and_said() -> None:
    platform = CpuPlatform()
    assert platform.backend_for("gloo") == ("gloo", "")
    assert platform.backend_for("nccl") == (
        "gloo",
        "--distributed-backend nccl: no accelerator here, gloo is used",
    )


def test_plain_facts() -> None:
    platform = CpuPlatform()
    platform.set_device(5)
    assert platform.device == torch.device("cpu")
    assert platform.fused == FusedOps()
    assert platform.attention == "sdpa"
    assert platform.supports_bf16
    memory = platform.memory()
    assert 2**20 < memory.allocated_bytes <= memory.peak_bytes * 2
    platform.synchronize()


def test_random_state_comes_back() -> None:
    platform = CpuPlatform()
    platform.manual_seed(3)
    state = platform.rng_state()
    expected = torch.rand(4)
    platform.set_rng_state(state)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.usefixtures("precision")
def test_faster_products_are_kept_while_they_are_exact() -> None:
    torch.set_float32_matmul_precision("highest")
    choice = choose_matmul_precision()
    assert choice.error < 1e-5
    assert torch.get_float32_matmul_precision() == choice.precision


@pytest.mark.usefixtures("precision")
def test_rounding_products_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def error() -> float:
        return 2e-3 if torch.get_float32_matmul_precision() == "medium" else 3e-7

    monkeypatch.setattr(cpu, "matmul_error", error)
    torch.set_float32_matmul_precision("highest")
    assert choose_matmul_precision() == cpu.MatmulChoice("highest", 3e-7)
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_measure_sees_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    product = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda a, b: product(a.bfloat16().float(), b.bfloat16().float()))
    assert cpu.matmul_error() > 1e-4
