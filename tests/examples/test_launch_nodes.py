"""SLURM and Kubernetes start a recipe on every node: what they run is run here, with stand-ins for their commands."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.examples.workplace import ROOT, Workplace

SLURM = ROOT / "examples/launch/slurm.sh"
MANIFEST = ROOT / "examples/launch/kubernetes.yaml"
RECIPE = "examples/qwen2vl/finetune_qwen2vl_72b.sh"

SCONTROL = """#!/usr/bin/env bash
[[ "$*" == "show hostnames node[3-5]" ]] || exit 9
printf 'node%s\\n' 3 4 5
"""
# Runs the task of node 1 only, as the daemon of that node would.
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$STUB_DIR/srun"
while [[ "$1" == --* ]]; do
    case "$1" in
        --nodes | --ntasks | --ntasks-per-node) shift 2 ;;
        *) shift ;;
    esac
done
SLURM_NODEID=1 exec "$@"
"""


def submit(workplace: Workplace, *arguments: str, **variables: str) -> Any:
    workplace.stub("scontrol", SCONTROL)
    workplace.stub("srun", SRUN)
    job = {"SLURM_JOB_NODELIST": "node[3-5]", "SLURM_JOB_ID": "123456", "SLURM_SUBMIT_DIR": str(ROOT)}
    # SLURM runs a copy.
    copy = workplace.directory / "slurm_script"
    copy.write_text(SLURM.read_text())
    return workplace.start(["bash", str(copy), *arguments], **(job | variables))


def test_slurm_starts_the_recipe_once_a_node(workplace: Workplace) -> None:
    result = submit(workplace, RECIPE, "--log-params-norm", SLURM_GPUS_ON_NODE="16", GRAD_ACC_STEP="2")
    assert result.returncode == 0, result.stderr
    srun = (workplace.directory / "srun").read_text()
    assert srun.startswith("--nodes\n3\n--ntasks\n3\n--ntasks-per-node\n1\n--kill-on-bad-exit=1\n")
    joined = " ".join(workplace.arguments())
    assert "--nproc_per_node 16 --nnodes 3 --node_rank 1 --master_addr node3 --master_port 23456" in joined
    assert "--global-batch-size 6" in joined, "three replicas"
    assert joined.endswith("--log-params-norm")


@pytest.mark.parametrize(
    ("arguments", "variables", "expected"),
    [
        ((), {}, "'' is not a recipe in"),
        (("nowhere.sh",), {}, "'nowhere.sh' is not a recipe in"),
        ((RECIPE,), {"SLURM_JOB_NODELIST": ""}, "start this script with sbatch"),
    ],
)
def test_slurm_script_says_what_is_missing(
    workplace: Workplace,
    arguments: tuple[str, ...],
    variables: dict[str, str],
    expected: str,
) -> None:
    result = submit(workplace, *arguments, **variables)
    assert result.returncode == 11
    assert expected in result.stderr
    assert not (workplace.directory / "srun").exists()


def test_slurm_script_ends_as_the_recipe_does(workplace: Workplace) -> None:
    (workplace.directory / "output").write_text("  exitcode  : 13 (pid: 77)\n")
    assert submit(workplace, RECIPE, STUB_STATUS="1").returncode == 13


def test_kubernetes_starts_the_recipe_in_every_pod(workplace: Workplace) -> None:
    _, job = yaml.safe_load_all(MANIFEST.read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    variables = {}
    for row in container["env"]:
        # The index of the pod is the only value that the cluster fills in.
        index = row.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
        assert index in (None, "metadata.annotations['batch.kubernetes.io/job-completion-index']")
        variables[row["name"]] = "1" if index else row["value"]
    result = workplace.start([*container["command"], *container["args"]], cwd=ROOT, **local(workplace, variables))
    assert result.returncode == 0, result.stderr
    nodes = job["spec"]["completions"]
    expected = f"--nproc_per_node 8 --nnodes {nodes} --node_rank 1 --master_addr mindspeed-mm-0.mindspeed-mm"
    assert " ".join(workplace.arguments()).startswith(f"{expected} --master_port 6000 pretrain_vlm.py")


def local(workplace: Workplace, variables: dict[str, str]) -> dict[str, str]:
    """The variables of a pod, with the directory of this test for its volume."""
    return {name: value.replace("/data", str(workplace.directory)) for name, value in variables.items()}


def test_the_manifest_agrees_with_itself() -> None:
    service, job = yaml.safe_load_all(MANIFEST.read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    env = {row["name"]: row.get("value") for row in container["env"]}
    assert (job["kind"], spec["completionMode"]) == ("Job", "Indexed")
    assert spec["completions"] == spec["parallelism"] == int(env["NNODES"])
    # Pod 0 of an Indexed Job is reachable as JOB-0.SUBDOMAIN, if a headless service of that name selects it.
    assert env["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
    ports = {row["port"] for row in service["spec"]["ports"]}
    assert ports == {row["containerPort"] for row in container["ports"]} == {int(env["MASTER_PORT"])}
    assert int(env["NPUS_PER_NODE"]) in container["resources"]["limits"].values()
    assert pod["restartPolicy"] == "Never"
    assert {row["name"] for row in container["volumeMounts"]} == {row["name"] for row in pod["volumes"]}
    assert (ROOT / container["command"][1]).is_file()
    assert int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
