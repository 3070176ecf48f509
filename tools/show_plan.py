"""Print the stage plan of a model.json: stages, parameters, balance.

python tools/show_plan.py --model configs/qwen2vl/7b/model.json --pp 4 [--vp 1] [--tp 1] [--json]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# run as a script, the repository root is not on the path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mindspeed_mm.config import ParallelConfig, Qwen2VLConfig, load_settings
from mindspeed_mm.errors import MindSpeedMMError
from mindspeed_mm.plan import StagePlan
from mindspeed_mm.plan.dry_run import balance_text, plan_table


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; gives back its exit code."""
    parser = argparse.ArgumentParser(description="Print the stage plan of a model.json.")
    parser.add_argument("--model", required=True, metavar="FILE", help="the model.json")
    parser.add_argument("--pp", type=int, default=1, metavar="N", help="pipeline size")
    parser.add_argument("--vp", type=int, default=1, metavar="N", help="virtual chunks per pipeline rank")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel size")
    parser.add_argument("--json", action="store_true", help="print the plan as stage_plan.json holds it")
    options = parser.parse_args(argv)
    try:
        model = load_settings(Qwen2VLConfig, options.model)
        parallel = ParallelConfig(
            tp_size=options.tp, pp_size=options.pp, vp_size=options.vp, world_size=options.tp * options.pp
        )
        plan = StagePlan.build(model, parallel)
    except MindSpeedMMError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    print(plan.to_json() if options.json else f"{plan_table(model, plan)}\n\n{balance_text(model, plan)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
