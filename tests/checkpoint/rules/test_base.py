"""Packs and splits: the vectors of the converter that users know, and the laws that every rule keeps."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from checkpoint.rules.base import (
    COLUMN,
    COLUMN_GATED,
    REPLICATED,
    ROW,
    Concat,
    Interleaved,
    InterleavedQKV,
    Pack,
    Same,
    Split,
    WeightRule,
)
from checkpoint.rules.qwen2vl import qwen2vl_rules
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.plan import Part
from tests.checkpoint.samples import LAYOUTS, make_plan


def numbers(count: int) -> Tensor:
    return torch.arange(1, count + 1)


def test_interleaved_rows_become_concatenated_ones() -> None:
    pack = Interleaved(groups=4, widths=(1, 1, 1))
    assert torch.cat(pack.split(numbers(12))).tolist() == [1, 4, 7, 10, 2, 5, 8, 11, 3, 6, 9, 12]


def test_concatenated_rows_become_interleaved_ones() -> None:
    pack = Interleaved(groups=3, widths=(1, 1, 1, 1))
    parts = list(numbers(12).split(3))
    assert pack.join(parts).tolist() == [1, 4, 7, 10, 2, 5, 8, 11, 3, 6, 9, 12]
    fused = Interleaved(groups=3, widths=(1, 1, 1, 1), is_fused=True)
    assert fused.join([numbers(12)]).tolist() == [1, 4, 7, 10, 2, 5, 8, 11, 3, 6, 9, 12]


def test_query_key_and_value_are_merged_group_by_group() -> None:
    q, k, v = torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6]), torch.tensor([7, 8, 9])
    assert InterleavedQKV(groups=3, heads_per_group=1).join([q, k, v]).tolist() == [1, 4, 7, 2, 5, 8, 3, 6, 9]


def test_a_group_holds_its_query_heads_then_its_key_then_its_value() -> None:
    q, k, v = torch.arange(8), torch.arange(100, 104), torch.arange(200, 204)
    merged = InterleavedQKV(groups=2, heads_per_group=2).join([q, k, v])
    assert merged.tolist() == [0, 1, 2, 3, 100, 101, 200, 201, 4, 5, 6, 7, 102, 103, 202, 203]


@pytest.mark.parametrize(
    ("split", "full", "shard"),
    [
        (ROW, (4, 6), (4, 3)),
        (COLUMN, (4, 6), (2, 6)),
        (COLUMN_GATED, (8, 6), (4, 6)),
        (COLUMN_GATED, (8,), (4,)),
        (COLUMN, (8, 6), (4, 6)),
        (COLUMN, (8,), (4,)),
        (ROW, (4, 12), (4, 6)),
        (ROW, (3, 12), (3, 6)),
        (REPLICATED, (3, 5), (3, 5)),
    ],
)
def test_two_ranks_share_a_tensor(split: Split, full: tuple[int, ...], shard: tuple[int, ...]) -> None:
    tensor = torch.randn(full)
    shards = split.shard(tensor, 2)
    assert [tuple(part.shape) for part in shards] == [shard, shard]
    assert torch.equal(split.merge(shards), tensor)
    assert split.full_shape(shard, 2) == full


def test_a_gated_split_gives_each_rank_gate_rows_then_up_rows() -> None:
    first, second = COLUMN_GATED.shard(numbers(8), 2)
    assert first.tolist() == [1, 2, 5, 6]
    assert second.tolist() == [3, 4, 7, 8]


@pytest.mark.parametrize(
    ("split", "shape", "tp_size"), [(COLUMN, (5, 4), 2), (ROW, (4, 5), 2), (COLUMN_GATED, (6, 4), 2)]
)
def test_an_uneven_split_is_refused(split: Split, shape: tuple[int, ...], tp_size: int) -> None:
    assert split.problem(shape, tp_size) is not None
    with pytest.raises(ConfigError, match="cannot be divided"):
        split.shard(torch.zeros(shape), tp_size)


def test_rows_that_groups_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="7 rows cannot be divided"):
        Interleaved(2, (1, 1)).parts(7, 3)


@pytest.mark.parametrize(
    "pack", [Same(), Concat(2), InterleavedQKV(2, 3), Interleaved(4, (1, 1, 1), is_fused=True)], ids=repr
)
@pytest.mark.parametrize("trailing", [(), (3,), (2, 3)])
def test_a_pack_undoes_itself(pack: Pack, trailing: tuple[int, ...]) -> None:
    full = torch.randn((240, *trailing))
    parts = pack.split(full)
    assert torch.equal(pack.join(parts), full)
    assert [tuple(part.shape) for part in parts] == list(pack.part_shapes(tuple(full.shape)))


def all_rules() -> list[WeightRule]:
    from mindspeed_mm.config import Qwen2VLConfig

    text = {
        "model_id": "qwen2lm", "num_layers": 6, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 8,
        "num_query_groups": 4, "vocab_size": 152000, "max_position_embeddings": 64,
        "untie_embeddings_and_output_weights": True, "mrope_section": [1, 1, 2],
    }  # fmt: skip
    tower = {"model_id": "qwen2vit", "num_layers": 4, "hidden_size": 32, "num_attention_heads": 4}
    projector = {"model_id": "lnmlp", "input_size": 32, "ffn_hidden_size": 128, "hidden_size": 64}
    content = {
        "model_id": "qwen2vl",
        "image_encoder": {"vision_encoder": tower, "vision_projector": projector},
        "text_decoder": {**text, "vocab_size": 152000},
    }
    return list(qwen2vl_rules(Qwen2VLConfig.model_validate(content)).rules)


@pytest.mark.parametrize(("rule", "tp"), list(product(all_rules(), [1, 2, 4])), ids=str)
def test_rule_undoes_itself(rule: WeightRule, tp: int) -> None:
    assert rule.shape is not None
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randint(0, 1 << 15, shape, generator=generator, dtype=torch.int16)
        for shape in rule.pack.part_shapes(rule.shape)
    ]
    full = rule.pack.join(tensors)
    assert tuple(full.shape) == rule.shape
    assert torch.equal(rule.tp.merge(rule.tp.shard(full, tp)), full)
    for before, after in zip(tensors, rule.pack.split(full), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_weight_is_on_exactly_one_stage_but_the_head_of_a_tied_model(name: str, is_tied: bool) -> None:
    from checkpoint.rules.qwen2vl import MM_HEAD, qwen2vl_rules_of_plan

    vision, text, tp_size = LAYOUTS[name]
    plan = make_plan(vision, text, tp_size, is_tied=is_tied)
    rules = qwen2vl_rules_of_plan(plan)
    placed = [entry for stage in plan.stages for entry in rules.for_stage(plan, stage)]
    once = [(entry.rule.mm, entry.layer) for entry in placed if entry.name != entry.rule.copy_mm]
    assert sorted(map(str, once)) == sorted(str((weight.rule.mm, weight.layer)) for weight in rules.weights)
    is_apart = plan.stage_of(Part.LM_HEAD) != plan.stage_of(Part.TOKEN_EMBED)
    heads = sum(entry.name == MM_HEAD for entry in placed)
    assert heads == (1 if not is_tied or is_apart else 0)
