"""Laws over random models and layouts: nothing is lost, moved or changed on any way."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from checkpoint.blocks import check_cover, match
from checkpoint.convert import hf_to_mm, mm_to_hf, resplit
from checkpoint.plans import UNSAID, Cut
from checkpoint.rules.base import COLUMN, COLUMN_GATED, REPLICATED, ROW, Concat, InterleavedQKV, Layout, Pack, Split
from checkpoint.rules.qwen2vl import qwen2vl_rules
from checkpoint.stores.hf import read_model_config
from mindspeed_mm.plan import StagePlan
from tests.checkpoint.samples import assert_same_tensors, read_tensors


class Model(NamedTuple):
    """Sizes of a random model."""

    vision_layers: int
    text_layers: int
    groups: int
    heads_per_group: int
    vision_heads: int
    is_tied: bool


MODELS = st.builds(
    Model,
    vision_layers=st.integers(1, 4),
    text_layers=st.integers(1, 5),
    groups=st.sampled_from([1, 2, 4]),
    heads_per_group=st.integers(1, 3),
    vision_heads=st.sampled_from([1, 2, 4]),
    is_tied=st.booleans(),
)


def write_model(path: Path, model: Model) -> Path:
    """A Hugging Face directory of a model with head size 4, random bytes as bfloat16 weights."""
    heads = model.groups * model.heads_per_group
    config = {
        "model_type": "qwen2_vl",
        "hidden_size": 4 * heads,
        "intermediate_size": 8,
        "num_hidden_layers": model.text_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": model.groups,
        "vocab_size": 12,
        "max_position_embeddings": 8,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "tie_word_embeddings": model.is_tied,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 0]},
        "image_token_id": 1,
        "video_token_id": 2,
        "vision_start_token_id": 3,
        "vision_config": {
            "depth": model.vision_layers,
            "embed_dim": 4 * model.vision_heads,
            "num_heads": model.vision_heads,
            "mlp_ratio": 2,
            "hidden_size": 4 * heads,
            "in_channels": 1,
            "patch_size": 2,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
        },
    }
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(model.text_layers)
    tensors = {}
    for weight in qwen2vl_rules(read_model_config(path)).weights:
        assert weight.rule.shape is not None
        for name, shape in zip(weight.hf, weight.rule.pack.part_shapes(weight.rule.shape), strict=True):
            tensors[name] = torch.randint(0, 0x7F80, shape, generator=generator, dtype=torch.int16).view(torch.bfloat16)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@st.composite
def cuts(draw: st.DrawFn, model: Model) -> Cut:
    """A legal layout: stages in a row, vision first, zeros at either end of both lists where the rules allow them."""
    tp_size = draw(
        st.sampled_from([size for size in (1, 2, 4) if not model.groups % size and not model.vision_heads % size])
    )
    layers = ["v"] * model.vision_layers + ["t"] * model.text_layers
    pp_size = draw(st.integers(1, min(4, len(layers))))
    vp_size = draw(st.integers(1, len(layers) // pp_size)) if pp_size > 1 else 1
    count = pp_size * vp_size
    places = sorted(draw(st.permutations(range(1, len(layers))))[: count - 1])
    stages = [layers[a:b] for a, b in itertools.pairwise([0, *places, len(layers)])]
    vision, text = ([stage.count(kind) for stage in stages] for kind in "vt")
    return Cut(_rows(vision, pp_size), _rows(text, pp_size), tp_size)


def _rows(flat: Sequence[int], pp_size: int) -> list[list[int]]:
    return [list(flat[start : start + pp_size]) for start in range(0, len(flat), pp_size)]


@st.composite
def journeys(draw: st.DrawFn) -> tuple[Model, Cut, Cut]:
    model = draw(MODELS)
    return model, draw(cuts(model)), draw(cuts(model))


@given(journeys())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_two_layouts_go_there_and_back_bit_for_bit(journey: tuple[Model, Cut, Cut]) -> None:
    model, first, second = journey
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        hf = write_model(root / "hf", model)
        assert first.vit_pp_layers is not None
        assert first.llm_pp_layers is not None
        plan = StagePlan.from_lists(
            "qwen2vl",
            first.vit_pp_layers,
            first.llm_pp_layers,
            tp_size=first.tp_size or 1,
            vision_layers=model.vision_layers,
            text_layers=model.text_layers,
            is_tied=model.is_tied,
        )
        hf_to_mm(hf, root / "first", plan)
        resplit(root / "first", root / "second", UNSAID, second)
        mm_to_hf(root / "second", hf, root / "back")
        assert_same_tensors(read_tensors(root / "back"), read_tensors(hf))


PACKS = st.one_of(
    st.builds(Concat, st.integers(1, 4)),
    st.builds(InterleavedQKV, st.integers(1, 4), st.integers(1, 4)),
    st.builds(lambda groups: InterleavedQKV(groups, 1, is_fused=True), st.integers(1, 4)),
)


@given(PACKS, st.integers(1, 4), st.integers(1, 5), st.data())
@settings(max_examples=200, deadline=None)
def test_a_pack_of_any_size_undoes_itself(pack: Pack, unit: int, cols: int, data: st.DataObject) -> None:
    count = pack.count if isinstance(pack, Concat) else pack.groups * sum(pack.widths)  # type: ignore[attr-defined]
    full = torch.arange(count * unit * cols).view(-1, cols)
    check_cover(pack.parts(count * unit, cols), count * unit, cols)
    assert torch.equal(pack.join(pack.split(full)), full)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Layout, Layout, int, int]:
    """Two layouts of one tensor that both fit it."""
    split = draw(st.sampled_from([REPLICATED, COLUMN, COLUMN_GATED, ROW]))
    rows, cols = 24 * draw(st.integers(1, 2)), 12 * draw(st.integers(1, 2))
    sides: list[Layout] = [split.layout(draw(st.sampled_from([1, 2, 3, 4, 6]))) for _ in range(2)]
    if split is not ROW and draw(st.booleans()):
        sides[draw(st.integers(0, 1))] = draw(st.sampled_from([Concat(2), InterleavedQKV(2, 4), InterleavedQKV(4, 1)]))
    return sides[0], sides[1], rows, cols


@given(layouts())
@settings(max_examples=300, deadline=None)
def test_moves_carry_every_element_exactly_once(case: tuple[Layout, Layout, int, int]) -> None:
    source, target, rows, cols = case
    full = torch.arange(rows * cols).view(rows, cols)
    moves = match(source.parts(rows, cols), target.parts(rows, cols))
    given_parts = [torch.zeros(shape, dtype=torch.long) for shape in source.part_shapes((rows, cols))]
    wanted_parts = [torch.full(shape, -1) for shape in target.part_shapes((rows, cols))]
    for layout, parts in ((source, given_parts), (target, wanted_parts)):
        for part, blocks in zip(parts, layout.parts(rows, cols), strict=True):
            for b in blocks:
                piece = full[b.row : b.row + b.rows, b.col : b.col + b.cols]
                part[b.stored_row : b.stored_row + b.rows, b.stored_col : b.stored_col + b.cols] = piece
    moved = [torch.full_like(part, -1) for part in wanted_parts]
    for m in moves:
        piece = given_parts[m.source][m.source_row : m.source_row + m.rows, m.source_col : m.source_col + m.cols]
        place = moved[m.target][m.target_row : m.target_row + m.rows, m.target_col : m.target_col + m.cols]
        assert (place == -1).all()
        place.copy_(piece)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(moved, wanted_parts, strict=True))


@given(st.sampled_from(list(Split)), st.integers(1, 6), st.integers(1, 12), st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_a_split_is_exact_or_refused(split: Split, tp_size: int, rows: int, cols: int) -> None:
    full = torch.arange(rows * cols).view(rows, cols)
    if split.problem((rows, cols), tp_size) is None:
        shards = split.shard(full, tp_size)
        assert len(shards) == tp_size
        assert torch.equal(split.merge(shards), full)
