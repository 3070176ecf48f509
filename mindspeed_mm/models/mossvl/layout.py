"""Where every frame of a batch lies in the vision sequence: integers only, the same for every engine.

The vision sequence of a sample holds its media in text order; every frame is its merged patches followed by one
separator. An image is one frame, a video has one per grid step. Frames are paired with image tokens inside each sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mindspeed_mm.errors import DataError


@dataclass(frozen=True, slots=True)
class Frame:
    """Merged height and width of one frame."""

    height: int
    width: int

    @property
    def num_tokens(self) -> int:
        """Vision tokens of the frame, its separator included."""
        return self.height * self.width + 1

    @property
    def extent(self) -> int:
        """How far the frame moves the running position on, before its separator."""
        return max(self.height, self.width)


@dataclass(frozen=True, slots=True)
class VisionLayout:
    """Frames of every sample of a batch, and the padded length of the vision sequence."""

    frames: tuple[tuple[Frame, ...], ...]
    padded_length: int

    @classmethod
    def build(
        cls,
        grid_thw: Sequence[Sequence[int]],
        media_nums: Sequence[int] | None = None,
        *,
        merge_size: int,
        pad_multiple: int = 1,
    ) -> VisionLayout:
        """Layout of a batch.

        Args:
            grid_thw: one (frames, height, width) per medium, in patches, sample after sample in text order.
            media_nums: media of each sample; None means that there is one sample.
            merge_size: side of the square of patches that becomes one token.
            pad_multiple: the padded length is a multiple of this.
        Raises:
            DataError: grids that are no multiple of merge_size, or media_nums that do not add up to the grids.
        """
        media_nums = [len(grid_thw)] if media_nums is None else list(media_nums)
        if sum(media_nums) != len(grid_thw):
            raise DataError(f"media_nums_per_sample = {media_nums} adds up to {sum(media_nums)}, but grid_thw has "
                            f"{len(grid_thw)} rows")  # fmt: skip
        bad = [tuple(grid) for grid in grid_thw if min(grid) < 1 or grid[1] % merge_size or grid[2] % merge_size]
        if bad:
            raise DataError(f"grid {bad[0]} must be positive, with height and width multiples of {merge_size}")
        samples, start = [], 0
        for count in media_nums:
            media = grid_thw[start : start + count]
            samples.append(tuple(Frame(h // merge_size, w // merge_size) for t, h, w in media for _ in range(t)))
            start += count
        longest = max((sum(frame.num_tokens for frame in frames) for frames in samples), default=0)
        return cls(tuple(samples), -(-longest // pad_multiple) * pad_multiple)

    @property
    def lengths(self) -> list[int]:
        """Vision tokens of each sample, separators included, without padding."""
        return [sum(frame.num_tokens for frame in frames) for frames in self.frames]

    @property
    def num_frames(self) -> int:
        """Frames of the sample that has most."""
        return max((len(frames) for frames in self.frames), default=0)

    def extents(self) -> Tensor:
        """[b, frames] int64: `Frame.extent`, 0 where a sample has fewer frames."""
        return _padded([[frame.extent for frame in frames] for frames in self.frames], self.num_frames)

    def boundaries(self) -> Tensor:
        """[b, frames + 1] int64: vision tokens before each frame; constant after a sample's last frame."""
        counts = _padded([[frame.num_tokens for frame in frames] for frames in self.frames], self.num_frames)
        return torch.nn.functional.pad(counts.cumsum(1), (1, 0))


def pack_states(merged: Tensor, separator: Tensor, layout: VisionLayout) -> Tensor:
    """Vision tokens of a batch with a separator after every frame, padded with zeros.

    Args:
        merged: [tokens, h], media after media, without separators.
        separator: [h].
    Returns:
        [b, layout.padded_length, h].
    Raises:
        DataError: `merged` has another length than the layout says.
    """
    sizes = [frame.num_tokens - 1 for frames in layout.frames for frame in frames]
    if sum(sizes) != merged.shape[0]:
        raise DataError(f"the vision tower gave {merged.shape[0]} tokens, but grid_thw stands for {sum(sizes)}")
    # One gather instead of a concatenation of thousands of frames: row 0 is the zero padding, row 1 the separator.
    table = torch.cat([merged.new_zeros(1, merged.shape[1]), separator.to(merged.dtype)[None], merged])
    rows = torch.zeros(len(layout.frames), layout.padded_length, dtype=torch.int64)
    start = 2
    for sample, frames in enumerate(layout.frames):
        tokens = torch.tensor([frame.num_tokens for frame in frames], dtype=torch.int64)
        is_token = torch.ones(int(tokens.sum()), dtype=torch.int64)
        is_token[tokens.cumsum(0) - 1] = 0
        content = torch.where(is_token.bool(), start + is_token.cumsum(0) - 1, 1)
        rows[sample, : content.numel()] = content
        start += int(is_token.sum())
    return table[rows.to(merged.device)]


def _padded(rows: list[list[int]], width: int) -> Tensor:
    padded = torch.zeros(len(rows), width, dtype=torch.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return padded
