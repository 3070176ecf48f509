"""XRoPE positions: text tokens and vision tokens share one coordinate system of time, row and column."""

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed_mm.errors import DataError
from mindspeed_mm.models.mossvl.layout import VisionLayout


def text_positions(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    layout: VisionLayout | None,
    *,
    image_token_id: int,
    is_generating: bool = False,
) -> Tensor:
    """Position of every text token, equal on all three axes.

    A token moves the counter on by one; the image token of a frame of merged height H and width W takes the position
    of the frame's separator, max(H, W) further. Padding is 0 and moves nothing.

    Args:
        input_ids: [b, s] int64.
        attention_mask: [b, s], 0 on padding; None: no padding.
        layout: frames of each sample; None: there is no vision input and image tokens are ordinary.
        is_generating: image tokens beyond the sample's frames (a model may emit them) are ordinary, not an error.
    Returns:
        [b, s] int64.
    Raises:
        DataError: a sample has more image tokens than frames.
    Source: arXiv 2608.15045. Frames are paired with image tokens inside each sample (upstream pairs over the whole
        batch, which shifts samples behind a text-only one).
    """
    valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(torch.int64)
    advance = valid.clone()
    extent = torch.zeros_like(input_ids)
    if layout is not None and layout.num_frames:
        is_image, frame = frame_of_token(input_ids, attention_mask, image_token_id)
        counts = torch.tensor([len(frames) for frames in layout.frames], device=input_ids.device)
        has_frame = is_image & (frame < counts[:, None])
        if not is_generating and bool((is_image & ~has_frame).any()):
            raise DataError(
                f"samples have {is_image.sum(1).tolist()} image tokens, but {counts.tolist()} frames in grid_thw"
            )
        extents = layout.extents().to(input_ids.device)
        extent = extents.gather(1, frame.clamp(0, layout.num_frames - 1)) * has_frame
        advance = advance + extent
    return (advance.cumsum(1) - advance + extent) * valid


def frame_of_token(input_ids: Tensor, attention_mask: Tensor | None, image_token_id: int) -> tuple[Tensor, Tensor]:
    """Which tokens are image tokens, and the number of the last image token at or before each token.

    Returns:
        [b, s] bool, and [b, s] int64 (-1 before the first image token).
    """
    is_image = input_ids == image_token_id
    if attention_mask is not None:
        is_image = is_image & attention_mask.bool()
    return is_image, is_image.to(torch.int64).cumsum(1) - 1


def rope_deltas(positions: Tensor) -> Tensor:
    """What has to be added to a token's index to continue after the sample: largest position + 1 - length, [b]."""
    return positions.amax(1) + 1 - positions.shape[1]


def vision_positions(
    positions: Tensor, input_ids: Tensor, attention_mask: Tensor | None, layout: VisionLayout, *, image_token_id: int
) -> Tensor:
    """Time, row and column of every vision token.

    Args:
        positions: [b, s] int64, from `text_positions`.
    Returns:
        [3, b, layout.padded_length] int64; 0 on padding and on frames without an image token, which nothing sees.
    """
    result = torch.zeros(3, len(layout.frames), layout.padded_length, dtype=torch.int64)
    is_image = frame_of_token(input_ids, attention_mask, image_token_id)[0].cpu()
    positions = positions.cpu()
    for sample, frames in enumerate(layout.frames):
        separators = positions[sample][is_image[sample]]
        seen = frames[: separators.numel()]
        if not seen:
            continue
        height, width, tokens, extent = (
            torch.tensor([getattr(frame, name) for frame in seen])
            for name in ("height", "width", "num_tokens", "extent")
        )
        separators = separators[: len(seen)]
        starts = (separators - extent).repeat_interleave(tokens)
        place = torch.arange(int(tokens.sum())) - (tokens.cumsum(0) - tokens).repeat_interleave(tokens)
        columns = width.repeat_interleave(tokens)
        coordinates = torch.stack([starts, starts + place // columns, starts + place % columns])
        is_separator = place == (height * width).repeat_interleave(tokens)
        coordinates = torch.where(is_separator, separators.repeat_interleave(tokens), coordinates)
        result[:, sample, : place.numel()] = coordinates
    return result.to(input_ids.device)
