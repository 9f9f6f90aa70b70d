"""Two views of every picture in a batch, each with its own random numbers, on the device the batch is on.

torchvision's tensor transforms draw one set of numbers for a whole batch; here every number below is a
tensor with one entry a sample. All geometry (crop, flip, affine, elastic) is one sampling grid, so a
picture is interpolated once.
"""

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from training.recipe import Augmentation

_LUMA = (0.299, 0.587, 0.114)


def augment(pictures: Tensor, recipe: Augmentation, generator: Generator) -> Tensor:
    """Return one random view of each picture.

    Args:
        pictures: (N, C, S, S) float32 in 0..1, C 1 or 3.
        recipe: which changes and how strong.
        generator: on the pictures' device; the only source of randomness.

    Returns:
        (N, C, S, S) float32 in 0..1.

    Cost: one grid_sample, plus a pass over the batch for each change that is on.
    """
    # A crop at the picture's edge samples up to half a pixel beyond the last pixel's centre: zeros would darken it.
    beyond = "border" if recipe.crop_area < 1 else "zeros"
    views = F.grid_sample(pictures, _grid(pictures, recipe, generator), padding_mode=beyond, align_corners=False)
    if recipe.stroke:
        views = _stroke(views, recipe.stroke, generator)
    if recipe.jitter:
        views = _jitter(views, recipe, generator)
    if recipe.grey:
        grey = luminance(views).expand_as(views)
        views = torch.where(_chance(views, recipe.grey, generator), grey, views)
    if recipe.erase:
        views = _erase(views, recipe.erase, generator)
    return views


def luminance(pictures: Tensor) -> Tensor:
    """Return (N, 1, S, S) luminance of (N, C, S, S); grey pictures come back as they are."""
    if pictures.shape[1] == 1:
        return pictures
    weights = torch.tensor(_LUMA, device=pictures.device, dtype=pictures.dtype).view(1, 3, 1, 1)
    return (pictures * weights).sum(1, keepdim=True)


def _uniform(like: Tensor, low: float, high: float, generator: Generator, *shape: int) -> Tensor:
    """(N, *shape) numbers, each sample its own."""
    random = torch.rand(len(like), *shape, generator=generator, device=like.device)
    return low + (high - low) * random


def _chance(like: Tensor, probability: float, generator: Generator) -> Tensor:
    return _uniform(like, 0, 1, generator, 1, 1, 1) < probability


def _grid(pictures: Tensor, recipe: Augmentation, generator: Generator) -> Tensor:
    """(N, S, S, 2) sampling positions in −1..1: where each pixel of the view lies in its picture."""
    r = recipe

    def symmetric(limit: float) -> Tensor:
        return _uniform(pictures, -limit, limit, generator)

    angle = symmetric(math.radians(r.rotation))
    shear = symmetric(r.shear)
    across, down = 1 + symmetric(r.scale), 1 + symmetric(r.scale)
    x, y = 2 * symmetric(r.shift), 2 * symmetric(r.shift)
    if r.crop_area < 1:  # area and aspect as in random-resized-crop; the crop stays inside the picture
        area = _uniform(pictures, r.crop_area, 1, generator)
        aspect = torch.exp(symmetric(1) * (-area.log()).clamp(max=math.log(4 / 3)))  # neither side above 1
        width, height = (area * aspect).sqrt(), (area / aspect).sqrt()
        x, y = x + (1 - width) * symmetric(1), y + (1 - height) * symmetric(1)
        across, down = across * width, down * height
    if r.flip:
        across = torch.where(_uniform(pictures, 0, 1, generator) < r.flip, -across, across)
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack(
        [
            torch.stack([across * cos, -down * sin + shear * across * cos, x], 1),
            torch.stack([across * sin, down * cos + shear * across * sin, y], 1),
        ],
        1,
    )  # (N, 2, 3)
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
    if r.elastic:
        side = pictures.shape[-1]
        # 4×4 random displacements, smoothly interpolated: neighbouring strokes move together.
        coarse = _uniform(pictures, -2 * r.elastic, 2 * r.elastic, generator, 2, 4, 4)
        smooth = F.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=True)
        grid = grid + smooth.permute(0, 2, 3, 1)
    return grid


def _stroke(views: Tensor, probability: float, generator: Generator) -> Tensor:
    """Blend each view with its dilation (thicker) or erosion (thinner), by its own amount."""
    thicker = F.max_pool2d(views, 3, 1, 1)
    thinner = -F.max_pool2d(-views, 3, 1, 1)
    amount = _uniform(views, -1, 1, generator, 1, 1, 1)
    amount = torch.where(_chance(views, probability, generator), amount, 0.0)
    # A thin stroke vanishes when eroded fully: at most half of the way.
    return torch.where(
        amount > 0, views.lerp(thicker, amount.clamp(min=0)), views.lerp(thinner, -amount.clamp(max=0) / 2)
    )


def _jitter(views: Tensor, recipe: Augmentation, generator: Generator) -> Tensor:
    """Brightness, contrast, and saturation where there is colour, in this order."""
    low, high = 1 - recipe.jitter_strength, 1 + recipe.jitter_strength
    changed = views * _uniform(views, low, high, generator, 1, 1, 1)
    mean = luminance(changed).mean((1, 2, 3), keepdim=True)
    changed = mean + (changed - mean) * _uniform(views, low, high, generator, 1, 1, 1)
    if views.shape[1] == 3:
        grey = luminance(changed)
        changed = grey + (changed - grey) * _uniform(views, low, high, generator, 1, 1, 1)
    return torch.where(_chance(views, recipe.jitter, generator), changed.clamp(0, 1), views)


def _erase(views: Tensor, probability: float, generator: Generator) -> Tensor:
    """Blank one square a view, its side 1/6 to 1/3 of the picture's."""
    side = views.shape[-1]
    ruler = torch.arange(side, device=views.device) + 0.5  # pixel centres, or the first row would never go
    size = _uniform(views, side / 6, side / 3, generator, 1)
    left, top = (_uniform(views, 0, 1, generator, 1) * (side - size) for _ in range(2))
    columns = (ruler >= left) & (ruler < left + size)  # (N, S)
    rows = (ruler >= top) & (ruler < top + size)
    blank = (rows[:, :, None] & columns[:, None, :])[:, None] & _chance(views, probability, generator)
    return views.masked_fill(blank, 0.0)
