"""The launch scripts assemble the arguments, find their place among the nodes, and sum up the log.

`torchrun`, `hostname`, `getent` and `nvidia-smi` are stand-ins on PATH: the scripts are tested here, not training.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from mindspeed_mm.config import parse_command_line
from tests.examples.workplace import RECIPES, ROOT, Workplace

PATIENT_TORCHRUN = """#!/usr/bin/env bash
trap 'sleep 0.5; echo saved; echo "InterruptedRunError: stopped by signal SIGTERM"; exit 1' TERM
echo training
for _ in {1..300}; do sleep 0.1; done
"""


@pytest.mark.parametrize(
    ("size", "devices", "tp", "pp", "batch"), [("2b", 8, 1, 1, 192), ("7b", 8, 1, 4, 192), ("72b", 16, 2, 8, 96)]
)
def test_the_recipe_is_a_command_line_that_parses(
    workplace: Workplace, size: str, devices: int, tp: int, pp: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = workplace.run(size, "--log-params-norm", HOSTFILE="")
    assert result.returncode == 0, result.stderr
    arguments = workplace.arguments()
    entry = arguments.index("pretrain_vlm.py")
    launcher = f"--nproc_per_node {devices} --nnodes 1 --node_rank 0 --master_addr localhost --master_port 6000"
    assert " ".join(arguments[:entry]) == launcher
    monkeypatch.chdir(ROOT)
    run = parse_command_line(arguments[entry + 1 :], {"WORLD_SIZE": str(devices)})
    assert (run.parallel.tp_size, run.parallel.pp_size, run.parallel.cp_size) == (tp, pp, 1)
    assert run.runtime.distributed_timeout_minutes == 20
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


@pytest.mark.parametrize("arguments", [(), ("--dry-run",)])
def test_a_missing_hostfile_is_named(workplace: Workplace, arguments: tuple[str, ...]) -> None:
    result = workplace.run("7b", *arguments, HOSTFILE="nowhere/hosts.txt")
    assert result.returncode == 11
    assert "HOSTFILE=nowhere/hosts.txt does not exist" in result.stderr


def test_a_number_of_nodes_that_the_hostfile_does_not_have_is_refused(workplace: Workplace) -> None:
    result = workplace.run("7b", HOSTFILE=workplace.hostfile("10.0.0.1\n10.0.0.2"), NNODES="3")
    assert result.returncode == 11
    assert "NNODES=3, but" in result.stderr
    assert "names 2 hosts" in result.stderr


def test_the_largest_recipe_takes_its_own_hostfile(workplace: Workplace) -> None:
    result = workplace.run("72b")
    assert result.returncode == 11
    assert (
        "none of the 2 hosts in examples/qwen2vl/hostfile.txt is this machine: 192.0.2.11 192.0.2.12" in result.stderr
    )


def test_variables_of_a_scheduler_go_before_the_default_hostfile(workplace: Workplace) -> None:
    assert workplace.run("72b", NNODES="3", NODE_RANK="2", MASTER_ADDR="node7").returncode == 0
    assert "--nnodes 3 --node_rank 2 --master_addr node7" in " ".join(workplace.arguments())


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"NNODES": "2"}, "NNODES=2, but NODE_RANK='' and MASTER_ADDR=''"),
        ({"NNODES": "2", "NODE_RANK": "1"}, "NODE_RANK='1' and MASTER_ADDR=''"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "node7"}, "NODE_RANK=2 with NNODES=2: it goes from 0 to 1"),
        ({"NNODES": "two"}, "NNODES=two is not a number of machines"),
    ],
)
def test_variables_of_a_scheduler_have_to_be_complete(
    workplace: Workplace, variables: dict[str, str], expected: str
) -> None:
    result = workplace.run("72b", **variables)
    assert result.returncode == 11
    assert expected in result.stderr


@pytest.mark.parametrize(("variables", "processes"), [({}, 32), ({"NNODES": "4"}, 64), ({"HOSTFILE": ""}, 16)])
def test_a_dry_run_needs_no_place_among_the_nodes(
    workplace: Workplace, variables: dict[str, str], processes: int
) -> None:
    path = f"{Path(sys.executable).parent}:{workplace.environ()['PATH']}"
    result = workplace.run("72b", "--dry-run", PATH=path, **variables)
    assert result.returncode == 0, result.stderr
    assert f"{processes} processes: TP 2, PP 8, CP 1, DP {processes // 16}" in result.stdout
    assert "72-79" in result.stdout or "71-79" in result.stdout, "the layers of the last stage"
    assert not (workplace.directory / "arguments").exists()


@pytest.mark.parametrize(("own", "affinity"), [({}, "2"), ({"CPU_AFFINITY_CONF": "0"}, "0")])
def test_the_largest_recipe_sets_what_npus_need(workplace: Workplace, own: dict[str, str], affinity: str) -> None:
    npu = {"MM_DEVICE": "npu", "ASCEND_ENV": "/nowhere", "HOSTFILE": "", "NPUS_PER_NODE": "0"} | own
    assert workplace.run("72b", **npu).returncode == 0
    environment = (workplace.directory / "environment").read_text().splitlines()
    assert f"CPU_AFFINITY_CONF={affinity}" in environment
    assert "MULTI_STREAM_MEMORY_REUSE=2" in environment
    assert "PYTORCH_NPU_ALLOC_CONF=expandable_segments:True" in environment


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
    [
        ("", 1),
        ("Root Cause (first observed failure):\n[0]:\n  exitcode  : 13 (pid: 77)\n", 13),
        ("[rank 1] InterruptedRunError: stopped by signal SIGTERM after iteration 7, saved to save.\n", 18),
    ],
)
def test_a_failed_run_fails_the_script(workplace: Workplace, report: str, code: int) -> None:
    (workplace.directory / "output").write_text(report)
    result = workplace.run("2b", STUB_STATUS="1")
    assert result.returncode == code
    assert f"training failed with exit code {code}; the log is" in result.stderr


def test_a_killed_process_is_a_lost_one(workplace: Workplace) -> None:
    report = "Failures:\n[1]:\n  exitcode  : 14 (pid: 78)\nRoot Cause:\n[0]:\n  exitcode  : -9 (pid: 77)\n"
    (workplace.directory / "output").write_text(report)
    result = workplace.run("2b", STUB_STATUS="1")
    assert result.returncode == 14
    assert "signal 9 ended a process of this machine" in result.stderr


def test_a_request_to_end_goes_on_to_torchrun(workplace: Workplace) -> None:
    workplace.stub("torchrun", PATIENT_TORCHRUN)
    command = ["bash", str(RECIPES["2b"])]
    with subprocess.Popen(command, env=workplace.environ(), cwd="/", stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line == "training\n":
                process.terminate()
        assert process.wait(timeout=30) == 18
    (log,) = (workplace.directory / "logs").glob("*.log")
    assert log.read_text() == "training\nsaved\nInterruptedRunError: stopped by signal SIGTERM\n"


def test_machines_with_one_directory_write_logs_of_their_own(workplace: Workplace) -> None:
    workplace.run("7b", NNODES="2", NODE_RANK="1", MASTER_ADDR="node7")
    (log,) = (workplace.directory / "logs").iterdir()
    assert log.name.endswith("_node1.log")


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
