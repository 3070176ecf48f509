from __future__ import annotations

from xml.etree import ElementTree

import pytest

from mindspeed_mm.plan.drawing import LABEL_WIDTH, WIDTH, Panel, render_svg
from mindspeed_mm.plan.schedule import simulate

SVG = "{http://www.w3.org/2000/svg}"


def panel(*, vp: int = 1, micro_batches: int = 4, slow: float = 1.0) -> Panel:
    stages = 2 * vp
    timeline = simulate([slow] * stages, [2.0] * stages, pp_size=2, vp_size=vp, num_micro_batches=micro_batches)
    return Panel("given & <best>", timeline, ("rank 0", "rank 1"))


@pytest.mark.parametrize("vp", [1, 2])
def test_there_is_one_lane_per_rank_and_one_numbered_block_per_step(vp: int) -> None:
    root = ElementTree.fromstring(render_svg([panel(vp=vp)]))
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert {"given & <best>", "rank 0", "rank 1"} <= set(texts)
    for micro_batch in "0123":
        assert texts.count(micro_batch) == 2 * 2 * vp
    blocks = [element for element in root.iter(f"{SVG}rect") if element.get("stroke") == "white"]
    assert len(blocks) == 4 * 2 * 2 * vp
    assert len({element.get("y") for element in blocks}) == 2
    assert len({element.get("fill") for element in blocks}) == 2 * vp


def test_all_panels_have_one_scale_that_fits() -> None:
    root = ElementTree.fromstring(render_svg([panel(), panel(slow=3.0)]))
    rights = [
        float(element.get("x", 0)) + float(element.get("width", 0))
        for element in root.iter(f"{SVG}rect")
        if element.get("fill") == "#eeeeee" and element.get("x") == str(LABEL_WIDTH)
    ]
    assert max(rights) <= WIDTH
    # 3 of 5 units of time per step
    assert (rights[0] - LABEL_WIDTH) / (rights[2] - LABEL_WIDTH) == pytest.approx(3 / 5, abs=1e-3)


def test_steps_that_take_no_time_are_left_out() -> None:
    timeline = simulate([1.0, 1.0], [0.0, 2.0], pp_size=2, num_micro_batches=3)
    root = ElementTree.fromstring(render_svg([Panel("", timeline, ("", ""))]))
    blocks = [element for element in root.iter(f"{SVG}rect") if element.get("stroke") == "white"]
    assert len(blocks) == 9
