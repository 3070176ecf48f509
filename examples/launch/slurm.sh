#!/usr/bin/env bash
# Start a recipe on every node of a SLURM job. Submit it from the top of the repository; variables of the recipe come along
# from the shell that submits, arguments go to the training program:
#   LR=5e-6 sbatch --nodes 4 --gres gpu:8 examples/launch/slurm.sh examples/qwen2vl/finetune_qwen2vl_7b.sh --log-params-norm
#SBATCH --job-name=mindspeed_mm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --output=slurm_%j.log
# Ask for a save some minutes before the time limit; it ends with exit code 18.
#SBATCH --signal=TERM@600
set -euo pipefail

fail() {
    printf 'slurm: %s\n' "$@" >&2
    exit 11
}

[[ -n "${SLURM_JOB_NODELIST:-}" ]] || fail "SLURM_JOB_NODELIST is not set: start this script with sbatch."
# SLURM runs a copy of this file from a directory of its own.
cd "${SLURM_SUBMIT_DIR:-.}"
[[ $# -gt 0 && -f "$1" ]] ||
    fail "'${1:-}' is not a recipe in $PWD; submit from the top of the repository:" \
        "sbatch examples/launch/slurm.sh examples/qwen2vl/finetune_qwen2vl_7b.sh"

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export HOSTFILE=
export NNODES="${#nodes[@]}"
export MASTER_ADDR="${MASTER_ADDR:-${nodes[0]}}"
# Two jobs may share a node.
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"
# Without --gres the recipe's own number holds.
NPUS_PER_NODE="${NPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}"
if [[ -n "$NPUS_PER_NODE" ]]; then export NPUS_PER_NODE; fi
# torchrun kills its processes half a minute after it asked them to end; a save may take longer.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-540}"
echo "NNODES=$NNODES MASTER_ADDR=$MASTER_ADDR MASTER_PORT=$MASTER_PORT on ${nodes[*]}"

# --kill-on-bad-exit: a node that failed ends the others at once.
# shellcheck disable=SC2016
exec srun --nodes "$NNODES" --ntasks "$NNODES" --ntasks-per-node 1 --kill-on-bad-exit=1 --export=ALL \
    bash -c 'NODE_RANK="$SLURM_NODEID" exec bash "$@"' recipe "$@"
