from __future__ import annotations

from itertools import accumulate, combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_mm.config import Qwen2VLConfig, load_settings
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.plan import StagePlan, Tower, check_trainable
from mindspeed_mm.plan.auto import lists_of_cuts
from mindspeed_mm.plan.flops import SampleShape, Work, backward_flops, forward_flops
from mindspeed_mm.plan.search import Costs, best_plan, simulate_plan

from ..config.launch import FILES
from .models import parallel, small_model


def flops(model: Qwen2VLConfig) -> Costs:
    return Costs(forward_flops(model, SampleShape()), backward_flops(model, SampleShape()))


def shipped(size: str) -> Qwen2VLConfig:
    return load_settings(Qwen2VLConfig, FILES / f"model_{size}.json", [])


def plan_of_cuts(model: Qwen2VLConfig, cuts: tuple[int, ...], pp_size: int) -> StagePlan:
    return StagePlan.from_lists(
        "qwen2vl",
        *lists_of_cuts(cuts, model.vision_layers, pp_size),
        tp_size=1,
        vision_layers=model.vision_layers,
        text_layers=model.text_decoder.num_layers,
        is_tied=False,
    )


@settings(max_examples=25, deadline=None)
@given(
    times=st.lists(st.integers(1, 9).map(float), min_size=12, max_size=12), pp=st.sampled_from([2, 3]), data=st.data()
)
def test_the_plan_is_near_the_best_of_all(times: list[float], pp: int, data: st.DataObject) -> None:
    model = small_model(vision_layers=3, text_layers=5)
    costs = Costs(Work(*times[:6]), Work(*times[6:]))
    found = simulate_plan(best_plan(model, costs, pp_size=pp, num_micro_batches=4), costs, 4).length
    everything = [(0, *inner, 8) for inner in combinations(range(1, 8), pp - 1)]
    best = min(simulate_plan(plan_of_cuts(model, cuts, pp), costs, 4).length for cuts in everything)
    # moves of single layers can end where only two at once would help
    assert best <= found <= 1.1 * best


@pytest.mark.parametrize(("size", "pp", "vp"), [("7b", 4, 1), ("7b", 4, 2), ("72b", 8, 1), ("2b", 2, 1)])
def test_it_is_never_behind_the_shipped_lists_and_trains_on_every_rank(size: str, pp: int, vp: int) -> None:
    model = shipped(size)
    costs, start = flops(model), None
    if vp == 1 and size != "2b":
        start = StagePlan.build(model, parallel(pp=pp))
    plan = best_plan(model, costs, pp_size=pp, vp_size=vp, num_micro_batches=16, given=start)
    check_trainable(model, plan, enable_dummy_optimizer=False)
    timeline = simulate_plan(plan, costs, 16)
    assert timeline.share_of_ideal > 0.9
    if start is not None:
        assert timeline.length < simulate_plan(start, costs, 16).length


def test_7b_gains_a_quarter() -> None:
    model = shipped("7b")
    costs = flops(model)
    before = simulate_plan(StagePlan.build(model, parallel(pp=4)), costs, 96)
    plan = best_plan(model, costs, pp_size=4, num_micro_batches=96)
    assert sum(plan.lists_of(Tower.VISION)[0]) == plan.lists_of(Tower.VISION)[0][0] == 32
    assert before.length / simulate_plan(plan, costs, 96).length > 1.2


def test_a_start_that_is_best_is_kept() -> None:
    model = small_model(vision_layers=0, text_layers=8)
    costs = Costs(Work(0, 0, 0, 1.0, 0), Work(0, 0, 0, 2.0, 0))
    start = plan_of_cuts(model, (0, *accumulate([2] * 4)), 4)
    assert best_plan(model, costs, pp_size=4, num_micro_batches=8, given=start) == start
    assert simulate_plan(start, costs, 8).share_of_ideal == pytest.approx(1)


def test_interleaving_wants_fitting_micro_batches() -> None:
    with pytest.raises(ConfigError, match="not a multiple of the pipeline size"):
        best_plan(small_model(), flops(small_model()), pp_size=2, vp_size=2, num_micro_batches=3)


def test_too_many_stages_are_refused() -> None:
    model = small_model(text_layers=2, freeze_vision=True, freeze_projector=True)
    with pytest.raises(ConfigError, match="6 layers cannot be dealt to 3 stages so that each has a layer"):
        best_plan(model, flops(model), pp_size=3, num_micro_batches=3)
