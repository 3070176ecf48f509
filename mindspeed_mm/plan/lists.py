"""From what a model.json says about stages to nested lists: virtual chunks outside, pipeline ranks inside."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mindspeed_mm.plan.auto import balanced_lists
from mindspeed_mm.plan.checks import TEXT_KEY, VISION_KEY

if TYPE_CHECKING:
    from mindspeed_mm.config import Qwen2VLConfig

NestedLists = tuple[tuple[int, ...], ...]
Given = tuple[int, ...] | tuple[tuple[int, ...], ...] | str | None


def stage_lists(
    model: Qwen2VLConfig, pp_size: int, vp_size: int, problems: list[str]
) -> tuple[NestedLists, NestedLists] | None:
    """Vision and text layers per stage; their sums and order are not checked here.

    Args:
        problems: receives what keeps the lists of `model` from fitting `pp_size` and `vp_size`; the result is
            then None.
    """
    encoder = model.image_encoder
    vision = None if encoder is None else encoder.vision_encoder.pipeline_num_layers
    text = model.text_decoder.pipeline_num_layers
    if pp_size == 1:
        if vp_size > 1:
            problems.append("virtual pipeline chunks need a pipeline, but --pipeline-model-parallel-size is 1.")
            return None
        return ((model.vision_layers,),), ((model.text_decoder.num_layers,),)
    if text == "auto" and (encoder is None or vision == "auto"):
        num_layers = model.vision_layers + model.text_decoder.num_layers
        if pp_size * vp_size > num_layers:
            stages = f"{pp_size} x {vp_size} stages" if vp_size > 1 else f"{pp_size} stages"
            problems.append(f"{stages} are more than the {num_layers} layers of the model; each needs one.")
            return None
        return balanced_lists(model, pp_size, vp_size)
    found = _form_problems(TEXT_KEY, text, pp_size, vp_size, other=vision)
    if encoder is not None:
        found = _form_problems(VISION_KEY, vision, pp_size, vp_size, other=text) + found
    if found:
        problems += found
        return None
    return ((0,) * pp_size,) * vp_size if encoder is None else _nested(vision), _nested(text)


def _form_problems(name: str, given: Given, pp_size: int, vp_size: int, *, other: Given) -> list[str]:
    if given is None:
        return [f'{name} is missing, but the pipeline size is {pp_size}: give a layer count per rank, or write "auto".']
    if isinstance(given, str):
        return [
            f'{name} = "auto", but the other tower has a list ({other}): give both lists, or write "auto" for both.'
        ]
    nested = _nested(given)
    if vp_size == 1:
        if len(nested) > 1:
            return [
                f"{name} is for {len(nested)} virtual chunks; pass --virtual-pipeline-model-parallel-size "
                f"{len(nested)}, or write one flat list."
            ]
        if len(nested[0]) != pp_size:
            return [f"length of {name} = {list(nested[0])} must equal --pipeline-model-parallel-size = {pp_size}."]
        return []
    if not isinstance(given[0], tuple):
        return [
            f"{name} = {list(given)} is a flat list; {vp_size} virtual chunks need one list per chunk, "
            "like [[0, 0, 0, 1], [4, 4, 4, 4]]."
        ]
    if (len(nested), len(nested[0])) != (vp_size, pp_size):
        return [
            f"{name} has {len(nested)} x {len(nested[0])} stages; the product of "
            f"--virtual-pipeline-model-parallel-size and --pipeline-model-parallel-size asks for {vp_size} x {pp_size}."
        ]
    return []


def _nested(given: Given) -> NestedLists:
    """A flat or nested list as a nested one."""
    assert isinstance(given, tuple), given
    return given if isinstance(given[0], tuple) else (given,)
