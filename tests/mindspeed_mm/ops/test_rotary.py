"""Rotary tables and their application equal the published formula: sections of the frequencies, rotate-half."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import gradcheck

from mindspeed_mm.ops.rotary import apply_rotary, inverse_frequencies, mrope_tables, vision_tables


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def test_text_frequencies_take_their_section_of_the_positions() -> None:
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(0, 500, (3, 11), generator=generator)
    query = torch.randn(11, 4, 32, generator=generator)
    sections = [4, 6, 6]
    angles = positions[..., None].float() * inverse_frequencies(32, 1e6)
    full = torch.cat([angles, angles], dim=-1)
    # The published form: the doubled sections are cut, and chunk i takes row i mod 3.
    chunks = full.split(sections * 2, dim=-1)
    table = torch.cat([chunk[number % 3] for number, chunk in enumerate(chunks)], dim=-1)[:, None]
    expected = query * table.cos() + rotate_half(query) * table.sin()
    cos, sin = mrope_tables(positions, sections, 1e6, torch.float32)
    torch.testing.assert_close(apply_rotary(query, cos, sin), expected, rtol=1e-6, atol=1e-6)


def test_vision_rotation_is_done_in_float32_and_keeps_the_dtype() -> None:
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(0, 40, (9, 2), generator=generator)
    query = torch.randn(9, 4, 24, generator=generator)
    angles = (positions[..., None].float() * inverse_frequencies(12, 10000.0)).flatten(1)
    table = torch.cat([angles, angles], dim=-1)[:, None]
    cos, sin = vision_tables(positions, 24)
    expected = query * table.cos() + rotate_half(query) * table.sin()
    torch.testing.assert_close(apply_rotary(query, cos, sin), expected, rtol=1e-6, atol=1e-6)
    low = apply_rotary(query.bfloat16(), cos, sin)
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, apply_rotary(query.bfloat16().float(), cos, sin).bfloat16())


def test_rotation_has_the_gradient_of_its_formula() -> None:
    positions = torch.arange(12).view(3, 4)
    cos, sin = mrope_tables(positions, (1, 1, 1), 100.0, torch.float64)
    x = torch.randn(4, 2, 6, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda value: apply_rotary(value, cos, sin), (x,))


def test_frequencies_stay_float32_under_a_bf16_default() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert inverse_frequencies(128, 1e6).dtype == torch.float32
    finally:
        torch.set_default_dtype(before)
