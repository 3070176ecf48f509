from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindspeed_mm.config import Qwen2VLConfig, load_settings
from mindspeed_mm.plan import StagePlan, Tower, check_trainable
from mindspeed_mm.plan.auto import balanced_lists, best_cuts
from mindspeed_mm.plan.dry_run import balance, rank_work
from mindspeed_mm.plan.flops import SampleShape, forward_flops, training_flops

from ..config.launch import FILES
from .models import parallel, small_model


def slowest(costs: list[float], cuts: list[int] | tuple[int, ...]) -> float:
    return max(sum(costs[start:end]) for start, end in pairwise(cuts))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=9), st.data())
def test_the_cuts_are_the_best_of_all(costs: list[int], data: st.DataObject) -> None:
    num_stages = data.draw(st.integers(1, len(costs)))
    cuts = best_cuts(costs, num_stages, lambda stage, end: True)
    inner = combinations(range(1, len(costs)), num_stages - 1)
    everything = [(0, *middle, len(costs)) for middle in inner]
    assert tuple(cuts) in everything
    assert slowest(costs, cuts) == min(slowest(costs, other) for other in everything)  # type: ignore[arg-type]


def test_equal_layers_are_dealt_evenly() -> None:
    assert best_cuts([1.0] * 10, 4, lambda stage, end: True) in ([0, 3, 6, 8, 10], [0, 2, 4, 7, 10], [0, 2, 5, 8, 10])


@pytest.mark.parametrize(("pp", "vp"), [(2, 1), (3, 1), (5, 1), (2, 2), (3, 3)])
@pytest.mark.parametrize("freeze_vision", [True, False])
@pytest.mark.parametrize("freeze_projector", [True, False])
@pytest.mark.parametrize("vision_layers", [0, 4])
def test_auto_gives_a_legal_plan_that_trains_on_every_rank(
    pp: int, vp: int, freeze_vision: bool, freeze_projector: bool, vision_layers: int
) -> None:
    model = small_model(
        vision_layers=vision_layers, text_layers=9, freeze_vision=freeze_vision, freeze_projector=freeze_projector
    )
    plan = StagePlan.build(model, parallel(pp=pp, vp=vp))
    check_trainable(model, plan, enable_dummy_optimizer=False)


def test_auto_beats_the_shipped_layout_of_7b() -> None:
    model = load_settings(Qwen2VLConfig, FILES / "model_7b.json", [])
    shape = SampleShape()
    shipped = StagePlan.build(model, parallel(pp=4))
    vision, text = balanced_lists(model, 4)
    chosen = StagePlan.from_lists("qwen2vl", vision, text, tp_size=1, vision_layers=32, text_layers=28, is_tied=False)
    assert text == ((6, 8, 8, 6),)
    assert balance(rank_work(model, shipped, shape)) < 0.8
    assert balance(rank_work(model, chosen, shape)) > 0.95


def test_trained_vision_moves_over_several_stages() -> None:
    model = small_model(vision_layers=32, text_layers=2)
    plan = StagePlan.build(model, parallel(pp=4))
    assert sum(1 for count in plan.lists_of(Tower.VISION)[0] if count) > 1


def test_frozen_vision_costs_only_its_forward_pass() -> None:
    shape = SampleShape()
    frozen = small_model(freeze_vision=True, freeze_projector=True)
    forward, step = forward_flops(frozen, shape), training_flops(frozen, shape)
    assert (step.vision_layer, step.projector) == (forward.vision_layer, forward.projector)
    assert step.text_layer == 3 * forward.text_layer
    trained = training_flops(small_model(), shape)
    assert (trained.vision_layer, trained.projector) == (3 * forward.vision_layer, 3 * forward.projector)


def test_a_frozen_decoder_passes_the_gradient_through() -> None:
    shape = SampleShape()
    forward = forward_flops(small_model(), shape)
    assert training_flops(small_model(freeze_text=True), shape).text_layer == 2 * forward.text_layer


def test_a_sample_cannot_have_more_image_tokens_than_tokens() -> None:
    with pytest.raises(ValueError, match="image_tokens = 9"):
        SampleShape(tokens=8, image_tokens=9)
