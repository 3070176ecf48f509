#!/usr/bin/env bash
# Fine-tune Qwen2-VL-72B-Instruct on several machines; start it on each of them. Every variable on top can be set from outside;
# arguments go to the training program:
#   bash examples/qwen2vl/finetune_qwen2vl_72b.sh                train; the machines are the lines of HOSTFILE
#   bash examples/qwen2vl/finetune_qwen2vl_72b.sh --dry-run      check everything and show the stage plan, on any machine
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node1 bash examples/qwen2vl/finetune_qwen2vl_72b.sh    without a file
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
cd "$ROOT"
source examples/launch.sh

NPUS_PER_NODE=${NPUS_PER_NODE:-16}
MASTER_PORT=${MASTER_PORT:-6000}
# A job that says NNODES or MASTER_ADDR goes by these; HOSTFILE= (empty) alone means this machine.
if [[ -z "${NNODES:-}${MASTER_ADDR:-}" ]]; then HOSTFILE=${HOSTFILE-examples/qwen2vl/hostfile.txt}; fi

TP=${TP:-2}
PP=${PP:-8}
CP=${CP:-1}
MBS=${MBS:-1}
GRAD_ACC_STEP=${GRAD_ACC_STEP:-96}

# The Hugging Face directory itself, or what mm-convert made of it (./ckpt/mm_path/Qwen2-VL-72B-Instruct).
LOAD_PATH=${LOAD_PATH:-./ckpt/hf_path/Qwen2-VL-72B-Instruct}
SAVE_PATH=${SAVE_PATH:-./save_dir}
LOG_DIR=${LOG_DIR:-logs}
MM_DATA=${MM_DATA:-./configs/qwen2vl/72b/data.json}
MM_MODEL=${MM_MODEL:-./configs/qwen2vl/72b/model.json}
MM_TOOL=${MM_TOOL:-./configs/qwen2vl/tools.json}
SEQ_LENGTH=${SEQ_LENGTH:-1024}
TRAIN_ITERS=${TRAIN_ITERS:-10000}
LR=${LR:-1.0e-5}

case " $* " in *" --dry-run "*) DRY_RUN=1 ;; esac
prepare_launch
if [[ "$DEVICE" == npu ]]; then  # where this size differs from the defaults in mindspeed_mm/platform
    export CPU_AFFINITY_CONF=${CPU_AFFINITY_CONF-2}
    export MULTI_STREAM_MEMORY_REUSE=${MULTI_STREAM_MEMORY_REUSE-2}
    export PYTORCH_NPU_ALLOC_CONF=${PYTORCH_NPU_ALLOC_CONF-expandable_segments:True}
fi

GPT_ARGS=(
    --use-mcore-models
    --tensor-model-parallel-size "$TP"
    --pipeline-model-parallel-size "$PP"
    --context-parallel-size "$CP"
    --context-parallel-algo ulysses_cp_algo
    --micro-batch-size "$MBS"
    --global-batch-size "$GBS"
    --tokenizer-type NullTokenizer
    --vocab-size 152064
    --seq-length "$SEQ_LENGTH"
    --make-vocab-size-divisible-by 1
    --normalization RMSNorm
    --use-fused-rmsnorm
    --swiglu
    --use-fused-swiglu
    --no-masked-softmax-fusion
    --lr "$LR"
    --lr-decay-style cosine
    --lr-warmup-fraction 0.1
    --weight-decay 0
    --clip-grad 0.0
    --adam-beta1 0.9
    --adam-beta2 0.999
    --no-gradient-accumulation-fusion
    --seed 42
    --bf16
    --load "$LOAD_PATH"
    --variable-seq-lengths
    --use-distributed-optimizer
    --reuse-fp32-param
    --use-flash-attn
    --no-load-optim
    --no-load-rng
    --no-save-optim
    --no-save-rng
    --num-workers 8
    --train-iters "$TRAIN_ITERS"
    --distributed-timeout-minutes 20
)
MM_ARGS=(
    --mm-data "$MM_DATA"
    --mm-model "$MM_MODEL"
    --mm-tool "$MM_TOOL"
)
OUTPUT_ARGS=(
    --log-interval 1
    --log-tps
    --save-interval 10000
    --eval-interval 10000
    --eval-iters 5000
    --save "$SAVE_PATH"
    --ckpt-format torch
)

launch pretrain_vlm.py "${GPT_ARGS[@]}" "${MM_ARGS[@]}" "${OUTPUT_ARGS[@]}" --distributed-backend nccl "$@"
