from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.plan import Part, StagePlan, Stream, Tower

from .models import parallel, small_model


@st.composite
def legal_lists(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]]]:
    """Nested vision and text lists that keep every rule; vision may be absent."""
    pp_size, vp_size = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    if pp_size == 1:
        vp_size = 1
    num_stages = pp_size * vp_size
    counts = st.integers(1, 4)
    vision_stages = draw(st.integers(0, num_stages))
    shares_a_stage = vision_stages == num_stages or (vision_stages > 0 and draw(st.booleans()))
    text_start = vision_stages - shares_a_stage
    vision = [draw(counts) if stage < vision_stages else 0 for stage in range(num_stages)]
    text = [draw(counts) if stage >= text_start else 0 for stage in range(num_stages)]
    rows = range(0, num_stages, pp_size)
    return [vision[row : row + pp_size] for row in rows], [text[row : row + pp_size] for row in rows]


def plan_of(lists: tuple[list[list[int]], list[list[int]]], *, is_tied: bool = False) -> StagePlan:
    vision, text = lists
    return StagePlan.from_lists(
        "qwen2vl",
        vision,
        text,
        tp_size=1,
        vision_layers=sum(map(sum, vision)),
        text_layers=sum(map(sum, text)),
        is_tied=is_tied,
    )


@given(legal_lists())
def test_a_plan_covers_each_layer_once_and_in_order(lists: tuple[list[list[int]], list[list[int]]]) -> None:
    plan = plan_of(lists)
    assert [layer for stage in plan.stages for layer in stage.vision] == list(range(plan.vision_layers))
    assert [layer for stage in plan.stages for layer in stage.text] == list(range(plan.text_layers))
    assert all(stage.vision or stage.text for stage in plan.stages)
    plan.check()


@given(legal_lists())
def test_locate_is_the_inverse_of_the_stages(lists: tuple[list[list[int]], list[list[int]]]) -> None:
    plan = plan_of(lists)
    for tower in Tower:
        for stage in plan.stages:
            for local_layer, layer in enumerate(stage.layers(tower)):
                assert plan.locate(tower, layer) == (stage, local_layer)


@given(legal_lists(), st.booleans())
def test_json_gives_the_plan_back(lists: tuple[list[list[int]], list[list[int]]], is_tied: bool) -> None:
    plan = plan_of(lists, is_tied=is_tied)
    again = StagePlan.from_json(plan.to_json())
    assert again == plan
    assert again.difference_from(plan) is None


@given(legal_lists())
def test_lists_of_gives_the_lists_back(lists: tuple[list[list[int]], list[list[int]]]) -> None:
    plan = plan_of(lists)
    assert [list(row) for row in plan.lists_of(Tower.VISION)] == lists[0]
    assert [list(row) for row in plan.lists_of(Tower.TEXT)] == lists[1]


@given(legal_lists())
def test_every_part_stands_beside_its_layer(lists: tuple[list[list[int]], list[list[int]]]) -> None:
    plan = plan_of(lists)
    anchors = {Part.TOKEN_EMBED: (Tower.TEXT, 0), Part.FINAL_NORM: (Tower.TEXT, -1), Part.LM_HEAD: (Tower.TEXT, -1)}
    if plan.vision_layers:
        anchors |= {Part.PATCH_EMBED: (Tower.VISION, 0), Part.PROJECTOR: (Tower.VISION, -1)}
    assert sum(len(stage.parts) for stage in plan.stages) == len(anchors)
    for part, (tower, layer) in anchors.items():
        num_layers = plan.vision_layers if tower is Tower.VISION else plan.text_layers
        assert plan.stage_of(part) == plan.locate(tower, layer % num_layers)[0]


@given(legal_lists())
def test_what_a_stage_sends_is_what_the_next_receives(lists: tuple[list[list[int]], list[list[int]]]) -> None:
    plan = plan_of(lists)
    assert plan.stages[0].inputs == frozenset()
    assert plan.output_of(plan.stages[-1]) is None
    assert plan.previous_of(plan.stages[0]) is None
    for stage, following in pairwise(plan.stages):
        assert plan.next_of(stage) == following
        assert plan.previous_of(following) == stage
        (stream,) = following.inputs
        assert plan.output_of(stage) == stream
        if stage.text:
            assert stream is Stream.TEXT_HIDDEN
        elif Part.PROJECTOR in stage.parts:
            assert stream is Stream.IMAGE_EMBEDS
        else:
            assert stream is Stream.VISION_HIDDEN


@given(legal_lists())
def test_at_follows_the_forward_order(lists: tuple[list[list[int]], list[list[int]]]) -> None:
    plan = plan_of(lists)
    for number, stage in enumerate(plan.stages):
        assert number == stage.vp_stage * plan.pp_size + stage.pp_rank == plan.number_of(stage)
        assert plan.at(stage.pp_rank, stage.vp_stage) is stage
        assert stage in plan.stages_of_rank(stage.pp_rank)


@given(legal_lists())
def test_the_head_is_a_copy_only_away_from_the_embedding(lists: tuple[list[list[int]], list[list[int]]]) -> None:
    plan = plan_of(lists, is_tied=True)
    apart = plan.stage_of(Part.TOKEN_EMBED) != plan.stage_of(Part.LM_HEAD)
    assert [stage for stage in plan.stages if plan.has_head_copy(stage)] == [plan.stages[-1]] * apart
    assert not any(plan_of(lists).has_head_copy(stage) for stage in plan.stages)


def test_a_table_shows_the_plan() -> None:
    model = small_model(vision_layers=32, text_layers=28, vision_lists=[32, 0, 0, 0], text_lists=[1, 10, 10, 7])
    assert StagePlan.build(model, parallel(pp=4)).table() == (
        "stage  pp  vp  vision  text   parts\n"
        "    0   0   0  0-31    0-0    patch_embed, projector, token_embed\n"
        "    1   1   0  -       1-10   -\n"
        "    2   2   0  -       11-20  -\n"
        "    3   3   0  -       21-27  final_norm, lm_head"
    )


def test_vision_may_end_one_stage_before_text() -> None:
    plan = StagePlan.build(small_model(vision_lists=[3, 1, 0], text_lists=[0, 0, 6]), parallel(pp=3))
    assert [stage.inputs for stage in plan.stages] == [
        frozenset(),
        frozenset({Stream.VISION_HIDDEN}),
        frozenset({Stream.IMAGE_EMBEDS}),
    ]
    assert plan.stages[1].parts == {Part.PROJECTOR}


def test_virtual_chunks_continue_on_the_first_rank() -> None:
    model = small_model(
        vision_layers=32,
        text_layers=28,
        vision_lists=[[10, 10, 10, 2], [0] * 4, [0] * 4],
        text_lists=[[0, 0, 0, 1], [4, 4, 4, 4], [4, 3, 2, 2]],
    )
    plan = StagePlan.build(model, parallel(pp=4, vp=3))
    assert plan.at(0, 1).text == range(1, 5)
    assert plan.at(0, 2).text == range(17, 21)
    assert plan.locate(Tower.TEXT, 27) == (plan.at(3, 2), 1)
    assert plan.stage_of(Part.TOKEN_EMBED) is plan.at(3, 0)


def test_lists_have_no_effect_without_a_pipeline() -> None:
    model = small_model(vision_lists=[1, 1, 1], text_lists=[[9], [9]])
    plan = StagePlan.build(model, parallel())
    assert (plan.stages[0].vision, plan.stages[0].text) == (range(4), range(6))
    assert plan.stages[0].parts == frozenset(Part)


def test_a_nested_list_of_one_chunk_is_a_flat_one() -> None:
    nested = StagePlan.build(small_model(vision_lists=[[4, 0]], text_lists=[[1, 5]]), parallel(pp=2))
    assert nested == StagePlan.build(small_model(vision_lists=[4, 0], text_lists=[1, 5]), parallel(pp=2))


def test_a_text_only_model_has_no_vision_parts() -> None:
    plan = StagePlan.build(small_model(vision_layers=0, text_lists=[2, 4]), parallel(pp=2))
    assert plan.stages[0].parts == {Part.TOKEN_EMBED}
    with pytest.raises(KeyError, match="no vision tower"):
        plan.stage_of(Part.PATCH_EMBED)


def test_questions_beyond_the_plan_are_errors() -> None:
    plan = StagePlan.build(small_model(), parallel(pp=2))
    with pytest.raises(IndexError, match="no text layer 6"):
        plan.locate(Tower.TEXT, 6)
    with pytest.raises(IndexError, match=r"no stage \(2, 0\)"):
        plan.at(2)
    with pytest.raises(IndexError, match=r"no stage \(-1, 0\)"):
        plan.at(-1)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"tp": 2}, "tp_size: 1, 2"),
        ({"text_lists": [2, 4]}, "text layers of pp_rank 0, vp_stage 0: 0-0, 0-1"),
        ({"vision_lists": [3, 1], "text_lists": [0, 6]}, "vision layers of pp_rank 0, vp_stage 0: 0-3, 0-2"),
        ({"is_tied": True}, "is_tied: False, True"),
    ],
)
def test_the_first_difference_is_named(change: dict[str, object], expected: str) -> None:
    settings = {"vision_lists": [4, 0], "text_lists": [1, 5], "tp": 1} | change
    base = StagePlan.build(small_model(vision_lists=[4, 0], text_lists=[1, 5]), parallel(pp=2))
    tp = settings.pop("tp")
    other = StagePlan.build(small_model(**settings), parallel(pp=2, tp=tp))  # type: ignore[arg-type]
    assert base.difference_from(other) == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("not json", "this is not a stage plan"),
        ({"format": 2}, "format 2 is not known"),
        ({"pp_size": 3}, "the lists are for 2 x 1 stages, not 3 x 1"),
        ({"vision_lists": [[4, "0"]]}, "layer counts must be whole numbers"),
        ({"text_lists": [[1, 4]]}, "adds up to 5, but num_layers = 6"),
        ({"surprise": 1}, "this is not a stage plan"),
        ({"vision_lists": []}, "is empty"),
    ],
)
def test_a_damaged_plan_file_is_refused(change: str | dict[str, object], expected: str) -> None:
    plan = StagePlan.build(small_model(vision_lists=[4, 0], text_lists=[1, 5]), parallel(pp=2))
    text = change if isinstance(change, str) else json.dumps(json.loads(plan.to_json()) | change)
    with pytest.raises(ConfigError) as caught:
        StagePlan.from_json(text, where="ckpt/stage_plan.json")
    assert expected in str(caught.value)
    assert caught.value.where == "ckpt/stage_plan.json"
