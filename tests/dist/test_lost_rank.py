"""One process of a job dies or stops: the others say which, where they were, and end with 14 in time."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.dist.harness import ROOT, free_port
from tests.dist.jobs import Workplace, arguments, make_workplace

TRAINING = re.compile(r"iteration +3/")
ENVIRON = {**os.environ, "MM_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("lost"))


@contextmanager
def two_processes(place: Workplace, directory: Path, *extra: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Two pipeline stages in the middle of training; rank 0 holds the store, as torchrun's agent otherwise does."""
    argv = arguments(place, place.model((4, 0), (1, 3)), "--train-iters", "100000", "--load", str(place.hf))
    argv += ["--pipeline-model-parallel-size", "2", *extra]
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    logs = [directory / f"{rank}.log" for rank in range(2)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            command = [sys.executable, str(ROOT / "pretrain_vlm.py"), *argv]
            environ = ENVIRON | job | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, text=True, env=environ)
        processes.append(process)
    try:
        wait_for(TRAINING, logs[1], processes[1])  # the last rank writes the iteration line
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def wait_for(pattern: re.Pattern[str], log: Path, process: subprocess.Popen[str], timeout_s: float = 180) -> None:
    deadline = time.monotonic() + timeout_s
    while not pattern.search(log.read_text()):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


@pytest.mark.parametrize("lost", [1, 0], ids=["last rank", "the rank that holds the store"])
def test_a_killed_rank_is_named_by_the_other(place: Workplace, tmp_path: Path, lost: int) -> None:
    with two_processes(place, tmp_path) as processes:
        processes[lost].kill()
        started = time.monotonic()
        code = processes[1 - lost].wait(timeout=60)
        took = time.monotonic() - started
        text = (tmp_path / f"{1 - lost}.log").read_text()
    assert code == 14, text
    assert took < 20
    if lost == 1:
        assert f", process {processes[1].pid}) does not answer: killed (out of memory?)" in text
        assert "PeerLostError: rank 1 (" in text
    else:
        assert "most likely rank 0 or its machine (MASTER_ADDR) is gone" in text
    assert re.search(r"This process was in iteration \d+, [\w.]+ > .*by peer", text), text
    assert "Traceback" not in text


@pytest.mark.slow
def test_torchrun_leaves_time_for_the_message(place: Workplace, tmp_path: Path) -> None:
    argv = arguments(place, place.model((4, 0), (1, 3)), "--train-iters", "100000", "--load", str(place.hf))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    ]
    command += [str(ROOT / "pretrain_vlm.py"), *argv, "--pipeline-model-parallel-size", "2"]
    log = tmp_path / "log"
    with log.open("w") as file:
        torchrun = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, text=True, env=ENVIRON)
    try:
        wait_for(TRAINING, log, torchrun)
        children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        # torchrun now asks the other one to end, which names the lost one first.
        assert torchrun.wait(timeout=60) == 1
    finally:
        torchrun.terminate()
        torchrun.wait()
    text = log.read_text()
    assert f"process {children[-1]}) does not answer: killed" in text
    assert re.search(r"exitcode *: 14", text), text


def test_a_stopped_rank_is_named_when_the_time_is_over(place: Workplace, tmp_path: Path) -> None:
    with two_processes(place, tmp_path, "--distributed-timeout-minutes", "0.2") as processes:
        processes[1].send_signal(signal.SIGSTOP)
        started = time.monotonic()
        code = processes[0].wait(timeout=60)
        took = time.monotonic() - started
        text = (tmp_path / "0.log").read_text()
    assert code == 14, text
    assert 11 < took < 12 + 20
    assert "PeerLostError: rank 1 (" in text
    assert f", process {processes[1].pid}) does not answer: killed (out of memory?), stopped, hanging" in text
    assert re.search(r"This process was in iteration \d+, [\w.]+ > .*Timed out waiting \d+ms for", text), text
    assert "The time allowed is --distributed-timeout-minutes 0.2" in text
    assert "Traceback" not in text
