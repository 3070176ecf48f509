"""Two hosts, as two network namespaces joined by a cable: the launch scripts find their places, training equals one
process, and a pulled cable ends both sides with the names of who is lost."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.dist.harness import ROOT
from tests.dist.jobs import Workplace, arguments, make_workplace

pytestmark = pytest.mark.slow

CABLE = "mm0"
ADDRESSES = ("10.77.0.1", "10.77.0.2")
RECIPE = """set -euo pipefail
source examples/launch.sh
prepare_launch
launch pretrain_vlm.py "$@"
"""
LAYOUT = ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2")


@dataclass
class Host:
    """A network namespace with one end of the cable."""

    name: str
    address: str

    def start(self, command: list[str], log: Path, **variables: str) -> subprocess.Popen[bytes]:
        own = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "MM_DEVICE": "cpu",
            # The name of this machine leads to an address that the namespaces do not have.
            "GLOO_SOCKET_IFNAME": CABLE,
            "NPUS_PER_NODE": "2",
        }
        with log.open("wb") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                cwd=ROOT,
                env=os.environ | own | variables,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


def ip(*words: str) -> None:
    result = subprocess.run(["ip", *words], capture_output=True, text=True)
    if "not permitted" in result.stderr:
        pytest.skip(f"network namespaces are not allowed here: ip {' '.join(words)}: {result.stderr.strip()}")
    assert result.returncode == 0, f"ip {' '.join(words)}: {result.stderr}"


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    assert shutil.which("ip"), "this test needs the ip command (package iproute2)"
    hosts = [Host(f"mm{os.getpid()}-{number}", address) for number, address in enumerate(ADDRESSES)]
    try:
        for host in hosts:
            ip("netns", "add", host.name)
            ip("-n", host.name, "link", "set", "lo", "up")
        ip("link", "add", CABLE, "netns", hosts[0].name, "type", "veth", "peer", CABLE, "netns", hosts[1].name)
        for host in hosts:
            ip("-n", host.name, "address", "add", f"{host.address}/30", "dev", CABLE)
            ip("-n", host.name, "link", "set", CABLE, "up")
        yield hosts
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True, check=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("hosts"), tied=False)


def start_all(
    hosts: list[Host], directory: Path, command: list[str], **variables: str
) -> list[subprocess.Popen[bytes]]:
    """Start the command on both hosts, with a hostfile of their addresses and no newline at its end."""
    hostfile = directory / "hosts.txt"
    hostfile.write_text("\n".join(ADDRESSES))
    job = {
        "HOSTFILE": str(hostfile),
        "MASTER_PORT": "6000",
        "TP": "2",
        "PP": "2",
        "CP": "1",
        "MBS": "2",
        "GRAD_ACC_STEP": "2",
        "SAVE_PATH": str(directory / "save"),
        "LOG_DIR": str(directory / "logs"),
    }
    return [host.start(command, directory / f"{number}.log", **(job | variables)) for number, host in enumerate(hosts)]


def end(processes: list[subprocess.Popen[bytes]]) -> None:
    """Kill what is left of the sessions that `start_all` began."""
    for process in processes:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        process.wait()


def losses(text: str) -> list[float]:
    return [float(value) for value in re.findall(r"\| loss: (\S+) \|", text)]


def alone(argv: list[str]) -> str:
    environ = os.environ | {"MM_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "pretrain_vlm.py", *argv]
    result = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_two_hosts_learn_what_one_process_learns(hosts: list[Host], place: Workplace, tmp_path: Path) -> None:
    common = ("--train-iters", "6", "--load", str(place.hf), "--calculate-per-token-loss")
    argv = [*arguments(place, place.model((3, 1), (0, 4)), *common, *LAYOUT), "--save", str(tmp_path / "save")]
    script = tmp_path / "recipe.sh"
    script.write_text(RECIPE)
    processes = start_all(hosts, tmp_path, ["bash", str(script), *argv])
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        end(processes)
    logs = [(tmp_path / f"{number}.log").read_text() for number in range(2)]
    assert codes == [0, 0], "\n".join(logs)
    for number, log in enumerate(logs):
        own = f"NODE_ADDR={ADDRESSES[number]} NODE_RANK={number} NNODES=2"
        assert f"MASTER_ADDR={ADDRESSES[0]} {own}" in log
        assert "4 processes: TP 2, PP 2, CP 1, DP 1" in log
    single = losses(alone(arguments(place, place.model((4,), (4,)), *common)))
    both = losses(logs[1])  # the last rank reports
    print(f"one process {single}\ntwo hosts   {both}")
    assert len(both) == 6
    # float32 sums in another order, grown by six updates
    assert both == pytest.approx(single, rel=1e-4)


def test_the_72b_recipe_trains_on_two_hosts(hosts: list[Host], place: Workplace, tmp_path: Path) -> None:
    variables = {
        "MM_MODEL": str(place.model((3, 1), (0, 4))),
        "MM_DATA": str(place.data),
        "LOAD_PATH": str(place.hf),
        "SEQ_LENGTH": "256",
        "TRAIN_ITERS": "3",
    }
    recipe = ["bash", "examples/qwen2vl/finetune_qwen2vl_72b.sh", "--num-workers", "0"]
    processes = start_all(hosts, tmp_path, recipe, **variables)
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        end(processes)
    logs = [(tmp_path / f"{number}.log").read_text() for number in range(2)]
    assert codes == [0, 0], "\n".join(logs)
    assert len(losses(logs[1])) == 3
    assert "Elapsed Time Per iteration" in logs[1]
    assert "Elapsed Time Per iteration" not in logs[0]
    assert (tmp_path / "save/latest_checkpointed_iteration.txt").read_text().strip() == "3"


def test_a_pulled_cable_ends_both_hosts(hosts: list[Host], place: Workplace, tmp_path: Path) -> None:
    common = ("--train-iters", "100000", "--load", str(place.hf), "--distributed-timeout-minutes", "0.3")
    script = tmp_path / "recipe.sh"
    script.write_text(RECIPE)
    argv = arguments(place, place.model((3, 1), (0, 4)), *common, *LAYOUT)
    processes = start_all(hosts, tmp_path, ["bash", str(script), *argv])
    logs = [tmp_path / f"{number}.log" for number in range(2)]
    try:
        deadline = time.monotonic() + 180
        while not re.search(r"iteration +3/", logs[1].read_text()):
            assert time.monotonic() < deadline, logs[1].read_text()
            assert all(process.poll() is None for process in processes), logs[1].read_text()
            time.sleep(0.1)
        ip("-n", hosts[1].name, "link", "set", CABLE, "down")
        started = time.monotonic()
        codes = [process.wait(timeout=150) for process in processes]
        took = time.monotonic() - started
    finally:
        end(processes)
    texts = [log.read_text() for log in logs]
    print(f"both ended {took:.1f} s after the cable was pulled\n", texts[0][-3000:], texts[1][-3000:])
    assert codes == [14, 14], "\n".join(texts)
    assert took < 0.3 * 60 + 60
    assert re.search(r"PeerLostError: rank 2 \(.*\), rank 3 \(.*\) do not answer", texts[0]), texts[0]
    assert "most likely rank 0 or its machine (MASTER_ADDR) is gone" in texts[1]
