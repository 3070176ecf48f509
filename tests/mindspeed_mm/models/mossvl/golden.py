"""The golden model of the format's description (test vector 12): weights from a sine, one batch of two samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mindspeed_mm.models.mossvl.hf.configuration import MossVLConfig
from mindspeed_mm.models.mossvl.hf.modeling import MossVLForConditionalGeneration
from mindspeed_mm.models.mossvl.layout import VisionLayout
from mindspeed_mm.models.mossvl.visibility import masked_frames

IMAGE = 3
A = [10, 3, 11, 7, 8, 3, 8, 3, 9, 12, 13, 14]
B = [20, 21, 22, 23, 24]


def golden_config(**changes: Any) -> MossVLConfig:
    """Settings of the golden model."""
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "cross_attention_layers": [1, 3],
        "vocab_size": 64,
        "rope_theta": 10000.0,
        "rope_scaling": {"mrope_section": [2, 1, 1], "mrope_interleaved": True, "rope_type": "default"},
    }
    vision = {
        "depth": 3,
        "hidden_size": 16,
        "num_heads": 2,
        "intermediate_size": 24,
        "patch_size": 2,
        "num_position_embeddings": 16,
        "out_hidden_size": 32,
        "deepstack_visual_indexes": [0, 1],
    }
    settings = {"image_token_id": IMAGE, "vision_seq_pad_multiple": 1, **changes}
    return MossVLConfig(text_config=text, vision_config=vision, **settings)


def golden_model(attention: str = "sdpa", **changes: Any) -> MossVLForConditionalGeneration:
    """The model in eval mode, weights set by the sine of their place."""
    model = MossVLForConditionalGeneration._from_config(golden_config(**changes), attn_implementation=attention)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for rank, name in enumerate(sorted(parameters)):
            parameter = parameters[name]
            place = torch.arange(parameter.numel(), dtype=torch.float64)
            parameter.copy_(_golden_values(name, rank, place).float().view(parameter.shape))
    return model.eval()


def _golden_values(name: str, rank: int, place: Tensor) -> Tensor:
    sine = torch.sin(0.37 * (place + 1) + 0.91 * (rank + 1))
    if name.endswith("_gate"):
        return 0.5 + 0.1 * sine
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.1 * sine
    return (0.05 if name.endswith("bias") else 0.2) * sine


def golden_pixels() -> Tensor:
    """[144, 12]: 80 patches from a cosine, then 64 blank ones."""
    row, column = torch.arange(80, dtype=torch.float64)[:, None], torch.arange(12, dtype=torch.float64)
    return torch.cat([torch.cos(0.05 * (12 * row + column)).float(), torch.zeros(64, 12)])


def golden_batch(order: str = "AB") -> dict[str, Any]:
    """Inputs of sample A (an image and a video), sample B (text only), or both in either order."""
    pieces = {
        "A": (A, golden_pixels()[:80], [[1, 4, 4], [2, 4, 8]], 2, range(9, 12)),
        "B": (B, golden_pixels()[80:], [[1, 8, 8]], 1, range(2, 5)),
    }
    chosen = [pieces[name] for name in order]
    width = max(len(ids) for ids, *_ in chosen)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, *_ in chosen])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, *_ in chosen])
    labels = torch.full_like(ids, -100)
    for row, (*_, supervised) in enumerate(chosen):
        labels[row, list(supervised)] = ids[row, list(supervised)]
    grids = [grid for _, _, media, _, _ in chosen for grid in media]
    nums = [count for *_, count, _ in chosen]
    layout = VisionLayout.build(grids, nums, merge_size=2)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "pixel_values": torch.cat([pixels for _, pixels, *_ in chosen]),
        "grid_thw": torch.tensor(grids),
        "media_nums_per_sample": nums,
        "cross_attention_mask": masked_frames(ids, mask, layout, image_token_id=IMAGE),
    }
