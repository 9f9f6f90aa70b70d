"""Views are random picture by picture, repeat with their generator, and move pixels only where the recipe says.

Geometry is read off a picture whose red and green are the coordinates of each pixel: what a view holds at a
place is then where it was taken from, and its blue tells whether that lies inside the picture.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Generator, Tensor

from training.augment import augment, luminance
from training.recipe import Augmentation

SIDE = 32
EACH: dict[str, dict[str, Any]] = {  # every change alone, at full chance
    "crop_area": {"crop_area": 0.3},
    "flip": {"flip": 1},
    "rotation": {"rotation": 30},
    "scale": {"scale": 0.3},
    "shear": {"shear": 0.4},
    "shift": {"shift": 0.2},
    "elastic": {"elastic": 0.1},
    "stroke": {"stroke": 1},
    "jitter": {"jitter": 1},
    "grey": {"grey": 1},
    "erase": {"erase": 1},
}
ALL = Augmentation(**{key: value for change in EACH.values() for key, value in change.items()} | {"grey": 0.5})


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def noise(count: int, channels: int = 3) -> Tensor:
    return torch.rand(count, channels, SIDE, SIDE, generator=seeded(42))


def copies(count: int) -> Tensor:
    return noise(1).repeat(count, 1, 1, 1)


class Geometry(NamedTuple):
    """source = matrix · view + shift, in shares of the side from the picture's centre; residual of the fit."""

    matrix: Tensor  # (N, 2, 2)
    shift: Tensor  # (N, 2)
    residual: Tensor  # (N,)


def sampled(count: int, **changes: float) -> tuple[Tensor, Tensor, Tensor]:
    """Where each pixel of a view comes from (N, S·S, 2), where it lies (S·S, 2), and whether both are inside."""
    ruler = (torch.arange(SIDE) + 0.5) / SIDE  # pixel centres, 0..1
    down, across = torch.meshgrid(ruler, ruler, indexing="ij")
    chart = torch.stack([across, down, torch.ones(SIDE, SIDE)]).expand(count, 3, SIDE, SIDE)
    views = augment(chart, Augmentation(**changes), seeded())
    sources = views[:, :2].flatten(2).transpose(1, 2)  # (N, S·S, 2)
    lowest, highest = sources.amin(2), sources.amax(2)
    inside = (views[:, 2].flatten(1) > 0.9999) & (lowest > 0.6 / SIDE) & (highest < 1 - 0.6 / SIDE)
    return sources - 0.5, torch.stack([across, down], -1).flatten(0, 1) - 0.5, inside


def geometry(count: int = 200, **changes: float) -> Geometry:
    sources, places, inside = sampled(count, **changes)
    fits = []
    for source, within in zip(sources, inside, strict=True):
        design = torch.cat([places[within], torch.ones(int(within.sum()), 1)], 1).double()
        solution = torch.linalg.lstsq(design, source[within].double()).solution  # (3, 2)
        residual = (design @ solution - source[within]).abs().max()
        fits.append((solution[:2].T, solution[2], residual))
    matrix, shift, residual = (torch.stack(part) for part in zip(*fits, strict=True))
    return Geometry(matrix, shift, residual)


IDENTITY = torch.eye(2, dtype=torch.float64)


@pytest.mark.parametrize("channels", [1, 3])
def test_with_everything_off_a_view_is_its_picture(channels: int) -> None:
    pictures = noise(4, channels)
    torch.testing.assert_close(augment(pictures, Augmentation(), seeded()), pictures, atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_view_keeps_shape_type_and_range(channels: int) -> None:
    pictures = noise(50, channels).round()  # black and white: interpolation has no room to spare
    views = augment(pictures, ALL, seeded())
    assert views.shape == pictures.shape
    assert views.dtype == torch.float32
    assert float(views.min()) >= 0
    assert float(views.max()) <= 1


def test_the_same_seed_repeats_and_the_next_call_differs() -> None:
    pictures, generator = noise(8), seeded(5)
    before = pictures.clone()
    first, second = augment(pictures, ALL, generator), augment(pictures, ALL, generator)
    assert torch.equal(first, augment(pictures, ALL, seeded(5)))
    assert bool((first - second).abs().amax((1, 2, 3)).gt(0.01).all())
    assert torch.equal(pictures, before)


def test_torchs_own_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    augment(noise(2), ALL, seeded())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("change", EACH)
def test_each_change_alone_changes_every_picture(change: str) -> None:
    pictures = noise(16)
    views = augment(pictures, Augmentation(**EACH[change]), seeded())
    assert bool((views - pictures).abs().amax((1, 2, 3)).gt(1e-4).all())


@pytest.mark.parametrize("change", EACH)
def test_rows_of_identical_pictures_get_numbers_of_their_own(change: str) -> None:
    settings = EACH[change] | ({change: 0.5} if change in ("flip", "grey") else {})
    views = augment(copies(16), Augmentation(**settings), seeded())
    kinds = {view.numpy().tobytes() for view in views}
    assert len(kinds) == (2 if change in ("flip", "grey") else 16)


@pytest.mark.parametrize("change", ["flip", "grey", "jitter", "erase", "stroke"])
def test_a_chance_is_met_in_that_share_of_the_rows(change: str) -> None:
    pictures = copies(600)
    views = augment(pictures, Augmentation(**{change: 0.3}), seeded())
    share = (views - pictures).abs().amax((1, 2, 3)).gt(1e-3).float().mean()
    assert float(share) == pytest.approx(0.3, abs=0.06)  # over three standard deviations


def test_a_certain_flip_mirrors_left_and_right() -> None:
    pictures = noise(4)
    views = augment(pictures, Augmentation(flip=1), seeded())
    torch.testing.assert_close(views, pictures.flip(3), atol=1e-5, rtol=0)


def test_rotation_turns_without_stretching_up_to_its_angle() -> None:
    found = geometry(rotation=40)
    torch.testing.assert_close(
        found.matrix @ found.matrix.transpose(1, 2), IDENTITY.expand(200, 2, 2), atol=1e-4, rtol=0
    )
    angles = torch.atan2(found.matrix[:, 1, 0], found.matrix[:, 0, 0]).rad2deg()
    assert 35 < float(angles.max()) <= 40.01
    assert -40.01 <= float(angles.min()) < -35
    assert float(found.shift.abs().max()) < 1e-5


def test_scale_stretches_each_axis_by_itself() -> None:
    found = geometry(scale=0.3)
    across, down = found.matrix[:, 0, 0], found.matrix[:, 1, 1]
    for axis in (across, down):
        assert 0.7 <= float(axis.min()) < 0.75
        assert 1.25 < float(axis.max()) <= 1.3001
    assert abs(float(np.corrcoef(across, down)[0, 1])) < 0.25
    assert float(found.matrix[:, [0, 1], [1, 0]].abs().max()) < 1e-4


def test_shear_slants_rows_and_leaves_columns() -> None:
    found = geometry(shear=0.4)
    slant = found.matrix[:, 0, 1]
    assert -0.4001 <= float(slant.min()) < -0.35
    assert 0.35 < float(slant.max()) <= 0.4001
    rest = found.matrix - IDENTITY
    rest[:, 0, 1] = 0
    assert float(rest.abs().max()) < 1e-4


def test_shift_moves_by_a_share_of_the_side() -> None:
    found = geometry(shift=0.2)
    torch.testing.assert_close(found.matrix, IDENTITY.expand(200, 2, 2), atol=1e-4, rtol=0)
    for furthest in found.shift.abs().amax(0).tolist():  # across, down
        assert 0.18 < furthest <= 0.2001
    assert abs(float(np.corrcoef(found.shift[:, 0], found.shift[:, 1])[0, 1])) < 0.25


def test_all_of_the_geometry_together_is_still_one_affine_map() -> None:
    found = geometry(rotation=20, scale=0.2, shear=0.2, shift=0.1, crop_area=0.5, flip=0.5)
    assert float(found.residual.max()) < 1e-4


@pytest.mark.parametrize("crop_area", [0.08, 0.3, 0.9])
def test_a_crop_keeps_its_area_and_aspect_and_stays_inside(crop_area: float) -> None:
    found = geometry(crop_area=crop_area)
    width, height = found.matrix[:, 0, 0], found.matrix[:, 1, 1]
    assert crop_area - 1e-3 <= float((width * height).min()) < crop_area + 0.1
    assert float((width * height).max()) <= 1.0001
    assert float((width * height).max()) > 0.95
    assert 3 / 4 - 1e-3 <= float((width / height).min()) < 1 < float((width / height).max()) <= 4 / 3 + 1e-3
    reach = torch.stack([width, height], 1) / 2 + found.shift.abs()
    assert float(reach.max()) <= 0.5001
    assert float(found.shift.abs().max()) > (0.2 if crop_area < 0.5 else 0.01)


@pytest.mark.parametrize("flip", [0.0, 0.5])
@pytest.mark.parametrize("crop_area", [0.08, 0.3, 0.9])
def test_a_crop_shows_no_border(crop_area: float, flip: float) -> None:
    views = augment(torch.ones(500, 1, SIDE, SIDE), Augmentation(crop_area=crop_area, flip=flip), seeded())
    assert float(views.min()) > 0.9999


def test_elastic_moves_pixels_smoothly_by_up_to_a_share_of_the_side() -> None:
    sources, places, inside = sampled(100, elastic=0.1)
    moved = (sources - places)[inside].norm(dim=1)
    assert 0.08 < float(moved.max()) < 0.1 * math.sqrt(2) * 1.5  # both axes at once, and the spline's overshoot
    field = (sources - places).reshape(-1, SIDE, SIDE, 2)
    beside = inside.reshape(-1, SIDE, SIDE)
    step = (field[:, :, 1:] - field[:, :, :-1]).norm(dim=-1)[beside[:, :, 1:] & beside[:, :, :-1]]
    assert float(step.max()) < 0.05  # a third of the side lies between two corners of the 4×4 grid
    assert float(geometry(20, elastic=0.1).residual.min()) > 0.01


def test_stroke_thickens_some_and_thins_others() -> None:
    pictures = torch.zeros(100, 1, SIDE, SIDE)
    pictures[:, :, 10:20, 10:20] = 1
    ink = augment(pictures, Augmentation(stroke=1), seeded()).sum((1, 2, 3))
    assert 30 < int((ink > 100.01).sum()) < 70
    assert 30 < int((ink < 99.99).sum()) < 70
    assert float(ink.max()) <= 144.001  # one pixel on every side
    assert float(ink.min()) >= 81.999  # half of the way to 64


def test_jitter_keeps_brightness_within_its_strength() -> None:
    flat = torch.full((300, 3, SIDE, SIDE), 0.5)  # no contrast and no colour to change
    tones = augment(flat, Augmentation(jitter=1, jitter_strength=0.4), seeded())
    assert float((tones.amax((1, 2, 3)) - tones.amin((1, 2, 3))).max()) < 1e-5
    assert 0.3 - 1e-5 <= float(tones.min()) < 0.32
    assert 0.68 < float(tones.max()) <= 0.7 + 1e-5


def test_jitter_changes_contrast_of_grey_and_saturation_of_colour() -> None:
    grey = noise(1, 1).repeat(200, 1, 1, 1) / 2
    views = augment(grey, Augmentation(jitter=1, jitter_strength=0.2), seeded())
    contrast = views.std((1, 2, 3)) / views.mean((1, 2, 3)) * grey[0].mean() / grey[0].std()
    assert 0.8 - 1e-3 <= float(contrast.min()) < 0.85
    assert 1.15 < float(contrast.max()) <= 1.2 + 1e-3
    colour = torch.tensor([0.5, 0.3, 0.3]).view(1, 3, 1, 1).expand(200, 3, SIDE, SIDE)
    views = augment(colour, Augmentation(jitter=1, jitter_strength=0.2), seeded())
    red = views[:, 0] - views[:, 1]
    saturation = (red / luminance(views)[:, 0]).mean((1, 2)) * float(luminance(colour)[0].mean()) / 0.2
    assert float(saturation.min()) < 0.75  # contrast alone, which colour shares, gives 0.8 to 1.2
    assert float(saturation.max()) > 1.25


def test_grey_leaves_three_equal_channels_of_luminance() -> None:
    pictures = noise(4)
    views = augment(pictures, Augmentation(grey=1), seeded())
    assert torch.equal(views[:, 0], views[:, 1])
    assert torch.equal(views[:, 0], views[:, 2])
    torch.testing.assert_close(views[:, :1], luminance(pictures), atol=1e-5, rtol=0)


def test_erase_blanks_one_square_of_a_sixth_to_a_third() -> None:
    views = augment(torch.ones(300, 1, SIDE, SIDE), Augmentation(erase=1), seeded())
    blank = views[:, 0] == 0
    rows, columns = blank.any(2), blank.any(1)
    assert torch.equal(blank, rows[:, :, None] & columns[:, None, :])
    for sides in (rows.sum(1), columns.sum(1)):
        assert SIDE // 6 <= int(sides.min()) < SIDE // 5
        assert SIDE // 4 < int(sides.max()) <= SIDE // 3 + 1
    assert int((rows.sum(1) - columns.sum(1)).abs().max()) <= 1
    assert bool(rows.any(0).all())
    assert bool(columns.any(0).all())
    assert float(views[~blank[:, None]].min()) > 0.9999


def test_luminance_is_pillows_and_leaves_grey_alone() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(pixels).convert("L"), np.float32)
    found = luminance(torch.from_numpy(pixels).permute(2, 0, 1)[None].float())
    assert found.shape == (1, 1, 16, 16)
    assert np.abs(found[0, 0].numpy() - expected).max() <= 0.51
    grey = noise(2, 1)
    assert luminance(grey) is grey
