#!/usr/bin/env bash
# From nothing to a fine-tuned Qwen2-VL on a laptop: set up, draw pictures, train a small model on two processes
# (pipeline parallel), export it to Hugging Face form, and ask it about pictures that it has not seen.
#   bash examples/quickstart/run.sh
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
cd "$ROOT"

RUN=${RUN:-runs/quickstart}
TRAIN_ITERS=${TRAIN_ITERS:-600}
LR=${LR:-1.0e-3}
MBS=${MBS:-4}
GBS=${GBS:-16}
SEED=${SEED:-42}
NUM_TRAIN=${NUM_TRAIN:-8000}
NUM_HELD_OUT=${NUM_HELD_OUT:-200}

started=$SECONDS
step() { printf '\n== %s (%d s since the start)\n' "$1" "$((SECONDS - started))"; }

step "1/5 set-up"
VENV="$(bash tools/setup_env.sh | tail -n 1)"
export PATH="$VENV/bin:$PATH" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
cores="$(nproc 2>/dev/null || echo 2)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores >= 8 ? 4 : cores >= 4 ? 2 : 1))}"

step "2/5 a small Qwen2-VL with random weights, and pictures to learn from"
mkdir -p "$RUN"
rm -rf "$RUN/start" "$RUN/pictures" "$RUN/save" "$RUN/trained"
python tools/make_tiny_checkpoint.py "$RUN/start" --tied --seed "$SEED"
python examples/quickstart/make_pictures.py "$RUN/pictures" --train "$NUM_TRAIN" --held-out "$NUM_HELD_OUT"

step "3/5 model.json and data.json"
python tools/model_json.py --from-hf "$RUN/start" --output "$RUN/model.json" --pp 2 \
    --vision-layers-list 4,0 --text-layers-list 2,4 --train-vision --train-projector
sed -e "s#@MODEL@#$RUN/start#" -e "s#@PICTURES@#$RUN/pictures#" examples/quickstart/data.json >"$RUN/data.json"

step "4/5 training on two processes, one pipeline stage each"
DISTRIBUTED_ARGS="--nproc_per_node 2 --nnodes 1 --node_rank 0 --rdzv-backend c10d --rdzv-endpoint localhost:0"
GPT_ARGS="
    --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 2
    --micro-batch-size $MBS
    --global-batch-size $GBS
    --seq-length 512
    --train-iters $TRAIN_ITERS
    --lr $LR
    --lr-decay-style cosine
    --lr-warmup-fraction 0.1
    --weight-decay 0
    --clip-grad 1.0
    --adam-beta1 0.9
    --adam-beta2 0.999
    --seed $SEED
    --num-workers 1
    --use-distributed-optimizer
    --load $RUN/start
"
MM_ARGS="--mm-data $RUN/data.json --mm-model $RUN/model.json --mm-tool configs/qwen2vl/tools.json"
OUTPUT_ARGS="
    --log-interval 20
    --log-tps
    --save-interval $TRAIN_ITERS
    --save $RUN/save
    --save-hf $RUN/trained
    --ckpt-format torch
    --distributed-backend gloo
    --device cpu
"
# shellcheck disable=SC2086
torchrun $DISTRIBUTED_ARGS pretrain_vlm.py $GPT_ARGS $MM_ARGS $OUTPUT_ARGS 2>&1 | tee "$RUN/train.log"

step "5/5 questions about held-out pictures, asked with transformers"
status=0
python examples/quickstart/evaluate.py --data "$RUN/pictures" --before "$RUN/start" --after "$RUN/trained" \
    --loss-plot "$RUN/save/loss.png" --report "$RUN/report.html" || status=$?

cat <<END

Where everything lies:
  $RUN/report.html       accuracies, example pictures and the loss curve: open it in a browser
  $RUN/trained           the fine-tuned model, a Hugging Face directory that transformers loads
  $RUN/start             the same model before training
  $RUN/save              the sharded checkpoint to resume from, metrics.jsonl and loss.png
  $RUN/pictures          the pictures, with train.json, held_out.json and questions.json
  $RUN/model.json        the model settings, data.json beside it the data settings
  $RUN/train.log         what training printed
Done in $((SECONDS - started)) s.
END
exit "$status"
