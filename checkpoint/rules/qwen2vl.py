"""The weight rules of Qwen2-VL.

They stand in the order in which Megatron registers parameters: saved optimizer state is matched by that order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from checkpoint.rules.base import (
    COLUMN,
    COLUMN_GATED,
    REPLICATED,
    ROW,
    Concat,
    InterleavedQKV,
    Pack,
    RuleSet,
    Same,
    Shape,
    Split,
    Unknown,
    WeightRule,
)
from mindspeed_mm.plan import Part, StagePlan, Tower

if TYPE_CHECKING:
    from mindspeed_mm.config import ImageEncoderConfig, Qwen2VLConfig, TextDecoderConfig

FAMILY = "qwen2vl"
ALIASES = (
    ("model.visual.", "visual."),
    ("model.language_model.", "model."),
)
"""Prefixes of transformers 4.52 and later -> prefixes of the hub."""

HF_TEXT, MM_TEXT = "model.layers.{layer}.", "text_decoder.decoder.layers.{layer}."
HF_VISION, MM_VISION = "visual.blocks.{layer}.", "image_encoder.encoder.blocks.layers.{layer}."
HF_MERGER, MM_PROJECTOR = "visual.merger.", "image_encoder.projector."
HF_HEAD, MM_HEAD = "lm_head.weight", "text_decoder.output_layer.weight"


def qwen2vl_rules(model: Qwen2VLConfig, *, is_vit_qkv_in_hf_order: bool = False) -> RuleSet:
    """The rules of a model.

    Args:
        is_vit_qkv_in_hf_order: the MM side keeps the vision tower's query, key and value rows in Hugging Face order, as
            MindSpeed-MM 2.2 and 2.3 wrote them by mistake.
    """
    vision: tuple[WeightRule, ...] = ()
    if model.image_encoder is not None:
        vision = _vision_rules(model.image_encoder, is_qkv_in_hf_order=is_vit_qkv_in_hf_order)
    rules = (*vision, *_text_rules(model.text_decoder))
    text = model.text_decoder
    return RuleSet(FAMILY, rules, model.vision_layers, text.num_layers, text.is_tied, ALIASES)


def qwen2vl_rules_of_plan(plan: StagePlan) -> RuleSet:
    """The rules where only the plan is known: enough to move MM tensors, not to make Hugging Face ones."""
    from mindspeed_mm.config import Qwen2VLConfig

    stand_in = Qwen2VLConfig.model_validate(_stand_in(plan))
    rules = qwen2vl_rules(stand_in)
    return replace(rules, rules=tuple(replace(rule, pack=Unknown(), shape=None) for rule in rules.rules))


def _vision_rules(encoder: ImageEncoderConfig, *, is_qkv_in_hf_order: bool) -> tuple[WeightRule, ...]:
    tower, projector = encoder.vision_encoder, encoder.vision_projector
    wide, inner, merged, out = (
        tower.hidden_size,
        tower.ffn_hidden_size,
        projector.ffn_hidden_size,
        projector.hidden_size,
    )
    qkv: Pack = Same() if is_qkv_in_hf_order else InterleavedQKV(tower.num_attention_heads, 1, is_fused=True)
    patch = (wide, tower.in_channels, tower.temporal_patch_size, tower.patch_size, tower.patch_size)

    def layer(mm: str, hf: str, tp: Split, shape: Shape, pack: Pack | None = None) -> WeightRule:
        return WeightRule(MM_VISION + mm, (HF_VISION + hf,), pack or Same(), tp, Tower.VISION, shape)

    def merger(mm: str, hf: str, tp: Split, shape: Shape) -> WeightRule:
        return WeightRule(MM_PROJECTOR + mm, (HF_MERGER + hf,), Same(), tp, Part.PROJECTOR, shape)

    return (
        WeightRule(
            "image_encoder.encoder.patch_embed.proj.weight",
            ("visual.patch_embed.proj.weight",),
            Same(),
            REPLICATED,
            Part.PATCH_EMBED,
            patch,
        ),
        layer("input_layernorm.weight", "norm1.weight", REPLICATED, (wide,)),
        layer("input_layernorm.bias", "norm1.bias", REPLICATED, (wide,)),
        layer("self_attention.linear_proj.weight", "attn.proj.weight", ROW, (wide, wide)),
        layer("self_attention.linear_proj.bias", "attn.proj.bias", REPLICATED, (wide,)),
        layer("self_attention.linear_qkv.weight", "attn.qkv.weight", COLUMN, (3 * wide, wide), qkv),
        layer("self_attention.linear_qkv.bias", "attn.qkv.bias", COLUMN, (3 * wide,), qkv),
        layer("pre_mlp_layernorm.weight", "norm2.weight", REPLICATED, (wide,)),
        layer("pre_mlp_layernorm.bias", "norm2.bias", REPLICATED, (wide,)),
        layer("mlp.linear_fc1.weight", "mlp.fc1.weight", COLUMN, (inner, wide)),
        layer("mlp.linear_fc1.bias", "mlp.fc1.bias", COLUMN, (inner,)),
        layer("mlp.linear_fc2.weight", "mlp.fc2.weight", ROW, (wide, inner)),
        layer("mlp.linear_fc2.bias", "mlp.fc2.bias", REPLICATED, (wide,)),
        merger("layernorm.weight", "ln_q.weight", REPLICATED, (wide,)),
        merger("layernorm.bias", "ln_q.bias", REPLICATED, (wide,)),
        merger("encoder.linear_fc1.weight", "mlp.0.weight", COLUMN, (merged, merged)),
        merger("encoder.linear_fc1.bias", "mlp.0.bias", COLUMN, (merged,)),
        merger("encoder.linear_fc2.weight", "mlp.2.weight", ROW, (out, merged)),
        merger("encoder.linear_fc2.bias", "mlp.2.bias", REPLICATED, (out,)),
    )


def _text_rules(text: TextDecoderConfig) -> tuple[WeightRule, ...]:
    wide, inner, size = text.hidden_size, text.ffn_hidden_size, text.kv_channels
    qkv = InterleavedQKV(text.num_query_groups, text.heads_per_group)
    qkv_rows = (text.num_attention_heads + 2 * text.num_query_groups) * size
    table = (text.vocab_size, wide)

    def layer(mm: str, hf: tuple[str, ...], tp: Split, shape: Shape, pack: Pack | None = None) -> WeightRule:
        names = tuple(HF_TEXT + name for name in hf)
        return WeightRule(MM_TEXT + mm, names, pack or Same(), tp, Tower.TEXT, shape)

    def heads(kind: str) -> tuple[str, ...]:
        return tuple(f"self_attn.{name}_proj.{kind}" for name in "qkv")

    head = WeightRule(MM_HEAD, (HF_HEAD,), Same(), COLUMN, Part.LM_HEAD, table)
    return (
        WeightRule(
            "text_decoder.embedding.word_embeddings.weight",
            ("model.embed_tokens.weight",),
            Same(),
            COLUMN,
            Part.TOKEN_EMBED,
            table,
            copy_mm=MM_HEAD if text.is_tied else None,
            copy_hf=HF_HEAD if text.is_tied else None,
        ),
        layer("input_layernorm.weight", ("input_layernorm.weight",), REPLICATED, (wide,)),
        layer(
            "self_attention.linear_proj.weight",
            ("self_attn.o_proj.weight",),
            ROW,
            (wide, text.num_attention_heads * size),
        ),
        layer("self_attention.linear_qkv.weight", heads("weight"), COLUMN, (qkv_rows, wide), qkv),
        layer("self_attention.linear_qkv.bias", heads("bias"), COLUMN, (qkv_rows,), qkv),
        layer("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",), REPLICATED, (wide,)),
        layer(
            "mlp.linear_fc1.weight",
            ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
            COLUMN_GATED,
            (2 * inner, wide),
            Concat(2),
        ),
        layer("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), ROW, (wide, inner)),
        WeightRule(
            "text_decoder.decoder.final_layernorm.weight",
            ("model.norm.weight",),
            Same(),
            REPLICATED,
            Part.FINAL_NORM,
            (wide,),
        ),
        *(() if text.is_tied else (head,)),
    )


def _stand_in(plan: StagePlan) -> dict[str, object]:
    """Settings of a model with the layers of a plan and any legal sizes."""
    tower = {"model_id": "qwen2vit", "num_layers": plan.vision_layers, "hidden_size": 8, "num_attention_heads": 1}
    projector = {"model_id": "lnmlp", "input_size": 8, "ffn_hidden_size": 32, "hidden_size": 8}
    text = {
        "model_id": "qwen2lm",
        "num_layers": plan.text_layers,
        "hidden_size": 8,
        "num_attention_heads": 1,
        "vocab_size": 200_000,
        "max_position_embeddings": 1,
        "untie_embeddings_and_output_weights": not plan.is_tied,
        "mrope_section": (1, 1, 2),
    }
    vision = {"vision_encoder": tower, "vision_projector": projector} if plan.vision_layers else None
    return {"model_id": plan.family, "image_encoder": vision, "text_decoder": text}
