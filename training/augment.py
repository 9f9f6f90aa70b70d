"""Random views of every picture in a batch, each row with its own numbers, on the device the batch is on.

    pictures ─geometry─ stroke ─ colour ─ blur ─ solarise ─ erase─▶ views

torchvision's tensor transforms draw one set of numbers for a whole batch; here each number is a tensor with one entry
a row. Linear changes are matrix products: all geometry (crop, flip, affine, elastic) is one sampling grid, so a picture
is interpolated once; all colour (brightness, contrast, saturation, hue, grey) is one affine map; a blur is one matrix
from each side.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from training.distributed import uniform
from training.recipe import Augmentation

_LUMA = (0.299, 0.587, 0.114)
# The rows I and Q sum to 0, so that grey has no colour.
_YIQ = (_LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


def augment(
    pictures: Tensor,
    recipe: Augmentation,
    generator: Generator,
    side: int | None = None,
    areas: tuple[float, float] | None = None,
    copies: int = 1,
) -> Tensor:
    """Return one random view of each picture.

    Args:
        pictures: (N, C, S, S) float32 in 0..1, C 1 or 3; hue and grey do not change a single channel.
        recipe: the changes and their strengths.
        generator: on the pictures' device, the only source of randomness. The same state gives the same views;
            switching one change on does not alter the numbers of the others.
        side: of the views, in pixels; None: S. Pixels are interpolated, not averaged: a crop should have at most twice
            the side of its view.
        areas: smallest and largest share of the picture's area that a crop keeps; None: recipe.crop_area to 1.
        copies: the rows are so many copies of N / copies pictures, one copy after the other.

    Returns:
        (N, C, side, side) float32 in 0..1, new memory.

    Cost: one grid_sample and one pass for colour, plus passes over the rows that are hit at random. Call it outside
        autocast: bfloat16 is too coarse for positions.
    """
    r, channels = recipe, pictures.shape[1]
    side, areas = side or pictures.shape[-1], areas or (r.crop_area, 1.0)
    crops = areas[0] < 1
    n = _draw(pictures, r, side, areas, generator, copies)
    resized = side != pictures.shape[-1]
    if resized or crops or r.flip or r.rotation or r.scale or r.shear or r.shift or r.elastic:
        # A crop at the picture's edge samples up to half a pixel beyond the last pixel's centre: zeros darken it.
        beyond = "border" if crops else "zeros"
        views = F.grid_sample(pictures, _grid(side, r, crops, n), padding_mode=beyond, align_corners=False)
    else:
        views = pictures.clone()
    if r.stroke:
        views = _where(n["stroke"] < r.stroke, views, _stroke, n["amount"])
    if r.jitter or (r.grey and channels == 3):
        views = _colour(views, r, n)
    if r.blur:
        kernels = gaussian_kernels(n["sigma"], math.ceil(2 * _largest_sigma(r, side)))
        views = _where(n["blur"] < r.blur, views, _blur, kernels)
    if r.solarise:
        views = _where(n["solarise"] < r.solarise, views, _solarise)
    if r.erase:
        views = _erase(views, n["hole"] * (n["erase"] < r.erase), n["left"], n["top"])
    return views


def luminance(pictures: Tensor) -> Tensor:
    """Return (N, 1, S, S) luminance of (N, C, S, S); grey pictures come back as they are."""
    if pictures.shape[1] == 1:
        return pictures
    weights = torch.tensor(_LUMA, device=pictures.device, dtype=pictures.dtype).view(1, 3, 1, 1)
    return (pictures * weights).sum(1, keepdim=True)


def colour_matrix(saturation: Tensor, turn: Tensor) -> Tensor:
    """Return the matrix that scales saturation and turns hue, in the plane of I and Q at constant Y.

    Args:
        saturation: (N,) factor; 0 is grey.
        turn: (N,) share of the circle.

    Returns:
        (N, 3, 3), to be multiplied by columns (r, g, b). Exactly the identity for saturation 1 and turn 0.

    Source: Foley et al., Computer Graphics, section 13.3 (YIQ).
    """
    plane = _colour_plane(saturation.device)  # (3, 9)
    angle = 2 * math.pi * turn
    return torch.addmm(plane[0], (saturation * torch.stack([angle.cos(), angle.sin()])).T, plane[1:]).view(-1, 3, 3)


def gaussian_kernels(sigma: Tensor, radius: int) -> Tensor:
    """Return (N, 2 · radius + 1) samples of a Gaussian at whole pixels, each row of sum 1; sigma (N,) > 0 in pixels."""
    taps = torch.arange(-radius, radius + 1, device=sigma.device)
    return torch.softmax(-0.5 * (taps / sigma[:, None]).square(), 1)


def _draw(
    pictures: Tensor, recipe: Augmentation, side: int, areas: tuple[float, float], generator: Generator, copies: int
) -> dict[str, Tensor]:
    """Draw all numbers at once, used or not; return them by name: (N,) each, and bumps (N, 2, 16)."""
    names, low, high = _ranges(recipe, side, areas, pictures.device)
    random = uniform(len(names) + 32, copies, len(pictures) // copies, generator, pictures.device)
    # The grid's unit is half a side.
    bumps = (2 * random[-32:] - 1) * 2 * recipe.elastic
    return {"bumps": bumps.T.view(-1, 2, 16), **dict(zip(names, low.lerp(high, random[:-32]), strict=True))}


@lru_cache
def _ranges(
    recipe: Augmentation, side: int, areas: tuple[float, float], device: torch.device
) -> tuple[list[str], Tensor, Tensor]:
    """Return the names of the numbers, and the (count, 1) bounds between which each is uniform."""
    r = recipe
    factor = (1 - r.jitter_strength, 1 + r.jitter_strength)
    ranges = {
        "angle": (-math.radians(r.rotation), math.radians(r.rotation)),
        "shear": (-r.shear, r.shear),
        "across": (1 - r.scale, 1 + r.scale),
        "down": (1 - r.scale, 1 + r.scale),
        "x": (-2 * r.shift, 2 * r.shift),
        "y": (-2 * r.shift, 2 * r.shift),
        "area": areas,
        "aspect": (-1, 1),
        "crop_x": (-1, 1),
        "crop_y": (-1, 1),
        "amount": (-1, 1),
        "brightness": factor,
        "contrast": factor,
        "saturation": factor,
        "turn": (-r.hue, r.hue),
        "sigma": (0.1, _largest_sigma(r, side)),
        "hole": (side / 6, side / 3),
        "left": (0, 1),
        "top": (0, 1),
        # A change happens where its number falls below its probability.
        **dict.fromkeys(("flip", "stroke", "jitter", "grey", "blur", "solarise", "erase"), (0, 1)),
    }
    bounds = torch.tensor(list(ranges.values()), dtype=torch.float32, device=device)
    return list(ranges), bounds[:, :1], bounds[:, 1:]


def _largest_sigma(recipe: Augmentation, side: int) -> float:
    return max(0.1, recipe.blur_radius * side)


def _where(hit: Tensor, views: Tensor, change: Callable[..., Tensor], *numbers: Tensor) -> Tensor:
    """Return views with the rows that are hit (N,) changed, given their numbers (N, …). `views` may be overwritten."""
    if views.device.type == "cpu":
        rows = hit.nonzero()[:, 0]
        return views.index_copy_(0, rows, change(views[rows], *(number[rows] for number in numbers)))
    # On a GPU changing all rows costs less than waiting for the indices of those that are hit.
    return torch.where(hit.view(-1, 1, 1, 1), change(views, *numbers), views)


def _grid(side: int, recipe: Augmentation, crops: bool, n: dict[str, Tensor]) -> Tensor:
    """Return (N, S, S, 2) sampling positions in −1..1: the place in the picture of each pixel of the view."""
    across, down, x, y = n["across"], n["down"], n["x"], n["y"]
    if crops:
        # Area and aspect as in random-resized-crop; the clamp keeps both sides inside the picture.
        area = n["area"]
        aspect = torch.exp(n["aspect"] * (-area.log()).clamp(max=math.log(4 / 3)))
        width, height = (area * aspect).sqrt(), (area / aspect).sqrt()
        x, y = x + (1 - width) * n["crop_x"], y + (1 - height) * n["crop_y"]
        across, down = across * width, down * height
    if recipe.flip:
        across = torch.where(n["flip"] < recipe.flip, -across, across)
    cos, sin, shear = n["angle"].cos(), n["angle"].sin(), n["shear"]
    rows = [
        [across * cos, -down * sin + shear * across * cos, x],
        [across * sin, down * cos + shear * across * sin, y],
    ]
    weights = torch.stack([torch.stack(row, 1) for row in rows], 1)  # (N, 2, 3)
    if recipe.elastic:
        weights = torch.cat([weights, n["bumps"]], 2)  # (N, 2, 19)
    shapes = _shapes(side, weights.device)[: weights.shape[2]]
    # One plane for x and one for y: grid_sample reads separate planes faster, and affine_grid would be slower.
    return (weights.flatten(0, 1) @ shapes).view(-1, 2, side, side).permute(0, 2, 3, 1)


def _stroke(views: Tensor, amount: Tensor) -> Tensor:
    """Blend each view with its dilation (thicker, amount (N,) 0..1) or its erosion (thinner, −1..0)."""
    amount = amount.view(-1, 1, 1, 1)
    # Erosion is the dilation of the negative.
    sign = torch.where(amount < 0, -1.0, 1.0)
    padded = F.pad(views * sign, (1, 1, 1, 1), mode="replicate")
    wide = torch.maximum(padded[..., :-2], padded[..., 1:-1]).maximum(padded[..., 2:])
    full = torch.maximum(wide[..., :-2, :], wide[..., 1:-1, :]).maximum(wide[..., 2:, :]) * sign
    # A thin stroke vanishes under full erosion, so it goes at most half of the way.
    return views.lerp(full, torch.where(amount < 0, -amount / 2, amount))


def _colour(views: Tensor, recipe: Augmentation, n: dict[str, Tensor]) -> Tensor:
    """Change brightness, contrast about the mean luminance, saturation and hue of jittered rows; then grey."""
    jittered = n["jitter"] < recipe.jitter
    brightness, contrast = (torch.where(jittered, n[name], 1.0) for name in ("brightness", "contrast"))
    matrix = (brightness * contrast)[:, None, None]  # (N, 1, 1)
    mean = views.mean((2, 3))  # (N, C)
    if views.shape[1] == 3:
        mean = (mean * _colour_plane(views.device)[0, :3]).sum(1, keepdim=True)  # (N, 1)
        saturation = torch.where(jittered, n["saturation"], 1.0).masked_fill_(n["grey"] < recipe.grey, 0)
        matrix = matrix * colour_matrix(saturation, n["turn"] * jittered)  # (N, 3, 3)
    offset = (mean * (brightness * (1 - contrast))[:, None])[:, :, None]  # (N, 1, 1)
    return torch.baddbmm(offset, matrix, views.flatten(2)).clamp_(0, 1).view_as(views)


def _blur(views: Tensor, kernels: Tensor) -> Tensor:
    """Blur each view with its own kernel (N, taps) along both axes, with reflection at the borders."""
    side = views.shape[-1]
    reflections = _reflections(side, kernels.shape[1] // 2, views.device)
    matrix = (kernels @ reflections).view(-1, 1, side, side)  # (N, 1, S, S)
    return (matrix @ views @ matrix.mT).clamp_(0, 1)


def _solarise(views: Tensor) -> Tensor:
    # From a half upwards 1 − v is the smaller.
    return torch.minimum(views, 1 - views)


def _erase(views: Tensor, size: Tensor, left: Tensor, top: Tensor) -> Tensor:
    """Blank one square a view in place: side `size` (N,) in pixels, left and top (N,) as shares of the free room."""
    side = views.shape[-1]
    # Pixel centres: with corners the first row would never be blank.
    ruler = torch.arange(side, device=views.device) + 0.5
    start = torch.stack([left, top], 1)[:, :, None] * (side - size)[:, None, None]  # (N, 2, 1)
    within = (ruler >= start) & (ruler < start + size[:, None, None])  # (N, 2, S)
    return views.masked_fill_(within[:, :1, None, :] & within[:, 1:, :, None], 0)


@lru_cache
def _shapes(side: int, device: torch.device) -> Tensor:
    """Return (19, S · S) planes whose weighted sum is a sampling grid: x, y, 1, and bumps of a 4×4 bicubic spline."""
    # Pixel centres lie in −1..1, as grid_sample counts positions with align_corners=False.
    ruler = (2 * torch.arange(side) + 1) / side - 1
    y, x = torch.meshgrid(ruler, ruler, indexing="ij")
    # Displacements are interpolated smoothly between 16 corners, so neighbouring strokes move together.
    bumps = F.interpolate(torch.eye(16).view(16, 1, 4, 4), size=(side, side), mode="bicubic", align_corners=True)
    return torch.cat([torch.stack([x, y, torch.ones_like(x)]), bumps[:, 0]]).flatten(1).to(device)


@lru_cache
def _colour_plane(device: torch.device) -> Tensor:
    """Return (3, 9): matrices that keep luminance only, keep colour only, and turn colour by a quarter circle."""
    to_yiq = torch.tensor(_YIQ, dtype=torch.float64)
    grey = torch.tensor(_LUMA, dtype=torch.float64).expand(3, 3)
    quarter = torch.tensor([[0, 0, 0], [0, 0, -1], [0, 1, 0]], dtype=torch.float64)
    turned = torch.linalg.inv(to_yiq) @ quarter @ to_yiq
    return torch.stack([grey, torch.eye(3) - grey, turned]).flatten(1).float().to(device)


@lru_cache
def _reflections(side: int, radius: int, device: torch.device) -> Tensor:
    """Return (taps, S · S): 1 where a tap of the kernel at pixel i falls on pixel j of a row mirrored at its ends."""
    ruler = torch.arange(side)
    place = (ruler + torch.arange(-radius, radius + 1)[:, None]).abs()  # (taps, S)
    place = side - 1 - (side - 1 - place).abs()
    return (place[:, :, None] == ruler).flatten(1).float().to(device)
