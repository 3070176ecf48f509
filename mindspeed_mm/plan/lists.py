"""From what a model.json says about stages to nested lists: one inner list per virtual chunk, one entry per pipeline rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mindspeed_mm.plan.auto import balanced_lists
from mindspeed_mm.plan.checks import TEXT_KEY, VISION_KEY

if TYPE_CHECKING:
    from mindspeed_mm.config import Qwen2VLConfig

NestedLists = tuple[tuple[int, ...], ...]
Given = tuple[int, ...] | tuple[tuple[int, ...], ...] | str | None


def stage_lists(model: Qwen2VLConfig, pp_size: int, vp_size: int) -> tuple[NestedLists, NestedLists, list[str]]:
    """Vision and text layers per stage, and what keeps the lists of `model` from fitting `pp_size` and `vp_size`.

    The lists are meaningful only when there are no problems. Their sums and order are not checked here.
    """
    encoder = model.image_encoder
    vision = None if encoder is None else encoder.vision_encoder.pipeline_num_layers
    text = model.text_decoder.pipeline_num_layers
    if pp_size == 1:
        problems = (
            [] if vp_size == 1 else ["virtual pipeline chunks need a pipeline: --pipeline-model-parallel-size is 1."]
        )
        return ((model.vision_layers,),), ((model.text_decoder.num_layers,),), problems
    no_layers = ((0,) * pp_size,) * vp_size
    if text == "auto" and (encoder is None or vision == "auto"):
        num_stages = model.vision_layers + model.text_decoder.num_layers
        if pp_size * vp_size > num_stages:
            return (
                no_layers,
                no_layers,
                [
                    f"{pp_size} x {vp_size} stages are more than the {num_stages} layers of the model; every stage needs one."
                ],
            )
        return *balanced_lists(model, pp_size, vp_size), []
    problems = []
    if encoder is not None:
        problems += _form_problems(VISION_KEY, vision, pp_size, vp_size, other=text)
    problems += _form_problems(TEXT_KEY, text, pp_size, vp_size, other=vision)
    if problems:
        return no_layers, no_layers, problems
    return no_layers if encoder is None else _nested(vision), _nested(text), []


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
                f"{name} is for {len(nested)} virtual chunks; pass --virtual-pipeline-model-parallel-size {len(nested)}, "
                "or write one flat list."
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
            f"{name} has {len(nested)} x {len(nested[0])} stages; the product of --virtual-pipeline-model-parallel-size and "
            f"--pipeline-model-parallel-size asks for {vp_size} x {pp_size}."
        ]
    return []


def _nested(given: Given) -> NestedLists:
    assert given is not None and not isinstance(given, str)
    return given if isinstance(given[0], tuple) else (given,)  # type: ignore[return-value]
