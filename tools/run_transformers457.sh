#!/usr/bin/env bash
# Run the MOSS-VL tests on transformers 4.57, the line that the published checkpoints were written with, beside the version that
# the environment has: bash tools/run_transformers457.sh [pytest arguments]
# The packages go to build/transformers457 once and shadow the environment's through PYTHONPATH.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="$(bash tools/setup_env.sh | tail -n 1)"
TARGET=build/transformers457

if [[ ! -f "$TARGET/.ready" ]]; then
    rm -rf "$TARGET"
    # --no-deps: torch, numpy and the rest come from the environment.
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$TARGET" \
        "transformers==4.57.3" "tokenizers==0.22.2" "huggingface_hub==0.36.2" \
        requests urllib3 certifi charset-normalizer idna >&2
    touch "$TARGET/.ready"
fi
export PYTHONPATH="$PWD/$TARGET${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
"$VENV/bin/python" -c 'import transformers; assert transformers.__version__.startswith("4.57"), transformers.__version__'
exec "$VENV/bin/python" -m pytest tests/mindspeed_mm/models/mossvl tests/mindspeed_mm/data/mossvl tests/mossvl_finetune "$@"
