"""Write the model.json of a Hugging Face Qwen2-VL checkpoint.

    python tools/model_json.py --from-hf DIR [--pp N] [--vp N] [--layout auto]
        [--vision-layers-list 32,0,0,0 --text-layers-list 1,10,10,7]
        [--train-vision] [--train-projector] [--freeze-text] -o model.json

Without lists the stages are dealt when training starts ("auto", balanced by FLOPs). With `--pp N --layout fixed` the
lists that "auto" would choose are written instead, so that they can be edited. Virtual chunks are separated by "/".
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# run as a script, the repository root is not on the path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mindspeed_mm.config import ParallelConfig, Qwen2VLConfig, parse_settings, read_json
from mindspeed_mm.config.qwen2vl_hf import qwen2vl_json_from_hf
from mindspeed_mm.errors import ConfigError, MindSpeedMMError
from mindspeed_mm.plan import StagePlan, Tower

StageList = Sequence[int] | Sequence[Sequence[int]]


def model_json_from_hf(
    hf_config: Mapping[str, Any],
    *,
    vision_layers_list: StageList | str = "auto",
    text_layers_list: StageList | str = "auto",
    freeze_vision: bool = True,
    freeze_projector: bool = True,
    freeze_text: bool = False,
    where: str = "config.json",
) -> dict[str, Any]:
    """The content of a model.json for the model that a Hugging Face `config.json` describes.

    Args:
        hf_config: content of the `config.json`.
        vision_layers_list: `pipeline_num_layers` of the vision tower: a flat or nested list, or "auto".
        text_layers_list: the same for the text decoder.
        freeze_vision: do not train the vision tower; likewise the projector and the text decoder.
        where: the file named in errors.
    Raises:
        ConfigError: the file describes another model, or one with a feature that is not supported.
    """
    content = qwen2vl_json_from_hf(hf_config, where=where)
    text, image = content["text_decoder"], content["image_encoder"]
    text["pipeline_num_layers"] = text_layers_list
    text["freeze"] = freeze_text
    if image is not None:
        image["vision_encoder"]["pipeline_num_layers"] = vision_layers_list
        image["vision_encoder"]["freeze"] = freeze_vision
        image["vision_projector"]["freeze"] = freeze_projector
    parse_settings(Qwen2VLConfig, content, where=where)
    return content


def to_json_text(content: Mapping[str, Any]) -> str:
    """JSON with two spaces of indentation and innermost lists on one line; ends with a newline."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    return re.sub(r"\[[^\[\]{}\"]*\]", lambda match: "[" + " ".join(match.group()[1:-1].split()) + "]", text) + "\n"


def write_model_json(hf_dir: str | Path, output: str | Path, **options: Any) -> Path:
    """Write `output` for the checkpoint in `hf_dir`; options are those of `model_json_from_hf`."""
    path = Path(hf_dir) / "config.json"
    content = model_json_from_hf(read_json(path), where=str(path), **options)
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(to_json_text(content), encoding="utf-8")
    return output


def chosen_lists(hf_config: Mapping[str, Any], pp_size: int, vp_size: int, **freezes: Any) -> tuple[Any, Any]:
    """The vision and text lists that "auto" chooses; flat without virtual chunks."""
    model = parse_settings(Qwen2VLConfig, model_json_from_hf(hf_config, **freezes), where="config.json")
    parallel = ParallelConfig(pp_size=pp_size, vp_size=vp_size, world_size=pp_size)
    plan = StagePlan.build(model, parallel)
    vision, text = ([list(row) for row in plan.lists_of(tower)] for tower in (Tower.VISION, Tower.TEXT))
    return (vision[0], text[0]) if vp_size == 1 else (vision, text)


def stage_list(text: str) -> StageList | str:
    """A list as it is written on the command line: "1,10,10,7", with virtual chunks "0,0,0,1/4,4,4,4", or "auto".

    Raises:
        ConfigError: it is none of these.
    """
    if text == "auto":
        return text
    try:
        chunks = [[int(count) for count in chunk.split(",")] for chunk in text.strip("[]").split("/")]
    except ValueError:
        raise ConfigError("command line", f'{text!r} is not a stage list like 1,10,10,7 or "auto".') from None
    return chunks[0] if len(chunks) == 1 else chunks


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; gives back its exit code."""
    options = _parser().parse_args(argv)
    freezes = {
        "freeze_vision": not options.train_vision,
        "freeze_projector": not options.train_projector,
        "freeze_text": options.freeze_text,
    }
    try:
        lists: tuple[Any, Any] = stage_list(options.vision_layers_list), stage_list(options.text_layers_list)
        if options.layout == "fixed":
            if lists != ("auto", "auto"):
                raise ConfigError("command line", "--layout fixed chooses the lists; leave them out.")
            hf_config = read_json(Path(options.from_hf) / "config.json")
            lists = chosen_lists(hf_config, options.pp, options.vp, **freezes)
        output = write_model_json(
            options.from_hf, options.output, vision_layers_list=lists[0], text_layers_list=lists[1], **freezes
        )
        model = parse_settings(Qwen2VLConfig, read_json(output), where=str(output))
        parallel = ParallelConfig(pp_size=options.pp, vp_size=options.vp, world_size=options.pp)
        print(f"wrote {output}\n{StagePlan.build(model, parallel).table()}")
    except MindSpeedMMError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Write the model.json of a Hugging Face Qwen2-VL checkpoint.")
    parser.add_argument("--from-hf", required=True, metavar="DIR", help="directory with the config.json")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the model.json to write")
    parser.add_argument("--pp", type=int, default=1, metavar="N", help="pipeline size that the plan is shown for")
    parser.add_argument("--vp", type=int, default=1, metavar="N", help="virtual chunks per pipeline rank")
    parser.add_argument(
        "--layout", choices=["auto", "fixed"], default="auto", help='write "auto", or the lists that it chooses'
    )
    parser.add_argument("--vision-layers-list", default="auto", metavar="LIST", help="layers per stage: 32,0,0,0")
    parser.add_argument("--text-layers-list", default="auto", metavar="LIST", help="layers per stage: 1,10,10,7")
    vision = parser.add_mutually_exclusive_group()
    vision.add_argument("--train-vision", action="store_true", help="train the vision tower")
    vision.add_argument("--freeze-vision", action="store_true", help="do not train the vision tower (default)")
    projector = parser.add_mutually_exclusive_group()
    projector.add_argument("--train-projector", action="store_true", help="train the projector")
    projector.add_argument("--freeze-projector", action="store_true", help="do not train the projector (default)")
    parser.add_argument("--freeze-text", action="store_true", help="do not train the text decoder")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
