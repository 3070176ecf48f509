"""Rotary tables and table interpolation (test vectors 9 and 10)."""

import torch
from torch.testing import assert_close

from mindspeed_mm.models.mossvl.rope import (
    interleaved_rope,
    inverse_frequencies,
    merge_block_order,
    position_corners,
    rope_axes,
    rotate,
    vision_rope,
)


def test_axes_interleave_and_end_with_time() -> None:
    assert "".join("THW"[axis] for axis in rope_axes((24, 20, 20))) == "THW" * 20 + "TTTT"
    assert rope_axes((2, 1, 1)).tolist() == [0, 1, 2, 0]


def test_text_tables() -> None:
    frequencies = inverse_frequencies(5e6, 128)
    assert_close(frequencies[:4], torch.tensor([1, 0.785830, 0.617529, 0.485273]), atol=2e-6, rtol=0)
    assert_close(frequencies[-1], torch.tensor(2.545080e-07), atol=1e-12, rtol=0)
    position = torch.tensor([5, 7, 9]).view(3, 1, 1)
    cos, sin = interleaved_rope(position, theta=5e6, section=(24, 20, 20), dtype=torch.float32)
    expected = torch.tensor([0.283662, 0.709241, 0.748217, -0.754943, -0.890570, -0.902798])
    assert_close(cos[0, 0, :6], expected, atol=2e-5, rtol=0)
    expected = torch.tensor([-0.958924, -0.704966, -0.663455, 0.655791, 0.454847, 0.430065])
    assert_close(sin[0, 0, :6], expected, atol=2e-5, rtol=0)
    assert torch.equal(cos[..., :64], cos[..., 64:])


def test_equal_axes_are_an_ordinary_rope() -> None:
    position = torch.arange(11)[None]
    one = interleaved_rope(position, theta=1e4, section=(8, 4, 4), dtype=torch.float32)
    three = interleaved_rope(position.expand(3, 1, -1), theta=1e4, section=(8, 4, 4), dtype=torch.float32)
    assert torch.equal(one[0], three[0])
    assert torch.equal(one[1], three[1])


def test_rotation_pairs_the_halves() -> None:
    x, angle = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.3, 0.5, 0.3, 0.5])
    cos, sin = angle.cos(), angle.sin()
    rotated = rotate(x, cos, sin)
    assert_close(rotated[0], x[0] * cos[0] - x[2] * sin[0])
    assert_close(rotated[3], x[3] * cos[1] + x[1] * sin[1])


def test_vision_tables() -> None:
    frequencies = inverse_frequencies(10000.0, 36)
    assert_close(frequencies[:4], torch.tensor([1, 0.599484, 0.359381, 0.215443]), atol=2e-6, rtol=0)
    cos, sin = vision_rope(torch.tensor([[1, 4, 6]]), head_size=72, merge_size=2)
    angles = torch.atan2(sin, cos)[5]
    assert_close(angles[:3], torch.zeros(3))
    assert_close(angles[18:21], torch.tensor([3, 1.798453, 1.078144]), atol=2e-5, rtol=0)
    assert torch.equal(cos[:, :36], cos[:, 36:])


def test_table_corners() -> None:
    indices, weights = position_corners(4, 6, 48)
    assert indices[:, 0].tolist() == [0, 1, 48, 49]
    assert indices[:, 1].tolist() == [9, 10, 57, 58]
    assert indices[:, 7].tolist() == [729, 730, 777, 778]
    assert indices[:, 23].tolist() == [2303] * 4
    for patch, expected in {
        0: [1, 0, 0, 0],
        1: [0.6, 0.4, 0, 0],
        7: [0.2, 0.133333, 0.4, 0.266667],
        23: [1, 0, 0, 0],
    }.items():
        assert_close(weights[:, patch], torch.tensor(expected, dtype=torch.float32), atol=2e-5, rtol=0)


def test_blocks_of_patches_are_neighbours() -> None:
    order = merge_block_order(torch.arange(24)[:, None], 4, 6, 2).flatten().tolist()
    assert order == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11, 12, 13, 18, 19, 14, 15, 20, 21, 16, 17, 22, 23]
