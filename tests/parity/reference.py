"""The reference: plain transformers in float32, sample by sample, with a plain AdamW loop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration

from tests.parity.problem import Sample

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


def _loss(model: torch.nn.Module, batches: list[list[Sample]], image_token: int) -> Tensor:
    """Mean over micro-batches of the mean over their supervised tokens."""
    losses = [
        F.cross_entropy(logits_of(model, samples, image_token), torch.cat([sample.shifted for sample in samples]))
        for samples in batches
    ]
    return torch.stack(losses).mean()


def solve(directory: Path, batches: list[list[Sample]], image_token: int, steps: int = 20) -> Reference:
    """Logits, loss and gradients at the start, then the losses of `steps` AdamW updates."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    model.train()
    with torch.no_grad():
        logits = [logits_of(model, samples, image_token) for samples in batches]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.999), eps=1e-8
    )
    losses, norms, grads = [], [], {}
    for step in range(steps):
        optimizer.zero_grad()
        loss = _loss(model, batches, image_token)
        loss.backward()
        if step == 0:
            grads = {hub_name(n): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        losses.append(loss.item())
    return Reference(logits, losses[0], grads, losses, norms)
