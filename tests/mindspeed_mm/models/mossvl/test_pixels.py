"""Sizes and patches (test vectors 2 to 5)."""

import pytest
import torch

from mindspeed_mm.errors import DataError
from mindspeed_mm.models.mossvl.pixels import image_size, image_sizes, patchify, resize, video_sizes

LIMITS = {"min_pixels": 4096, "max_pixels": 16777216, "factor": 32}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((96, 128), (96, 128)),
        ((30, 30), (64, 64)),
        ((48, 80), (64, 64)),
        ((80, 80), (64, 64)),
        ((33, 47), (64, 96)),
        ((16, 600), (32, 416)),
        ((224, 224), (224, 224)),
        ((480, 640), (480, 640)),
        ((1080, 1920), (1088, 1920)),
        ((2160, 3840), (2176, 3840)),
        ((5000, 5000), (4096, 4096)),
        ((8000, 1000), (8000, 992)),
        ((100, 20000), (96, 20000)),
    ],
)
def test_image_sizes(given: tuple[int, int], expected: tuple[int, int]) -> None:
    assert image_size(*given, **LIMITS) == expected


def test_a_smaller_limit() -> None:
    limits = {**LIMITS, "max_pixels": 262144}
    assert image_size(1080, 1920, **limits) == (384, 672)
    assert image_size(480, 640, **limits) == (416, 576)


def test_pictures_share_the_budget_of_a_call() -> None:
    def sizes(given: list[tuple[int, int]], budget: int | None) -> list[tuple[int, int]]:
        return image_sizes(given, budget=budget, **LIMITS)

    assert sizes([(4000, 4000)] * 5, 65536000) == [(3616, 3616)] * 5
    assert sizes([(4000, 4000)] * 3, 65536000) == [(4000, 4000)] * 3
    assert sizes([(4000, 4000)] * 4, 65536000) == [(4000, 4000)] * 4
    assert sizes([(1080, 1920)] * 20, 65536000) == [(1088, 1920)] * 20
    assert sizes([(1080, 1920)] * 40, 65536000) == [(960, 1696)] * 40
    mixed = [(3000, 4000), (3000, 4000), (1080, 1920)]
    assert sizes(mixed, 16777216) == [(2400, 3200), (2400, 3200), (864, 1536)]
    assert sizes([(64, 64), (4000, 4000)], 1048576) == [(64, 64), (992, 992)]
    assert sizes([(1000, 1000)] * 2, None) == [(992, 992)] * 2


@pytest.mark.parametrize(
    ("units", "smaller", "larger"),
    [
        ([(10, 720, 1280)], [(704, 1280)], [(704, 1280)]),
        ([(71, 720, 1280)], [(704, 1280)], [(704, 1280)]),
        ([(100, 720, 1280)], [(576, 1056)], [(704, 1280)]),
        ([(256, 1080, 1920)], [(352, 672)], [(640, 1152)]),
        ([(256, 1080, 1920), (10, 720, 1280)], [(352, 640), (224, 416)], [(640, 1152), (416, 768)]),
        ([(4, 48, 64)], [(64, 64)], [(64, 64)]),
        ([(8, 240, 320)], [(256, 320)], [(256, 320)]),
        ([(1, 4320, 7680)], [(3072, 5440)], [(3072, 5440)]),
    ],
)
def test_video_sizes(units: list[tuple[int, int, int]], smaller: list[object], larger: list[object]) -> None:
    assert video_sizes(units, budget=65536000, **LIMITS) == smaller
    assert video_sizes(units, budget=201326592, **LIMITS) == larger


def test_patches() -> None:
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(96), indexing="ij")
    picture = torch.stack([2 * rows, 2 * columns, torch.full_like(rows, 10)]).to(torch.uint8)[None]
    patches = patchify(picture, patch_size=16, merge_size=2, mean=[0.5] * 3, std=[0.5] * 3)
    assert patches.shape == (24, 768)
    expected = {
        (0, 0): -1.0,
        (5, 55): -0.952941,
        (5, 311): -0.137255,
        (5, 512): -0.921569,
        (14, 0): -0.247059,
        (23, 255): -0.011765,
        (23, 511): 0.490196,
        (23, 767): -0.921569,
    }
    for (row, column), value in expected.items():
        assert patches[row, column].item() == pytest.approx(value, abs=2e-6)
    number = torch.arange(24).view(1, 1, 4, 6).expand(1, 3, 4, 6).to(torch.uint8)
    order = patchify(
        number.repeat_interleave(16, 2).repeat_interleave(16, 3), patch_size=16, merge_size=2, mean=[0] * 3, std=[1] * 3
    )
    expected_order = [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11, 12, 13, 18, 19, 14, 15, 20, 21, 16, 17, 22, 23]
    assert (order[:, 0] * 255).round().int().tolist() == expected_order


def test_a_fitting_picture_is_not_resampled() -> None:
    picture = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    assert resize(picture, 64, 96) is picture
    assert resize(picture, 32, 64).shape == (1, 3, 32, 64)


@pytest.mark.parametrize(("height", "width"), [(10, 2001), (0, 5), (4001, 20)])
def test_unusable_pictures_are_refused(height: int, width: int) -> None:
    with pytest.raises(DataError):
        image_size(height, width, **LIMITS)


@pytest.mark.parametrize("unit", [(4, 31, 64), (4, 64, 20), (1, 32, 6432)])
def test_unusable_frames_are_refused(unit: tuple[int, int, int]) -> None:
    with pytest.raises(DataError):
        video_sizes([unit], budget=None, **LIMITS)
