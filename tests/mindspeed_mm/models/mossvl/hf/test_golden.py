"""The golden model, line by line (test vector 12), on every attention of our own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mindspeed_mm.models.mossvl.hf.modeling import MossVLForConditionalGeneration
from tests.mindspeed_mm.models.mossvl.golden import golden_batch, golden_model

ATTENTIONS = ("sdpa", "eager")


def near(values: Tensor, *expected: float) -> None:
    """Within the 2e-5 that the description's six digits allow."""
    assert_close(values.detach().reshape(-1), torch.tensor(expected), atol=2e-5, rtol=0)


def run(model: MossVLForConditionalGeneration, batch: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    """Output and the output of every text layer."""
    layers: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda *args: layers.append(args[2])) for layer in model.language_model.layers]
    output = model(**batch)
    for hook in hooks:
        hook.remove()
    return output, layers


@pytest.fixture(params=ATTENTIONS)
def model(request: pytest.FixtureRequest) -> MossVLForConditionalGeneration:
    return golden_model(request.param)


def test_weights() -> None:
    model = golden_model()
    assert len(list(model.named_parameters())) == 101
    assert sum(parameter.numel() for parameter in model.parameters()) == 84876
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]
    near(model.lm_head.weight[0, :3], 0.191603, 0.199373, 0.180159)
    near(model.model.separator_token[:3], -0.107271, -0.161052, -0.193035)
    near(model.language_model.layers[1].cross_attn_attn_gate, 0.472407)
    near(model.language_model.layers[3].cross_attn_mlp_gate, 0.453885)


def test_vision_states(model: MossVLForConditionalGeneration) -> None:
    batch = golden_batch()
    grids = [tuple(grid) for grid in batch["grid_thw"].tolist()]
    layout, _ = model.model._layout(batch["grid_thw"], batch["media_nums_per_sample"], 2)
    assert layout is not None
    states = model.model.vision_states(batch["pixel_values"], grids, layout)
    assert states.shape == (2, 23, 32)
    near(states[0, 0, :4], -0.003385, -1.228685, 0.977902, 0.650833)
    near(states[0, 21, :4], -0.358763, -0.820843, 1.050395, 0.192710)
    assert torch.equal(states[0, 4], model.model.separator_token)
    assert torch.equal(states[0, 22], model.model.separator_token)
    near(states[1, 0, :4], 0.385289, -5.257531, 3.383697, 3.010984)
    assert not states[1, 17].any()


def test_layer_outputs(model: MossVLForConditionalGeneration) -> None:
    _, layers = run(model, golden_batch())
    near(layers[0][0, 11, :4], -0.445557, 0.459416, 0.658542, 0.005644)
    near(layers[1][0, 11, :4], -0.449832, 0.455131, 0.664307, 0.017981)
    near(layers[2][0, 11, :4], -0.445183, 0.480605, 0.663656, -0.033475)
    near(layers[3][0, 11, :4], -0.417054, 0.503674, 0.668753, -0.046296)
    near(layers[0][0, 5, :4], 1.116811, -1.301151, -2.336752, -0.739659)
    near(layers[1][0, 5, :4], 1.160982, -1.197995, -2.222378, -0.677285)
    near(layers[2][0, 5, :4], 0.948535, -1.275675, -2.129677, -0.465533)
    near(layers[3][0, 5, :4], 1.045936, -1.137495, -2.021769, -0.439046)
    near(layers[1][0, 1, :4], 1.102755, 1.544871, 1.254948, 0.401110)
    near(layers[1][0, 4, :4], 1.467871, 0.859208, -0.168130, -1.120217)
    near(layers[1][0, 7, :4], 2.535027, -2.025379, -4.309118, -1.807607)
    near(layers[3][1, 4, :4], 0.214248, 0.779441, 0.437081, -0.637758)
    # What sees no vision token passes a cross layer bit for bit.
    assert torch.equal(layers[1][0, 0], layers[0][0, 0])
    assert torch.equal(layers[1][1], layers[0][1])
    assert torch.equal(layers[3][1], layers[2][1])


def test_logits_and_loss(model: MossVLForConditionalGeneration) -> None:
    output, _ = run(model, golden_batch())
    near(output.logits[0, 0, :4], 0.649170, 0.738108, 0.454434, -0.058648)
    near(output.logits[0, 11, :4], -0.528472, -0.553669, -0.299364, 0.106067)
    near(output.logits[1, 4, :4], -0.356202, -0.802490, -0.843664, -0.458940)
    assert output.logits[0].argmax(-1).tolist() == [44, 62, 18, 58, 23, 20, 24, 3, 18, 20, 12, 5]
    assert output.logits[1, :5].argmax(-1).tolist() == [10, 19, 56, 58, 6]
    near(output.loss, 4.077848)
    assert output.rope_deltas.tolist() == [10, -7]
    medias = output.vision_token_info[0]["medias"]
    assert [(media["start"], media["end"], media["num_frames"]) for media in medias] == [(0, 5, 1), (5, 23, 2)]
    assert output.vision_token_info[1]["total_length"] == 17


def test_variants_of_the_batch(model: MossVLForConditionalGeneration) -> None:
    def loss(order: str = "AB", **changes: Any) -> Tensor:
        return model(**{**golden_batch(order), **changes}).loss

    near(loss("A"), 4.162825)
    near(loss("B"), 3.992872)
    near(loss("BA"), 4.077848)
    near(loss(vision_chunked_length=1), 4.077848)
    near(loss("A", cross_attention_mask=None), 4.160854)
    for layer in (1, 3):
        for gate in ("cross_attn_attn_gate", "cross_attn_mlp_gate"):
            torch.nn.init.zeros_(getattr(model.language_model.layers[layer], gate))
    near(loss(), 4.078474)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("multiple", [8, 5])
def test_padding_of_the_vision_sequence_changes_nothing(attention: str, multiple: int) -> None:
    near(golden_model(attention, vision_seq_pad_multiple=multiple)(**golden_batch()).loss, 4.077848)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_blank_picture_equals_no_vision_input(attention: str) -> None:
    model, batch = golden_model(attention), golden_batch("B")
    assert torch.equal(batch["grid_thw"], torch.tensor([[1, 8, 8]]))
    assert bool(batch["cross_attention_mask"].all())
    with_blank = model(**batch).logits
    without = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert (with_blank - without).abs().max() < 1e-6
    assert (model(**golden_batch()).logits[1, :5] - without[0]).abs().max() < 1e-6


NORMS = {
    "lm_head.weight": 2.285219,
    "model.language_model.embed_tokens.weight": 0.432126,
    "model.language_model.layers.1.cross_attn_attn_gate": 0.003483,
    "model.language_model.layers.3.cross_attn_mlp_gate": 0.001582,
    "model.language_model.layers.1.cross_attn.k_proj.weight": 0.069192,
    "model.language_model.layers.3.cross_attn.q_norm.weight": 0.002161,
    "model.separator_token": 0.022070,
    "model.visual.merger.linear_fc1.weight": 0.196597,
    "model.visual.merger.norms.2.weight": 0.002366,
    "model.visual.blocks.0.attn.qkv.weight": 0.009416,
    "model.visual.pos_embed.weight": 0.010679,
    "model.visual.patch_embed.proj.weight": 0.011740,
}


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("is_recomputing", [False, True])
def test_gradient_norms(model: MossVLForConditionalGeneration, is_training: bool, is_recomputing: bool) -> None:
    model.train(is_training)
    if is_recomputing:
        model.gradient_checkpointing_enable({"use_reentrant": True})  # refused, see the next test
    output = model(**golden_batch())
    assert (output.logits is None) == is_training
    near(output.loss, 4.077848)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    total = torch.stack([gradient.norm() for gradient in gradients.values() if gradient is not None]).norm()
    assert total.item() == pytest.approx(8.843748, rel=1e-5)
    for name, norm in NORMS.items():
        gradient = gradients[name]
        assert gradient is not None
        # Six decimals are given: the smallest values carry half a unit of the last one.
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-4, abs=6e-7), name


def test_recomputation_is_never_reentrant(caplog: pytest.LogCaptureFixture) -> None:
    model = golden_model().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    assert "use_reentrant=False" in caplog.text
    layer = model.language_model.layers[1]
    assert layer.gradient_checkpointing
    assert layer._gradient_checkpointing_func.keywords == {"use_reentrant": False}
