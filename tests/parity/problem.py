"""The problem that both sides solve: a small checkpoint and a few mixed micro-batches, the same for every layout."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mindspeed_mm.config import Qwen2VLConfig
from mindspeed_mm.ops.batch import Batch
from mindspeed_mm.ops.mrope import mrope_position_ids

Grid = tuple[int, int, int]
Layers = tuple[int, ...] | tuple[tuple[int, ...], ...]

MICRO_BATCHES: dict[str, tuple[tuple[tuple[Grid, ...], ...], ...]] = {
    "mixed": (
        (((1, 4, 6),), ((1, 2, 2), (1, 6, 4))),  # one image; two images
        ((), ((1, 4, 4),)),  # text only beside an image
        ((), ()),  # a micro-batch of text alone
        (((1, 2, 4), (1, 2, 2)), ((1, 6, 2),)),
    ),
    "text": (((), ()), ((),), ((), (), ()), ((), ())),
    "images": ((((1, 4, 6),),), (((2, 2, 6), (1, 2, 2)),), (((1, 8, 4),), ((1, 2, 2),)), (((1, 4, 4),),)),
    # Of two replicas, which take micro-batches in turn, one sees nothing but text and the other nothing but images.
    "apart": (((), ()), (((1, 4, 6),), ((1, 2, 2),)), ((), ()), (((1, 6, 2),), ((1, 4, 4), (1, 2, 4)))),
}
"""Kind of batch -> grids of every sample of every micro-batch."""


@dataclass(frozen=True)
class Sample:
    """One conversation as both sides see it."""

    input_ids: Tensor
    labels: Tensor
    grids: tuple[Grid, ...]
    pixel_values: Tensor

    @property
    def shifted(self) -> Tensor:
        """[s]: what each position must predict, or -100."""
        return torch.cat([self.labels[1:], torch.tensor([-100])])


def with_frozen(config: dict, frozen: tuple[str, ...] = ()) -> Qwen2VLConfig:
    """Model settings of a Hugging Face config with nothing frozen but some of "vision", "projector" and "text"."""
    model = Qwen2VLConfig.from_hf(config)
    assert model.image_encoder is not None
    image = model.image_encoder
    encoder = image.vision_encoder.model_copy(update={"freeze": "vision" in frozen})
    projector = image.vision_projector.model_copy(update={"freeze": "projector" in frozen})
    return model.model_copy(
        update={
            "image_encoder": image.model_copy(update={"vision_encoder": encoder, "vision_projector": projector}),
            "text_decoder": model.text_decoder.model_copy(update={"freeze": "text" in frozen}),
        }
    )


def with_layout(model: Qwen2VLConfig, vision: Layers, text: Layers) -> Qwen2VLConfig:
    """The same model with stage lists, flat or one per virtual chunk."""
    assert model.image_encoder is not None
    encoder = model.image_encoder.vision_encoder.model_copy(update={"pipeline_num_layers": vision})
    return model.model_copy(
        update={
            "image_encoder": model.image_encoder.model_copy(update={"vision_encoder": encoder}),
            "text_decoder": model.text_decoder.model_copy(update={"pipeline_num_layers": text}),
        }
    )


def with_recompute(model: Qwen2VLConfig, method: str) -> Qwen2VLConfig:
    """The same model with activation recompute in both towers: "uniform" or "block" over layers, or "selective"."""
    assert model.image_encoder is not None
    fields: dict[str, str | int] = {"recompute_granularity": "selective"}
    if method != "selective":
        fields = {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": 1}
    encoder = model.image_encoder.vision_encoder.model_copy(update=fields)
    return model.model_copy(
        update={
            "image_encoder": model.image_encoder.model_copy(update={"vision_encoder": encoder}),
            "text_decoder": model.text_decoder.model_copy(update=fields),
        }
    )


def read_config(directory: Path) -> dict:
    """config.json of a checkpoint."""
    return json.loads((directory / "config.json").read_text())


def make_samples(config: dict, kind: str = "mixed", seed: int = 0) -> list[list[Sample]]:
    """Samples by micro-batch: random text around the images, labels on the tail of each sample."""
    generator = torch.Generator().manual_seed(seed)
    image, start, end = config["image_token_id"], config["vision_start_token_id"], config["vision_end_token_id"]

    def words(count: int) -> list[int]:
        return torch.randint(5, 200, (count,), generator=generator).tolist()

    batches = []
    for micro_batch in MICRO_BATCHES[kind]:
        samples = []
        for number, grids in enumerate(micro_batch):
            ids = words(5 + number)
            for t, h, w in grids:
                ids += [start, *[image] * (t * h * w // 4), end, *words(3)]
            head = len(ids)
            ids += words(7 + 2 * number)
            labels = torch.tensor([-100] * head + ids[head:])
            patches = sum(t * h * w for t, h, w in grids)
            pixels = torch.randn(patches, 1176, generator=generator)
            samples.append(Sample(torch.tensor(ids), labels, grids, pixels))
        batches.append(samples)
    return batches


def to_batch(samples: list[Sample], config: dict) -> Batch:
    """One padding-free micro-batch, as the collator would make it."""
    image = config["image_token_id"]
    positions = [
        mrope_position_ids(
            sample.input_ids,
            torch.tensor(sample.grids, dtype=torch.int64).view(-1, 3),
            media_token_ids=[image],
            merge_size=2,
        ).view(3, -1)
        for sample in samples
    ]
    lengths = torch.tensor([0, *[sample.input_ids.numel() for sample in samples]])
    input_ids = torch.cat([sample.input_ids for sample in samples])
    grids = [grid for sample in samples for grid in sample.grids]
    pixels = torch.cat([sample.pixel_values for sample in samples])
    return Batch(
        input_ids=input_ids,
        labels=torch.cat([sample.shifted for sample in samples]),
        position_ids=torch.cat(positions, dim=1),
        cu_seqlens=lengths.cumsum(0).to(torch.int32),
        image_rows=(input_ids == image).nonzero().flatten(),
        grid_thw=torch.tensor(grids or [(1, 2, 2)]),
        pixel_values=pixels if grids else torch.zeros(4, 1176),
    )
