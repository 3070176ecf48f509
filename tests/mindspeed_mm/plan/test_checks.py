from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.plan import StagePlan, check_trainable
from mindspeed_mm.plan.checks import input_needs_gradient, layer_list_problems

from .models import parallel, small_model


def problems_of(*, tp: int = 1, pp: int = 4, vp: int = 1, **model: Any) -> list[str]:
    layers = {"vision_layers": 32, "text_layers": 28}
    with pytest.raises(ConfigError) as caught:
        StagePlan.build(small_model(**(layers | model)), parallel(tp=tp, pp=pp, vp=vp))
    return list(caught.value.problems)


def every_pair_of_lists(num_stages: int, most: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    lists = list(product(range(most + 1), repeat=num_stages))
    return product(lists, lists)  # type: ignore[return-value]


def test_the_rules_allow_exactly_the_layouts_that_run_in_order() -> None:
    # A layout is right if the layers, read stage by stage, are all vision layers followed by all text layers, and no
    # stage is empty: then every stage has one neighbour to receive from, and the loss is computed on the last.
    for vision, text in every_pair_of_lists(num_stages=3, most=2):
        order = [kind for v, t in zip(vision, text, strict=True) for kind in "v" * v + "t" * t]
        runs = order == sorted(order, reverse=True) and all(v + t for v, t in zip(vision, text, strict=True))
        runs = runs and "t" in order
        problems = layer_list_problems([vision], [text], sum(vision), max(1, sum(text)))
        assert runs == (not problems), (vision, text, problems)


def test_vision_that_is_not_finished_where_text_starts_is_named() -> None:
    assert problems_of(vision_lists=[30, 2, 0, 0], text_lists=[1, 10, 10, 7]) == [
        "vision is not finished where text starts: text_decoder.pipeline_num_layers starts on stage 0, but "
        "image_encoder.vision_encoder.pipeline_num_layers ends on stage 1. Text may start on stage 1 at the earliest."
    ]


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "vision sum": (
        {"vision_lists": [30, 0, 0, 0], "text_lists": [1, 10, 10, 7]},
        "vision_encoder.pipeline_num_layers = [30, 0, 0, 0] adds up to 30, but num_layers = 32: add 2 layers",
    ),
    "text sum": (
        {"vision_lists": [32, 0, 0, 0], "text_lists": [1, 10, 10, 8]},
        "text_decoder.pipeline_num_layers = [1, 10, 10, 8] adds up to 29, but num_layers = 28: take away 1 layer",
    ),
    "vision length": (
        {"vision_lists": [32, 0, 0], "text_lists": [1, 10, 10, 7]},
        "length of image_encoder.vision_encoder.pipeline_num_layers = [32, 0, 0] must equal "
        "--pipeline-model-parallel-size = 4",
    ),
    "text length": (
        {"vision_lists": [32, 0, 0, 0], "text_lists": [28]},
        "length of text_decoder.pipeline_num_layers = [28] must equal --pipeline-model-parallel-size = 4",
    ),
    "vision missing": (
        {"vision_lists": None, "text_lists": [1, 10, 10, 7]},
        "vision_encoder.pipeline_num_layers is missing, but the pipeline size is 4",
    ),
    "text missing": (
        {"vision_lists": [32, 0, 0, 0], "text_lists": None},
        "text_decoder.pipeline_num_layers is missing, but the pipeline size is 4",
    ),
    "half auto": (
        {"vision_lists": "auto", "text_lists": [1, 10, 10, 7]},
        'vision_encoder.pipeline_num_layers = "auto", but the other tower has a list',
    ),
    "vision starts late": (
        {"vision_lists": [0, 32, 0, 0], "text_lists": [0, 10, 10, 8]},
        "vision starts on stage 1, but pictures enter on stage 0",
    ),
    "vision with a hole": (
        {"vision_lists": [16, 0, 16, 0], "text_lists": [0, 0, 14, 14]},
        "vision has no layer on stage 1 and goes on after that",
    ),
    "text before vision ends": (
        {"vision_lists": [30, 2, 0, 0], "text_lists": [1, 10, 10, 7]},
        "vision is not finished where text starts",
    ),
    "text starts late": (
        {"vision_lists": [32, 0, 0, 0], "text_lists": [0, 0, 14, 14]},
        "text starts on stage 2, but vision ends on stage 0, so that stage 1 would hold nothing",
    ),
    "text ends early": (
        {"vision_lists": [32, 0, 0, 0], "text_lists": [8, 10, 10, 0]},
        "text ends on stage 2, but the loss is computed on the last one, stage 3",
    ),
    "empty stage": (
        {"vision_lists": [32, 0, 0, 0], "text_lists": [8, 0, 10, 10]},
        "stage 1 would hold no layer at all",
    ),
    "text-only starts late": (
        {"vision_layers": 0, "text_lists": [0, 8, 10, 10]},
        "text starts on stage 1, but without vision it must start on stage 0",
    ),
    "nested without chunks": (
        {"vision_lists": [[32, 0, 0, 0], [0] * 4], "text_lists": [[1, 5, 5, 3], [4, 4, 4, 2]]},
        "pass --virtual-pipeline-model-parallel-size 2",
    ),
    "flat with chunks": (
        {"vp": 2, "vision_lists": [32, 0, 0, 0], "text_lists": [1, 10, 10, 7]},
        "is a flat list; 2 virtual chunks need one list per chunk",
    ),
    "wrong number of chunks": (
        {"vp": 3, "vision_lists": [[32, 0, 0, 0], [0] * 4], "text_lists": [[1, 5, 5, 3], [4, 4, 4, 2]]},
        "has 2 x 4 stages; the product of --virtual-pipeline-model-parallel-size and "
        "--pipeline-model-parallel-size asks for 3 x 4",
    ),
    "chunks without pipeline": (
        {"pp": 1, "vp": 2},
        "virtual pipeline chunks need a pipeline",
    ),
    "more stages than layers": (
        {"pp": 8, "vp": 8},
        "8 x 8 stages are more than the 60 layers of the model",
    ),
    "key-value heads": ({"tp": 4}, "text_decoder.num_query_groups = 2 is not divisible by the tensor-parallel size 4"),
    "heads": ({"tp": 3}, "text_decoder.num_attention_heads = 4 is not divisible by the tensor-parallel size 3"),
    "vocabulary": ({"tp": 3}, "text_decoder.vocab_size = 1024 is not divisible by the tensor-parallel size 3"),
    "vision heads": (
        {"tp": 8},
        "vision_encoder.num_attention_heads = 4 is not divisible by the tensor-parallel size 8",
    ),
    "mlp": ({"tp": 5}, "text_decoder.ffn_hidden_size = 256 is not divisible by the tensor-parallel size 5"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_layout_gets_its_own_message(name: str) -> None:
    settings, expected = BROKEN[name]
    problems = problems_of(**settings)
    assert any(expected in problem for problem in problems), problems


def test_no_two_broken_layouts_share_a_message() -> None:
    texts = [expected for _, expected in BROKEN.values()]
    assert len(texts) == len(set(texts)) >= 20


def test_all_problems_are_shown_together() -> None:
    problems = problems_of(tp=4, vision_lists=[0, 30, 0, 0], text_lists=[1, 0, 10, 0])
    beginnings = ["pictures enter", "adds up to 30", "adds up to 11", "not finished", "loss is computed", "divisible"]
    for beginning in beginnings:
        assert any(beginning in problem for problem in problems), beginning


def test_stages_of_chunks_are_named_by_chunk_and_rank() -> None:
    (problem,) = problems_of(vp=2, vision_lists=[[32, 0, 0, 0], [0] * 4], text_lists=[[1, 5, 5, 5], [0, 4, 4, 4]])
    assert problem == "stage 4 (chunk 1 of pipeline rank 0) would hold no layer at all; every stage needs at least one."


def test_the_documented_layouts_are_legal() -> None:
    for vision, text, vp in (
        ([32, 0, 0, 0], [1, 10, 10, 7], 1),
        ([30, 2, 0, 0], [0, 11, 10, 7], 1),
        ([[10, 10, 10, 2], [0] * 4, [0] * 4], [[0, 0, 0, 1], [4, 4, 4, 4], [4, 3, 2, 2]], 3),
    ):
        model = small_model(vision_layers=32, text_layers=28, vision_lists=vision, text_lists=text)
        assert StagePlan.build(model, parallel(pp=4, vp=vp)).pp_size == 4


def trainable(enable_dummy_optimizer: bool = False, **model: Any) -> None:
    settings = {"vision_lists": [3, 1, 0], "text_lists": [0, 1, 5], "freeze_vision": True} | model
    built = small_model(**settings)
    check_trainable(built, StagePlan.build(built, parallel(pp=3)), enable_dummy_optimizer)


def test_a_stage_with_frozen_layers_only_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        trainable()
    text = str(caught.value)
    assert "pipeline rank 0 has nothing to train: it holds only vision layers, and what it holds is frozen" in text
    assert "pass --enable-dummy-optimizer" in text


def test_a_stage_with_frozen_layers_only_may_be_allowed() -> None:
    trainable(enable_dummy_optimizer=True)


def test_training_vision_or_sharing_the_stage_makes_it_trainable() -> None:
    trainable(freeze_vision=False)
    trainable(vision_lists=[4, 0, 0], text_lists=[1, 2, 3])


def test_a_trained_projector_makes_its_stage_trainable() -> None:
    trainable(vision_lists=[4, 0, 0], text_lists=[0, 3, 3])
    with pytest.raises(ConfigError, match="pipeline rank 0"):
        trainable(vision_lists=[4, 0, 0], text_lists=[0, 3, 3], freeze_projector=True)


def test_a_rank_is_trainable_through_another_chunk() -> None:
    model = small_model(
        vision_lists=[[3, 1], [0, 0]], text_lists=[[0, 0], [3, 3]], freeze_vision=True, freeze_projector=True
    )
    check_trainable(model, StagePlan.build(model, parallel(pp=2, vp=2)), enable_dummy_optimizer=False)


def test_a_wholly_frozen_model_is_refused_even_with_a_dummy_optimizer() -> None:
    with pytest.raises(ConfigError, match="there is nothing to train"):
        trainable(enable_dummy_optimizer=True, freeze_projector=True, freeze_text=True)


@pytest.mark.parametrize(
    ("frozen", "needed"),
    [
        (("vision", "projector"), [False, False, False, False, True, True]),
        (("vision",), [False, False, False, True, True, True]),
        (("vision", "text"), [False, False, False, True, True, True]),
        (("projector",), [False, True, True, True, True, True]),
        (("text",), [False, True, True, True, True, True]),
    ],
)
def test_gradients_are_needed_behind_the_first_trained_stage(frozen: tuple[str, ...], needed: list[bool]) -> None:
    model = small_model(
        vision_lists=[[2, 1, 1], [0, 0, 0]],
        text_lists=[[0, 0, 0], [2, 2, 2]],
        **{f"freeze_{part}": True for part in frozen},  # type: ignore[arg-type]
    )
    plan = StagePlan.build(model, parallel(pp=3, vp=2))
    assert [input_needs_gradient(model, plan, stage) for stage in plan.stages] == needed
