#!/usr/bin/env bash
# Set up the environment and run the tests: bash tests/run.sh [pytest arguments]
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
VENV="$(bash tools/setup_env.sh | tail -n 1)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
exec "$VENV/bin/python" -m pytest "$@"
