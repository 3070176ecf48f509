"""The launch scripts assemble the arguments, find their place among the nodes, and sum up the log.

`torchrun`, `hostname`, `getent` and `nvidia-smi` are stand-ins on PATH: the scripts are tested here, not training.
"""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from mindspeed_mm.config import parse_command_line

ROOT = Path(__file__).parents[2]
RECIPES = {size: ROOT / f"examples/qwen2vl/finetune_qwen2vl_{size}.sh" for size in ("2b", "7b")}

TORCHRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$STUB_DIR/arguments"
env >"$STUB_DIR/environment"
if [[ -f "$STUB_DIR/output" ]]; then cat "$STUB_DIR/output"; fi
exit "${STUB_STATUS:-0}"
"""
HOSTNAME = """#!/usr/bin/env bash
case "${1:-}" in
    -I) echo "192.168.7.12 10.0.0.2 " ;;
    -f) echo "node12.cluster.local" ;;
    *) echo "node12" ;;
esac
"""
GETENT = """#!/usr/bin/env bash
case "$2" in
    trainer-b) echo "10.0.0.2 STREAM trainer-b" ;;
    trainer-a) echo "10.0.0.1 STREAM trainer-a" ;;
    *) exit 2 ;;
esac
"""


class Workplace:
    """A directory with the stand-ins, where the scripts log and save."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.stub("torchrun", TORCHRUN)
        self.stub("hostname", HOSTNAME)
        self.stub("getent", GETENT)

    def stub(self, name: str, text: str) -> None:
        path = self.directory / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def run(self, size: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        own = {
            "PATH": f"{self.directory / 'bin'}:{os.environ['PATH']}",
            "STUB_DIR": str(self.directory),
            "LOG_DIR": str(self.directory / "logs"),
            "SAVE_PATH": str(self.directory / "save"),
            "MM_DEVICE": "cpu",
        }
        kept = {name: value for name, value in os.environ.items() if name in ("HOME", "LANG", "TMPDIR")}
        return subprocess.run(
            ["bash", str(RECIPES[size]), *arguments],
            env=kept | own | variables,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=60,
        )

    def arguments(self) -> list[str]:
        return (self.directory / "arguments").read_text().splitlines()

    def hostfile(self, text: str) -> str:
        path = self.directory / "hosts.txt"
        path.write_text(text)
        return str(path)


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


@pytest.mark.parametrize(("size", "pp", "batch"), [("2b", 1, 192), ("7b", 4, 192)])
def test_the_recipe_is_a_command_line_that_parses(
    workplace: Workplace, size: str, pp: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = workplace.run(size, "--log-params-norm")
    assert result.returncode == 0, result.stderr
    arguments = workplace.arguments()
    entry = arguments.index("pretrain_vlm.py")
    launcher = "--nproc_per_node 8 --nnodes 1 --node_rank 0 --master_addr localhost --master_port 6000"
    assert " ".join(arguments[:entry]) == launcher
    monkeypatch.chdir(ROOT)
    run = parse_command_line(arguments[entry + 1 :], {"WORLD_SIZE": "8"})
    assert (run.parallel.tp_size, run.parallel.pp_size, run.parallel.cp_size) == (1, pp, 1)
    assert run.training.global_batch_size == batch
    assert run.training.bf16
    assert run.optimizer.lr == 1e-5
    assert run.logging.log_params_norm, "arguments of the script go to the program"


def test_variables_override_the_recipe(workplace: Workplace) -> None:
    changes = {"TP": "2", "PP": "2", "NPUS_PER_NODE": "4", "GRAD_ACC_STEP": "3", "LR": "2e-5", "MASTER_PORT": "6123"}
    assert workplace.run("7b", **changes).returncode == 0
    joined = " ".join(workplace.arguments())
    for expected in (
        "--nproc_per_node 4",
        "--master_port 6123",
        "--tensor-model-parallel-size 2",
        "--pipeline-model-parallel-size 2",
        "--global-batch-size 3",
        "--lr 2e-5",
    ):
        assert expected in joined


def test_the_environment_of_the_device_is_set(workplace: Workplace) -> None:
    workplace.run("2b", MM_DEVICE="cuda", NPUS_PER_NODE="2", PATH=_with_gpus(workplace, 2))
    environment = (workplace.directory / "environment").read_text()
    assert "CUDA_DEVICE_MAX_CONNECTIONS=1\n" in environment
    assert "HCCL_CONNECT_TIMEOUT" not in environment


def test_more_processes_than_devices_are_refused(workplace: Workplace) -> None:
    result = workplace.run("2b", MM_DEVICE="", PATH=_with_gpus(workplace, 2))
    assert result.returncode == 11
    assert "NPUS_PER_NODE=8, but this machine has 2 cuda device(s)" in result.stderr


def test_a_world_that_no_replica_divides_is_refused(workplace: Workplace) -> None:
    result = workplace.run("7b", NPUS_PER_NODE="6")
    assert result.returncode == 2
    assert "6 processes (NPUS_PER_NODE=6 x NNODES=1) cannot be divided into replicas of 4" in result.stderr


@pytest.mark.parametrize(
    "text",
    [
        "10.0.0.1\n10.0.0.2",
        "10.0.0.1\n10.0.0.2\n",
        "# two machines\n10.0.0.1 slots=8\r\n\n  node12  # this one\n",
        "node11.cluster.local\nNODE12.cluster.local",
        "trainer-a\ntrainer-b",
    ],
    ids=["no last newline", "addresses", "comments", "names", "names that resolve"],
)
def test_a_hostfile_gives_rank_and_master(workplace: Workplace, text: str) -> None:
    result = workplace.run("7b", HOSTFILE=workplace.hostfile(text))
    assert result.returncode == 0, result.stderr
    joined = " ".join(workplace.arguments())
    assert f"--nnodes 2 --node_rank 1 --master_addr {text.replace('# two machines', '').split()[0]}" in joined
    assert "--global-batch-size 384" in joined, "four replicas on sixteen devices"
    assert "NODE_RANK=1 NNODES=2" in result.stdout


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.0.0.7\n10.0.0.8\n", "none of the 2 hosts in"),
        ("10.0.0.7\n10.0.0.7\n", "names a host twice: 10.0.0.7"),
        ("10.0.0.2\nnode12\n", "names this machine twice: 10.0.0.2 and node12"),
        ("# nothing yet\n", "names no host"),
    ],
)
def test_a_hostfile_that_does_not_fit_says_why(workplace: Workplace, text: str, expected: str) -> None:
    result = workplace.run("7b", HOSTFILE=workplace.hostfile(text))
    assert result.returncode == 11
    assert expected in result.stderr
    assert not (workplace.directory / "arguments").exists()


def test_a_machine_that_is_not_listed_is_told_its_names(workplace: Workplace) -> None:
    result = workplace.run("7b", HOSTFILE=workplace.hostfile("10.9.9.9\n"))
    assert "This machine answers to: 10.0.0.2 192.168.7.12 node12 node12.cluster.local" in result.stderr
    assert "NODE_RANK" in result.stderr


def test_a_node_rank_from_outside_needs_no_name(workplace: Workplace) -> None:
    hostfile = workplace.hostfile("10.9.9.8\n10.9.9.9")
    assert workplace.run("7b", HOSTFILE=hostfile, NODE_RANK="0").returncode == 0
    assert "--nnodes 2 --node_rank 0 --master_addr 10.9.9.8" in " ".join(workplace.arguments())
    result = workplace.run("7b", HOSTFILE=hostfile, NODE_RANK="2")
    assert result.returncode == 11
    assert "it has 2 hosts" in result.stderr


def test_a_missing_hostfile_is_named(workplace: Workplace) -> None:
    result = workplace.run("7b", HOSTFILE="nowhere/hosts.txt")
    assert result.returncode == 11
    assert "HOSTFILE=nowhere/hosts.txt does not exist" in result.stderr


def test_the_log_is_kept_and_closed(workplace: Workplace) -> None:
    (workplace.directory / "output").write_text("hello from training\n")
    (workplace.directory / "save" / "release").mkdir(parents=True)
    (workplace.directory / "save" / "release" / "shard.pt").write_text("x")
    result = workplace.run("2b")
    assert result.returncode == 0
    (log,) = (workplace.directory / "logs").glob("train_*_*.log")
    assert log.read_text() == "hello from training\n"
    assert stat.S_IMODE(log.stat().st_mode) == 0o440
    assert stat.S_IMODE((workplace.directory / "save" / "release").stat().st_mode) == 0o750
    assert stat.S_IMODE((workplace.directory / "save" / "release" / "shard.pt").stat().st_mode) == 0o640
    assert "Elapsed Time" not in result.stdout, "the log of a node without the last rank shows no speed"


@pytest.mark.parametrize(
    ("report", "code"),
    [("", 1), ("Root Cause (first observed failure):\n[0]:\n  exitcode  : 13 (pid: 77)\n", 13)],
)
def test_a_failed_run_fails_the_script(workplace: Workplace, report: str, code: int) -> None:
    (workplace.directory / "output").write_text(report)
    result = workplace.run("2b", STUB_STATUS="1")
    assert result.returncode == code
    assert f"training failed with exit code {code}; the log is" in result.stderr


def test_the_speed_is_averaged_over_the_iterations_51_to_150(workplace: Workplace) -> None:
    def line(iteration: int) -> str:
        elapsed = 1000.0 if 51 <= iteration <= 150 else 77777.0
        return (
            f" [2026-01-02 03:04:05] iteration {iteration:8d}/{200:8d} | consumed samples: {iteration * 192:12d} |"
            f" elapsed time per iteration (ms): {elapsed + iteration % 2:.1f} | learning rate: {1e-5:.6E} |"
            f" global batch size: {192:5d} | tokens per sample: {500 + iteration % 2:.6E} | loss: {1.5:.6E} |\n"
        )

    (workplace.directory / "output").write_text("".join(line(i) for i in range(1, 201)))
    result = workplace.run("2b")
    assert result.stdout.splitlines()[-3:] == [
        "Elapsed Time Per iteration: 1000.5",
        "Average Samples per Second: 191.904",
        "Consumed Tokens per Second: 96047.952",
    ]


def test_a_missing_torchrun_is_named(workplace: Workplace) -> None:
    (workplace.directory / "bin" / "torchrun").unlink()
    result = workplace.run("2b", PATH=f"{workplace.directory / 'bin'}:/usr/bin:/bin")
    assert result.returncode == 11
    assert "torchrun is not on PATH" in result.stderr


def _with_gpus(workplace: Workplace, number: int) -> str:
    rows = "".join(f"echo 'GPU {i}: a card (UUID: GPU-{i})'\n" for i in range(number))
    workplace.stub("nvidia-smi", f"#!/usr/bin/env bash\n{rows}")
    return f"{workplace.directory / 'bin'}:{os.environ['PATH']}"
