"""The reference: plain transformers in float32, sample by sample, with a plain AdamW loop."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration

from tests.parity.problem import Sample, make_samples, read_config

LEARNING_RATE, WEIGHT_DECAY, CLIP = 1e-3, 0.1, 1.0


@dataclass(frozen=True)
class Reference:
    """What transformers gives for a problem."""

    logits: list[Tensor]
    """[s, v] per micro-batch."""
    loss: float
    grads: dict[str, Tensor]
    """By name on the hub."""
    losses: list[float]
    """Loss of each of the AdamW steps, before its update."""
    grad_norms: list[float]


def hub_name(name: str) -> str:
    """Newer in-memory names to those of the hub."""
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def logits_of(model: torch.nn.Module, samples: list[Sample], image_token: int) -> Tensor:
    """Logits of a micro-batch, [s, v]; every sample on its own, so nothing is padded."""
    rows = []
    for sample in samples:
        inputs: dict[str, Tensor] = {"mm_token_type_ids": (sample.input_ids == image_token).int()[None]}
        if sample.grids:
            inputs |= {"pixel_values": sample.pixel_values, "image_grid_thw": torch.tensor(sample.grids)}
        ids = sample.input_ids[None]
        rows.append(model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **inputs).logits[0])
    return torch.cat(rows)


def _loss(model: torch.nn.Module, batches: list[list[Sample]], image_token: int, kind: str) -> Tensor:
    """Mean over all supervised tokens ("token"), or over micro-batches: of the mean over their supervised tokens
    ("default"), or of the mean over the means of their samples ("sample").
    """
    losses = []
    for samples in batches:
        labels = torch.cat([sample.shifted for sample in samples])
        tokens = F.cross_entropy(logits_of(model, samples, image_token), labels, reduction="none")
        lengths = [sample.labels.numel() for sample in samples]
        pairs = zip(tokens.split(lengths), labels.split(lengths), strict=True)
        parts = [part[label != -100] for part, label in pairs]
        if kind == "sample":
            losses.append(torch.stack([part.mean() for part in parts]).mean())
        else:
            losses.append(torch.cat(parts).mean() if kind == "default" else torch.cat(parts))
    return torch.cat(losses).mean() if kind == "token" else torch.stack(losses).mean()


def part_of(name: str) -> str:
    """Which part of the model a parameter (by its name on the hub) belongs to."""
    if name.startswith("visual.merger."):
        return "projector"
    return "vision" if name.startswith("visual.") else "text"


@cache
def solve(
    directory: Path,
    steps: int = 20,
    frozen: tuple[str, ...] = (),
    loss_kind: str = "default",
    batches_kind: str = "mixed",
) -> Reference:
    """Logits, loss and gradients at the start, then the losses of `steps` AdamW updates; solved once per session."""
    config = read_config(directory)
    batches, image_token = make_samples(config, batches_kind), config["image_token_id"]
    model = Qwen2VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    model.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(hub_name(name)) not in frozen)
    with torch.no_grad():
        logits = [logits_of(model, samples, image_token) for samples in batches]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.999), eps=1e-8
    )
    losses, norms, grads = [], [], {}
    for step in range(steps):
        optimizer.zero_grad()
        loss = _loss(model, batches, image_token, loss_kind)
        loss.backward()
        if step == 0:
            grads = {hub_name(n): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        losses.append(loss.item())
    return Reference(logits, losses[0], grads, losses, norms)
