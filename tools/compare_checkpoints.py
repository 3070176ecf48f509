"""Compare the weights of two checkpoints, each a Hugging Face or an MM directory; exit code 1 if they differ.

    python tools/compare_checkpoints.py FIRST SECOND [--check-hashes]

For MM directories without stage_plan.json, and for all other options, use `mm-convert Qwen2VLConverter verify`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# run as a script, the repository root is not on the path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoint.convert_cli import main as convert


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; gives back its exit code."""
    parser = argparse.ArgumentParser(description="Compare the weights of two checkpoints.")
    parser.add_argument("first", help="directory of one checkpoint")
    parser.add_argument("second", help="directory of the other")
    parser.add_argument("--check-hashes", action="store_true", help="compare both with their manifest.json, too")
    options = parser.parse_args(argv)
    return convert(
        [
            *("Qwen2VLConverter", "verify", f"--cfg.first_dir={options.first}", f"--cfg.second_dir={options.second}"),
            f"--cfg.check_hashes={str(options.check_hashes).lower()}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
