#!/usr/bin/env bash
# Train the nano MOSS-VL with DeepSpeed on two CPU processes and compare: plain data parallel, ZeRO-2, and ZeRO-3 with every
# parameter partitioned have to log the same losses.
# DeepSpeed is installed into build/deepspeed when the environment has none; it compiles its CPU communication on first use.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="$(bash tools/setup_env.sh | tail -n 1)"
TARGET=build/deepspeed
WORK="$(mktemp -d)"
trap 'rm -rf "$WORK"' EXIT

if ! "$VENV/bin/python" -c 'import deepspeed' >/dev/null 2>&1; then
    if [[ ! -f "$TARGET/.ready" ]]; then
        rm -rf "$TARGET"
        "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
            --target "$TARGET" "deepspeed==0.19.8" hjson ninja py-cpuinfo msgpack einops >&2
        touch "$TARGET/.ready"
    fi
    export PYTHONPATH="$PWD/$TARGET${PYTHONPATH:+:$PYTHONPATH}" PATH="$PWD/$TARGET/bin:$PATH"
fi
export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1

"$VENV/bin/python" tools/make_tiny_mossvl.py "$WORK/checkpoint" --size nano >/dev/null
# Threshold 0: a model this small would otherwise be kept whole on every rank, and partitioning would go untested.
sed 's/"stage3_param_persistence_threshold": "auto"/"stage3_param_persistence_threshold": 0/' \
    configs/mossvl/ds_config_zero3.json >"$WORK/zero3.json"

run() {  # name, then more arguments
    local name=$1
    shift
    "$VENV/bin/python" -m torch.distributed.run --standalone --nproc_per_node 2 mossvl_finetune/train.py \
        --model_name_or_path "$WORK/checkpoint" --data_path mossvl_finetune/demo/sft_data.json \
        --output_dir "$WORK/$name" --use_cpu True --max_steps 6 --per_device_train_batch_size 1 --learning_rate 1e-3 \
        --gradient_checkpointing True --logging_steps 1 --save_strategy no --report_to none --disable_tqdm True "$@" \
        >"$WORK/$name.log" 2>&1 || { tail -n 40 "$WORK/$name.log" >&2; exit 1; }
    grep -oE "'loss': '?[0-9.]+" "$WORK/$name.log" | grep -oE "[0-9.]+$" | tr '\n' ' ' >"$WORK/$name.losses"
    printf '%-8s %s\n' "$name" "$(cat "$WORK/$name.losses")"
}

run plain
run zero2 --deepspeed configs/mossvl/ds_config_zero2.json
run zero3 --deepspeed "$WORK/zero3.json"
cmp "$WORK/plain.losses" "$WORK/zero2.losses"
cmp "$WORK/plain.losses" "$WORK/zero3.losses"
for name in zero2 zero3; do
    "$VENV/bin/python" - "$WORK/plain/model.safetensors" "$WORK/$name/model.safetensors" <<'PYTHON'
import sys
from safetensors.torch import load_file

ours, theirs = (load_file(path) for path in sys.argv[1:])
assert ours.keys() == theirs.keys()
print(f"largest weight difference: {max((ours[n] - theirs[n]).abs().max().item() for n in ours):.2e}")
PYTHON
done
