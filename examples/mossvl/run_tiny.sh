#!/usr/bin/env bash
# Quick start of MOSS-VL fine-tuning on a CPU, without downloads: a tiny checkpoint learns to say which colour comes first in
# a clip, how many of its scenes show a circle, and the colour and shape of a picture. About two minutes on two cores.
#   bash examples/mossvl/run_tiny.sh [more arguments of mossvl_finetune/train.py]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

PYTHON=${PYTHON:-python}
FOLDER=${FOLDER:-runs/mossvl_tiny}
STEPS=${STEPS:-240}
BATCH_SIZE=${BATCH_SIZE:-16}
TRAIN_CLIPS=${TRAIN_CLIPS:-600}
TEST_CLIPS=${TEST_CLIPS:-60}
SEED=${SEED:-0}

"$PYTHON" tools/make_tiny_mossvl.py "$FOLDER/checkpoint" --seed "$SEED"
"$PYTHON" examples/mossvl/make_clips.py "$FOLDER/data" --train "$TRAIN_CLIPS" --test "$TEST_CLIPS" --seed "$SEED"

echo "--- before training, on clips that are never trained on"
"$PYTHON" examples/mossvl/evaluate.py "$FOLDER/checkpoint" "$FOLDER/data/test.json"

rm -rf "$FOLDER/trained"
"$PYTHON" mossvl_finetune/train.py \
    --model_name_or_path "$FOLDER/checkpoint" \
    --data_path "$FOLDER/data/train.json" \
    --output_dir "$FOLDER/trained" \
    --use_cpu True \
    --tune_vision True --tune_language True --tune_lm_head True \
    --max_steps "$STEPS" --per_device_train_batch_size "$BATCH_SIZE" \
    --learning_rate 1e-3 --lr_scheduler_type cosine --warmup_steps 20 \
    --seed "$SEED" --logging_steps 20 --save_strategy no --report_to none --disable_tqdm True "$@"

echo "--- after training"
"$PYTHON" examples/mossvl/evaluate.py "$FOLDER/trained" "$FOLDER/data/test.json"
