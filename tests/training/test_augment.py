"""Views are random picture by picture, repeat with their generator, and move pixels only where the recipe says.

Geometry is read off a picture whose red and green are the coordinates of each pixel: a view's colours are then the
place that its pixel was taken from, and its blue tells whether that lies inside the picture.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as torchvision

from training.augment import augment, colour_matrix, gaussian_kernels, luminance
from training.recipe import Augmentation

SIDE = 32
# Each change is tested alone, at full chance.
EACH: dict[str, dict[str, Any]] = {
    "crop_area": {"crop_area": 0.3},
    "flip": {"flip": 1},
    "rotation": {"rotation": 30},
    "scale": {"scale": 0.3},
    "shear": {"shear": 0.4},
    "shift": {"shift": 0.2},
    "elastic": {"elastic": 0.1},
    "stroke": {"stroke": 1},
    "jitter": {"jitter": 1},
    "hue": {"jitter": 1, "jitter_strength": 0, "hue": 0.5},
    "grey": {"grey": 1},
    "blur": {"blur": 1, "blur_radius": 0.25},
    "solarise": {"solarise": 1},
    "erase": {"erase": 1},
}
HALVES = {"jitter_strength": 0.4, "grey": 0.5, "blur": 0.5, "solarise": 0.5}
ALL = Augmentation(**{key: value for change in EACH.values() for key, value in change.items()} | HALVES)
# These changes have a chance, but no strength.
YES_OR_NO = ("flip", "grey", "solarise")


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


def sampled(count: int, **changes: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Each view pixel's source place (N, S·S, 2), its own place (S·S, 2), and whether both are inside."""
    # Pixel centres lie in 0..1.
    ruler = (torch.arange(SIDE) + 0.5) / SIDE
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
IDENTITY3 = torch.eye(3, dtype=torch.float64)
# The rows give Y, I and Q from r, g and b.
YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]], dtype=torch.float64)


@pytest.mark.parametrize("channels", [1, 3])
def test_with_everything_off_a_view_is_its_picture(channels: int) -> None:
    pictures = noise(4, channels)
    view = augment(pictures, Augmentation(), seeded())
    assert torch.equal(view, pictures)
    assert view.data_ptr() != pictures.data_ptr()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_view_keeps_shape_type_and_range(channels: int) -> None:
    # Black and white pixels leave no room for an interpolation that overshoots.
    pictures = noise(50, channels).round()
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
    settings = EACH[change] | ({change: 0.5} if change in YES_OR_NO else {})
    views = augment(copies(16), Augmentation(**settings), seeded())
    kinds = {view.numpy().tobytes() for view in views}
    assert len(kinds) == (2 if change in YES_OR_NO else 16)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("change", ["flip", "stroke", "jitter", "hue", "grey", "blur", "solarise", "erase"])
def test_a_chance_is_met_in_that_share_of_the_rows_and_leaves_the_others(change: str, channels: int) -> None:
    chance = "jitter" if change == "hue" else change
    pictures = noise(1, channels).repeat(600, 1, 1, 1)
    views = augment(pictures, Augmentation(**EACH[change] | {chance: 0.3}), seeded())
    moved = (views - pictures).abs().amax((1, 2, 3))
    # A sampling grid rounds even if it changes nothing.
    share = moved.gt(1e-5 if change == "flip" else 0).float().mean()
    colourless = channels == 1 and change in ("hue", "grey")
    # The tolerance is three standard deviations.
    assert float(share) == pytest.approx(0 if colourless else 0.3, abs=0.056)


def test_a_chance_that_hits_no_row_changes_nothing() -> None:
    pictures = noise(1)
    rare: dict[str, Any] = dict.fromkeys(("stroke", "jitter", "grey", "blur", "solarise", "erase"), 1e-12)
    assert torch.equal(augment(pictures, Augmentation(**rare), seeded()), pictures)


def test_a_change_switched_on_leaves_the_numbers_of_the_others() -> None:
    pictures = noise(50)
    others: dict[str, Any] = {"crop_area": 0.3, "elastic": 0.05, "jitter": 0.5}
    plain = augment(pictures, Augmentation(**others), seeded())
    views = augment(pictures, Augmentation(**others, solarise=0.5), seeded())
    same, inverted = (
        (views - expected).abs().amax((1, 2, 3)).eq(0) for expected in (plain, torchvision.solarize(plain, 0.5))
    )
    assert bool((same ^ inverted).all())
    assert 10 < int(inverted.sum()) < 40


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
    # The axes are across and down.
    for furthest in found.shift.abs().amax(0).tolist():
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


@pytest.mark.parametrize("areas", [(0.05, 0.4), (0.3, 0.3), (0.5, 1.0)])
def test_a_crop_keeps_a_share_between_the_two_given(areas: tuple[float, float]) -> None:
    # Each pixel of the picture is its own place across, and down.
    ruler = ((torch.arange(SIDE) + 0.5) / SIDE).expand(SIDE, SIDE)
    chart = torch.stack([ruler, ruler.T, torch.ones(SIDE, SIDE)]).expand(500, 3, SIDE, SIDE)
    views = augment(chart, Augmentation(crop_area=0.9), seeded(), 16, areas)
    assert views.shape == (500, 3, 16, 16)
    # The middle of a view is no border, and its slope is the crop's side.
    width = (views[:, 0, 8, 9] - views[:, 0, 8, 6]) * 16 / 3
    height = (views[:, 1, 9, 8] - views[:, 1, 6, 8]) * 16 / 3
    area = width * height
    assert areas[0] - 1e-3 <= float(area.min()) < areas[0] + 0.05
    assert areas[1] - 0.05 < float(area.max()) <= areas[1] + 1e-3
    assert float(views[:, 2].min()) > 0.9999
    assert float(views[:, 0].amin()) > 0
    # Crops come from everywhere in the picture.
    middle = views[:, :2, 7:9, 7:9].mean((2, 3))
    reach = (1 - areas[0] ** 0.5) / 2
    assert float(middle.amin()) < 0.5 - 0.7 * reach
    assert float(middle.amax()) > 0.5 + 0.7 * reach


@pytest.mark.parametrize("side", [8, 16, 48])
def test_a_view_of_another_side_is_an_interpolation(side: int) -> None:
    pictures = noise(4)
    views = augment(pictures, Augmentation(), seeded(), side)
    expected = F.interpolate(pictures, (side, side), mode="bilinear", align_corners=False)
    inner = slice(1, -1)
    torch.testing.assert_close(views[..., inner, inner], expected[..., inner, inner], atol=1e-5, rtol=0)


def test_each_change_works_at_another_side() -> None:
    views = augment(noise(50), ALL, seeded(), 13, (0.1, 0.5))
    assert views.shape == (50, 3, 13, 13)
    assert 0 <= float(views.min()) < float(views.max()) <= 1


@pytest.mark.parametrize("flip", [0.0, 0.5])
@pytest.mark.parametrize("crop_area", [0.08, 0.3, 0.9])
def test_a_crop_shows_no_border(crop_area: float, flip: float) -> None:
    views = augment(torch.ones(500, 1, SIDE, SIDE), Augmentation(crop_area=crop_area, flip=flip), seeded())
    assert float(views.min()) > 0.9999


def test_elastic_moves_pixels_smoothly_by_up_to_a_share_of_the_side() -> None:
    sources, places, inside = sampled(100, elastic=0.1)
    moved = (sources - places)[inside].norm(dim=1)
    # Both axes move at once, and the spline overshoots.
    assert 0.08 < float(moved.max()) < 0.1 * math.sqrt(2) * 1.5
    field = (sources - places).reshape(-1, SIDE, SIDE, 2)
    beside = inside.reshape(-1, SIDE, SIDE)
    step = (field[:, :, 1:] - field[:, :, :-1]).norm(dim=-1)[beside[:, :, 1:] & beside[:, :, :-1]]
    # A third of the side lies between two corners of the 4×4 grid.
    assert float(step.max()) < 0.05
    assert float(geometry(20, elastic=0.1).residual.min()) > 0.01


def test_stroke_thickens_some_and_thins_others() -> None:
    pictures = torch.zeros(100, 1, SIDE, SIDE)
    pictures[:, :, 10:20, 10:20] = 1
    ink = augment(pictures, Augmentation(stroke=1), seeded()).sum((1, 2, 3))
    assert 30 < int((ink > 100.01).sum()) < 70
    assert 30 < int((ink < 99.99).sum()) < 70
    # The stroke grows by one pixel on every side.
    assert float(ink.max()) <= 144.001
    # It shrinks half of the way to 64.
    assert float(ink.min()) >= 81.999


def test_stroke_blends_with_the_extremes_of_three_by_three() -> None:
    pictures = noise(50)
    views = augment(pictures, Augmentation(stroke=1), seeded())
    for picture, view in zip(pictures, views, strict=True):
        ways = (F.max_pool2d(picture, 3, 1, 1) - picture, -F.max_pool2d(-picture, 3, 1, 1) - picture)
        residuals = []
        for way, most in zip(ways, (1, 0.5), strict=True):
            amount = (((view - picture) * way).sum() / way.square().sum()).clamp(0, most)
            residuals.append(float((picture + amount * way - view).abs().max()))
        assert min(residuals) < 1e-5


def test_jitter_keeps_brightness_within_its_strength() -> None:
    # The picture has no contrast and no colour to change.
    flat = torch.full((300, 3, SIDE, SIDE), 0.5)
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
    # Contrast alone, which also scales colour, gives 0.8 to 1.2.
    assert float(saturation.min()) < 0.75
    assert float(saturation.max()) > 1.25


def test_jitter_is_brightness_then_contrast_then_saturation_and_hue() -> None:
    """Each view's four numbers are read off the affine colour map that a fit finds between picture and view."""
    # In this range nothing clips.
    pictures = 0.4 + 0.2 * noise(300).double()
    views = augment(pictures.float(), Augmentation(jitter=1, jitter_strength=0.2, hue=0.1), seeded()).double()
    before, after = (batch.flatten(2).transpose(1, 2) for batch in (pictures, views))  # (N, S·S, 3)
    fit = torch.linalg.lstsq(torch.cat([before, torch.ones_like(before[:, :, :1])], 2), after).solution  # (N, 4, 3)
    matrix, offset = fit[:, :3].transpose(1, 2), fit[:, 3]  # (N, 3, 3), (N, 3)
    torch.testing.assert_close(before @ matrix.transpose(1, 2) + offset[:, None], after, atol=1e-5, rtol=0)
    # Grey is mapped alike in each channel.
    tone = matrix.sum(2)
    torch.testing.assert_close(tone, tone[:, :1].expand(300, 3), atol=1e-4, rtol=0)
    torch.testing.assert_close(offset, offset[:, :1].expand(300, 3), atol=1e-4, rtol=0)
    mean = luminance(pictures).mean((1, 2, 3))
    # Brightness is measured at the mean, which contrast keeps.
    brightness = tone[:, 0] + offset[:, 0] / mean
    contrast = tone[:, 0] / brightness
    # Luminance stays; I and Q rotate and scale.
    colour = YIQ @ (matrix / tone[:, :1, None]) @ YIQ.inverse()
    torch.testing.assert_close(colour[:, 0], IDENTITY3[0].expand(300, 3), atol=1e-3, rtol=0)
    torch.testing.assert_close(colour[:, 1, 1], colour[:, 2, 2], atol=1e-3, rtol=0)
    torch.testing.assert_close(colour[:, 1, 2], -colour[:, 2, 1], atol=1e-3, rtol=0)
    saturation, turn = colour[:, 1:, 1].norm(dim=1), torch.atan2(colour[:, 2, 1], colour[:, 1, 1]) / (2 * math.pi)
    for number, low, high in [
        (brightness, 0.8, 1.2),
        (contrast, 0.8, 1.2),
        (saturation, 0.8, 1.2),
        (turn, -0.1, 0.1),
    ]:
        reach = (high - low) / 20
        assert low - 1e-3 <= float(number.min()) < low + reach
        assert high - reach < float(number.max()) <= high + 1e-3
    numbers = torch.stack([brightness, contrast, saturation, turn])
    assert float((torch.corrcoef(numbers) - torch.eye(4)).abs().max()) < 0.2


def test_colour_matrix_is_a_slow_loop_over_pixels() -> None:
    generator = np.random.default_rng(0)
    saturation, turn = generator.uniform(0, 2, 20), generator.uniform(-0.5, 0.5, 20)
    pictures = generator.uniform(0, 1, (20, 7, 3))
    expected = np.empty_like(pictures)
    for row, position in np.ndindex(20, 7):
        y, i, q = YIQ.numpy() @ pictures[row, position]
        colour = complex(i, q) * saturation[row] * np.exp(2j * np.pi * turn[row])
        expected[row, position] = np.linalg.solve(YIQ.numpy(), [y, colour.real, colour.imag])
    matrix = colour_matrix(torch.from_numpy(saturation).float(), torch.from_numpy(turn).float())
    assert np.abs(np.einsum("nij,npj->npi", matrix.numpy(), pictures) - expected).max() < 1e-5


def test_colour_matrix_at_its_corners() -> None:
    ones, luma = torch.ones(1), torch.tensor([0.299, 0.587, 0.114])
    assert torch.equal(colour_matrix(ones, 0 * ones)[0], torch.eye(3))
    torch.testing.assert_close(colour_matrix(0 * ones, ones / 3)[0], luma.expand(3, 3))
    # This is the opposite hue.
    torch.testing.assert_close(colour_matrix(ones, ones / 2)[0], 2 * luma.expand(3, 3) - torch.eye(3))
    # Luminance stays.
    torch.testing.assert_close(luma @ colour_matrix(2 * ones, ones / 5)[0], luma)


def test_hue_keeps_luminance_and_leaves_grey_pictures() -> None:
    pale = 0.4 + 0.2 * noise(50)
    views = augment(pale, Augmentation(**EACH["hue"]), seeded())
    torch.testing.assert_close(luminance(views), luminance(pale), atol=1e-5, rtol=0)
    grey = noise(50, 1).expand(50, 3, SIDE, SIDE)
    torch.testing.assert_close(augment(grey, Augmentation(**EACH["hue"]), seeded()), grey, atol=1e-5, rtol=0)


def test_pictures_of_one_channel_have_no_hue() -> None:
    pictures = noise(20, 1)
    jitter, hue = (augment(pictures, Augmentation(jitter=1, hue=hue), seeded()) for hue in (0, 0.5))
    assert torch.equal(jitter, hue)


def test_gaussian_kernels_are_a_slow_loop_over_taps() -> None:
    sigmas = [0.1, 0.5, 1.7, 6.0]
    found = gaussian_kernels(torch.tensor(sigmas), 4)
    for sigma, kernel in zip(sigmas, found.tolist(), strict=True):
        weights = [math.exp(-(tap**2) / (2 * sigma**2)) for tap in range(-4, 5)]
        assert kernel == pytest.approx([weight / sum(weights) for weight in weights], abs=1e-6)


@pytest.mark.parametrize("blur_radius", [0.02, 0.05, 0.25])
def test_blur_is_torchvisions_at_a_sigma_of_each_rows_own(blur_radius: float) -> None:
    pictures = noise(200)
    pictures[:, 0] = 0
    # Red becomes the kernel, from which its sigma is read.
    pictures[:, 0, 16, 16] = 1
    views = augment(pictures, Augmentation(blur=1, blur_radius=blur_radius), seeded())
    row = views[:, 0, 16].double()  # (N, S)
    sigmas = (0.5 / (row[:, 16] / row[:, 17]).log()).sqrt()
    largest = blur_radius * SIDE
    assert float(sigmas.min()) == pytest.approx(0.1, abs=0.02 * largest)
    assert float(sigmas.max()) == pytest.approx(largest, rel=0.02)
    taps = 2 * math.ceil(2 * largest) + 1
    for picture, view, sigma in zip(pictures, views, sigmas.tolist(), strict=True):
        expected = torchvision.gaussian_blur(picture, [taps, taps], [sigma, sigma])
        torch.testing.assert_close(view, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_blur_keeps_a_flat_picture_up_to_its_borders(channels: int) -> None:
    flat = torch.full((50, channels, SIDE, SIDE), 0.7)
    torch.testing.assert_close(augment(flat, Augmentation(**EACH["blur"]), seeded()), flat, atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_solarise_is_torchvisions_at_a_half(channels: int) -> None:
    pictures = noise(20, channels)
    pictures[0, 0, 0, :2] = torch.tensor([0.5, 1])
    views = augment(pictures, Augmentation(solarise=1), seeded())
    assert torch.equal(views, torchvision.solarize(pictures, 0.5))
    # A second application changes nothing.
    assert torch.equal(augment(views, Augmentation(solarise=1), seeded()), views)


def test_the_square_is_blanked_last_and_has_sharp_edges() -> None:
    flat = torch.full((50, 3, SIDE, SIDE), 0.25)
    views = augment(flat, Augmentation(**EACH["blur"], solarise=1, erase=1), seeded())
    blank = views == 0
    assert bool(blank.any(3).any(2).all())
    torch.testing.assert_close(views, flat.masked_fill(blank, 0), atol=1e-5, rtol=0)


def test_grey_leaves_three_equal_channels_of_luminance() -> None:
    pictures = noise(4)
    views = augment(pictures, Augmentation(grey=1), seeded())
    assert torch.equal(views[:, 0], views[:, 1])
    assert torch.equal(views[:, 0], views[:, 2])
    torch.testing.assert_close(views[:, :1], luminance(pictures), atol=1e-5, rtol=0)
    one = noise(4, 1)
    assert torch.equal(augment(one, Augmentation(grey=1), seeded()), one)


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
