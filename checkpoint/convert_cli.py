"""`mm-convert`: the command line of the converter. Nothing heavy is imported before the arguments are known."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jsonargparse import CLI

from checkpoint.options import (
    ExportAdapterConfig,
    HfToMmConfig,
    ImportAdapterConfig,
    MergeConfig,
    MmToHfConfig,
    ResplitConfig,
    VerifyConfig,
)
from mindspeed_mm.errors import MindSpeedMMError

if TYPE_CHECKING:
    from checkpoint.job import Summary


def hf_to_mm(cfg: HfToMmConfig) -> None:
    """Cut a Hugging Face checkpoint into MM shards.

    Args:
        cfg: Settings of the conversion.
    """
    from checkpoint import commands

    _show(commands.hf_to_mm(cfg), cfg.mm_dir)


def mm_to_hf(cfg: MmToHfConfig) -> None:
    """Make a Hugging Face checkpoint of MM shards.

    Args:
        cfg: Settings of the conversion.
    """
    from checkpoint import commands

    _show(commands.mm_to_hf(cfg), cfg.save_hf_dir)


def resplit(cfg: ResplitConfig) -> None:
    """Cut MM shards another way; training saves keep their optimizer state.

    Args:
        cfg: Settings of the conversion.
    """
    from checkpoint import commands

    _show(commands.resplit(cfg), cfg.target_dir)


def verify(cfg: VerifyConfig) -> int:
    """Compare the weights of two checkpoints of any kind; exit code 1 if they differ.

    Args:
        cfg: Settings of the comparison.
    """
    from checkpoint import commands

    comparison = commands.verify(cfg)
    print(comparison.table())
    print("the weights are the same" if comparison.is_same else f"first difference: {comparison.first}")
    return 0 if comparison.is_same else 1


def merge(cfg: MergeConfig) -> None:
    """Merge LoRA adapters into their base.

    Args:
        cfg: Settings of the merge.
    """
    from checkpoint import commands

    _show(commands.merge(cfg), cfg.target_dir)


def export_adapter(cfg: ExportAdapterConfig) -> None:
    """Write MM adapters as a directory that peft loads.

    Args:
        cfg: Settings of the export.
    """
    from checkpoint import commands

    _show(commands.export_adapter(cfg), cfg.adapter_dir)


def import_adapter(cfg: ImportAdapterConfig) -> None:
    """Write the adapters of a peft directory as MM shards.

    Args:
        cfg: Settings of the import.
    """
    from checkpoint import commands

    _show(commands.import_adapter(cfg), cfg.mm_dir)


QWEN2VL: dict[str, str | Callable[..., Any]] = {
    "_help": "Checkpoints of Qwen2-VL.",
    "hf_to_mm": hf_to_mm,
    "mm_to_hf": mm_to_hf,
    "resplit": resplit,
    "verify": verify,
    "merge": merge,
    "export_adapter": export_adapter,
    "import_adapter": import_adapter,
}


def _show(summary: Summary, target: str) -> None:
    for note in summary.notes:
        print(note)
    print(f"{target}: {summary}")


def _wanted(arguments: Sequence[str]) -> dict[str, Any]:
    """Only the command that is asked for, where it is clear: the parsers of all take a tenth of a second to build."""
    match arguments:
        case ["Qwen2VLConverter", command, *_] if callable(QWEN2VL.get(command)):
            return {"Qwen2VLConverter": {"_help": QWEN2VL["_help"], command: QWEN2VL[command]}}
    return {"Qwen2VLConverter": QWEN2VL}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `mm-convert`; the exit code is 0, or that of the error (see mindspeed_mm.errors)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        code = CLI(
            _wanted(arguments),
            args=arguments,
            prog="mm-convert",
            description="Convert checkpoints between Hugging Face directories and MM shards.",
        )
    except MindSpeedMMError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    sys.exit(main())
