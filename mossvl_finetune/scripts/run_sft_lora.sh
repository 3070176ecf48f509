#!/usr/bin/env bash
# LoRA fine-tuning of MOSS-VL: adapters on the projections of all text layers. Every variable can be set from outside:
#   MODEL=/models/MOSS-VL-Instruct DATA=/data/sft.json OUTPUT=/runs/lora bash mossvl_finetune/scripts/run_sft_lora.sh [more arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

MODEL=${MODEL:?set MODEL to a checkpoint directory or hub name}
DATA=${DATA:-mossvl_finetune/demo/sft_data.json}
OUTPUT=${OUTPUT:-runs/mossvl_lora}
PYTHON=${PYTHON:-python}
NPROC=${NPROC:-1}                     # processes on this machine; more than one uses torchrun
DEEPSPEED=${DEEPSPEED:-}              # e.g. configs/mossvl/ds_config_zero2.json
LEARNING_RATE=${LEARNING_RATE:-1e-4}
EPOCHS=${EPOCHS:-1}
BATCH_SIZE=${BATCH_SIZE:-1}           # samples per process and forward pass
ACCUMULATION=${ACCUMULATION:-8}
MAX_LENGTH=${MAX_LENGTH:-4096}
WORKERS=${WORKERS:-4}
BF16=${BF16:-True}

launcher=("$PYTHON")
if [ "$NPROC" -gt 1 ]; then
    launcher=("$PYTHON" -m torch.distributed.run --nproc_per_node "$NPROC")
fi
extra=()
if [ -n "$DEEPSPEED" ]; then
    extra+=(--deepspeed "$DEEPSPEED")
fi

exec "${launcher[@]}" mossvl_finetune/train.py \
    --model_name_or_path "$MODEL" \
    --data_path "$DATA" \
    --output_dir "$OUTPUT" \
    --lora_enable True --lora_r "${LORA_R:-64}" --lora_alpha "${LORA_ALPHA:-128}" --lora_dropout "${LORA_DROPOUT:-0.0}" \
    --lora_target_modules "${LORA_TARGETS:-q_proj,k_proj,v_proj,o_proj}" \
    --bf16 "$BF16" \
    --per_device_train_batch_size "$BATCH_SIZE" \
    --gradient_accumulation_steps "$ACCUMULATION" \
    --num_train_epochs "$EPOCHS" \
    --learning_rate "$LEARNING_RATE" --lr_scheduler_type cosine --warmup_steps "${WARMUP_STEPS:-0}" \
    --max_length "$MAX_LENGTH" \
    --dataloader_num_workers "$WORKERS" \
    --gradient_checkpointing True \
    --logging_steps 1 --save_steps "${SAVE_STEPS:-500}" --save_total_limit 2 \
    --report_to "${REPORT_TO:-none}" \
    ${extra[@]+"${extra[@]}"} "$@"
