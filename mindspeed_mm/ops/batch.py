"""One micro-batch as every room sees it, and its form for sending between processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mindspeed_mm.errors import DataError

# "MM", layout 1: two releases that pack differently fail loudly instead of shifting fields.
_PAYLOAD_MARK = 0x4D4D_0001
_HEADER_SIZE = 6


@dataclass(frozen=True, slots=True)
class Batch:
    """One padding-free micro-batch: its samples lie one after another in one row.

    All tensors are on the CPU when the loader makes them. `s` is the number of tokens of all samples together, `p` the
    number of vision patches of all media together.
    """

    input_ids: Tensor
    """[s] int64."""
    labels: Tensor
    """[s] int64, already shifted: what position i must predict, or -100; the last position of every sample is -100."""
    position_ids: Tensor
    """[3, s] int64: temporal, height and width positions (M-RoPE); they start at 0 in every sample."""
    cu_seqlens: Tensor
    """[samples + 1] int32: where each sample starts, and s."""
    image_rows: Tensor
    """[k] int64: rows of `input_ids` that take the vision embeddings, in order; empty when there is only text."""
    grid_thw: Tensor
    """[media, 3] int64: patches of each image or video in time, height and width, in order of appearance; one dummy
    (1, 2, 2) when there is none, so that the vision tower runs on every rank."""
    pixel_values: Tensor | None = None
    """[p, in_channels * temporal_patch_size * patch_size**2] float32; zeros for the dummy; None where no stage embeds
    patches."""

    @property
    def num_tokens(self) -> int:
        """Real tokens of the micro-batch, s."""
        return self.input_ids.numel()

    @property
    def num_samples(self) -> int:
        """Samples in the row."""
        return self.cu_seqlens.numel() - 1

    @property
    def num_patches(self) -> int:
        """Patches of all media, p; known without the pixels."""
        return int(self.grid_thw.prod(dim=1).sum())

    @property
    def is_text_only(self) -> bool:
        """Whether no row takes a vision embedding: the pixels then are the dummy's."""
        return self.image_rows.numel() == 0

    def without_pixels(self) -> Batch:
        """The same batch for a rank that embeds no patches."""
        return replace(self, pixel_values=None)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; torch's DataLoader calls this by name."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            input_ids=function(self.input_ids),
            labels=function(self.labels),
            position_ids=function(self.position_ids),
            cu_seqlens=function(self.cu_seqlens),
            image_rows=function(self.image_rows),
            grid_thw=function(self.grid_thw),
            pixel_values=None if self.pixel_values is None else function(self.pixel_values),
        )

    def to_payload(self) -> Tensor:
        """Everything but the pixels as one tensor, so that a batch crosses processes without pickle.

        Returns:
            [n] int64 on the device of `input_ids`: a header (mark, n, s, samples, k, media), then the fields in order.
        """
        body = [self.input_ids, self.labels, self.position_ids, self.cu_seqlens, self.image_rows, self.grid_thw]
        sizes = [self.num_tokens, self.num_samples, self.image_rows.numel(), self.grid_thw.shape[0]]
        length = _HEADER_SIZE + sum(part.numel() for part in body)
        header = torch.tensor([_PAYLOAD_MARK, length, *sizes], dtype=torch.int64, device=self.input_ids.device)
        return torch.cat([header, *(part.reshape(-1).to(torch.int64) for part in body)])

    @classmethod
    def from_payload(cls, payload: Tensor, pixel_values: Tensor | None = None) -> Batch:
        """The batch that `to_payload` packed.

        Args:
            payload: [n or more] int64; anything after n (a receive buffer may be larger) is ignored.
            pixel_values: the patches, when this rank has them.
        Raises:
            DataError: the tensor is not a payload or is cut short.
        """
        header = payload[:_HEADER_SIZE].tolist()
        mark, length, s, samples, k, media = header if len(header) == _HEADER_SIZE else [0] * _HEADER_SIZE
        sizes = [s, s, 3 * s, samples + 1, k, 3 * media]
        if mark != _PAYLOAD_MARK or length > payload.numel() or length != _HEADER_SIZE + sum(sizes):
            raise DataError(
                f"{payload.numel()} integers that start with {header} are not a batch payload: sender and receiver "
                "disagree on what is sent"
            )
        # Cloned: the parts must not share (and keep alive) the receive buffer, which the caller may reuse.
        parts = [part.clone() for part in payload[_HEADER_SIZE:length].split(sizes)]
        return cls(
            input_ids=parts[0],
            labels=parts[1],
            position_ids=parts[2].view(3, s),
            cu_seqlens=parts[3].to(torch.int32),
            image_rows=parts[4],
            grid_thw=parts[5].view(media, 3),
            pixel_values=pixel_values,
        )
