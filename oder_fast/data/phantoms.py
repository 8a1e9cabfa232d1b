"""Images made of ellipses, and patches cut from images."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Value, half axes, centre (x right, y up) and rotation in degrees, in units of half the image: the contrasts
# of Toft's variant, which shows the small ellipses.
SHEPP_LOGAN = (
    (1.0, 0.69, 0.92, 0.0, 0.0, 0),
    (-0.8, 0.6624, 0.874, 0.0, -0.0184, 0),
    (-0.2, 0.11, 0.31, 0.22, 0.0, -18),
    (-0.2, 0.16, 0.41, -0.22, 0.0, 18),
    (0.1, 0.21, 0.25, 0.0, 0.35, 0),
    (0.1, 0.046, 0.046, 0.0, 0.1, 0),
    (0.1, 0.046, 0.046, 0.0, -0.1, 0),
    (0.1, 0.046, 0.023, -0.08, -0.605, 0),
    (0.1, 0.023, 0.023, 0.0, -0.605, 0),
    (0.1, 0.023, 0.046, 0.06, -0.605, 0),
)


def _grid(size: int) -> tuple[Tensor, Tensor]:
    """Return x (to the right) and y (upward) of the pixel centres in [-1, 1], each (size, size)."""
    if size < 1:
        raise ValueError(f"phantom: size must be at least 1, got {size}")
    centre = (2 * torch.arange(size, dtype=torch.float64) + 1) / size - 1
    y, x = torch.meshgrid(-centre, centre, indexing="ij")
    return x, y


def shepp_logan(size: int) -> Tensor:
    """Draw the Shepp-Logan phantom, with the contrasts of Toft's variant.

    Args:
        size: Rows and columns.

    Returns:
        Shape ``(size, size)``, float32, values in [0, 1].

    References:
        Shepp, Logan, "The Fourier reconstruction of a head section", IEEE Trans. Nuclear Science 21 (1974).
    """
    x, y = _grid(size)
    image = torch.zeros_like(x)
    for value, a, b, x0, y0, degrees in SHEPP_LOGAN:
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        u = ((x - x0) * c + (y - y0) * s) / a
        v = ((y - y0) * c - (x - x0) * s) / b
        image += value * (u**2 + v**2 <= 1)
    return image.clamp(0, 1).float()


def _smooth_noise(n: int, size: int, cells: int, generator: torch.Generator | None) -> Tensor:
    """Return (n, size, size) interpolated from `cells` independent normal values along each side."""
    coarse = torch.randn(n, 1, cells, cells, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic", align_corners=False)
    return fine[:, 0]


def random_ellipses(
    n: int,
    size: int,
    generator: torch.Generator | None = None,
    *,
    ellipses: int = 16,
    texture: float = 0.0,
) -> Tensor:
    """Draw bodies with organs: one large ellipse, with smaller ones of random contrast painted over it.

    Args:
        n: How many images.
        size: Rows and columns.
        generator: Source of the random numbers; the same seed gives the same images.
        ellipses: Ellipses in each image, the body included.
        texture: Amplitude of the smooth random variation laid over the body, 0 for none.

    Returns:
        Shape ``(n, size, size)``, float32, values in [0, 1], 0 outside the body.

    Example:
        >>> import torch
        >>> random_ellipses(3, 32, torch.Generator().manual_seed(0)).shape
        torch.Size([3, 32, 32])
    """
    if ellipses < 1:
        raise ValueError(f"random_ellipses: ellipses must be at least 1, got {ellipses}")

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, ellipses, 1, 1, generator=generator)

    x, y = (axis.float() for axis in _grid(size))
    angle = uniform(0, math.pi)
    small = torch.exp(uniform(math.log(0.015), math.log(0.35)))
    a, b = small, small * torch.exp(uniform(-1, 1))
    radius, phase = 0.75 * uniform(0, 1).sqrt(), uniform(0, 2 * math.pi)
    x0, y0 = radius * torch.cos(phase), radius * torch.sin(phase)
    value = uniform(0, 1)
    # The body: nearly centred, large, of middle brightness.
    a[:, 0], b[:, 0] = uniform(0.7, 1.1)[:, 0], uniform(0.6, 1.0)[:, 0]
    x0[:, 0], y0[:, 0] = 0.2 * x0[:, 0], 0.2 * y0[:, 0]
    value[:, 0] = 0.3 + 0.4 * value[:, 0]
    c, s = torch.cos(angle), torch.sin(angle)
    u = ((x - x0) * c + (y - y0) * s) / a
    v = ((y - y0) * c - (x - x0) * s) / b
    # Edges one pixel wide: the distance to the ellipse, to first order, in pixels.
    norm = torch.sqrt(u**2 + v**2)
    slope = torch.sqrt((u / a) ** 2 + (v / b) ** 2) / norm.clamp_min(1e-6)
    cover = (0.5 - (norm - 1) / slope.clamp_min(1e-6) * size / 2).clamp(0, 1)
    image = torch.zeros(n, size, size)
    for k in range(ellipses):
        image = image + cover[:, k] * (value[:, k] - image)
    if texture:
        for cells in (size // 16 + 2, size // 2 + 2):
            image = image + texture * _smooth_noise(n, size, cells, generator)
    return (image * cover[:, 0]).clamp(0, 1)


def patches(image: Tensor, size: int, n: int, generator: torch.Generator | None = None) -> Tensor:
    """Cut random patches, each in one of its 8 orientations.

    Args:
        image: Shape ``(H, W)``.
        size: Rows and columns of a patch.
        n: How many.
        generator: Source of the random numbers.

    Returns:
        Shape ``(n, size, size)``, dtype of `image`.

    Raises:
        ValueError: Where the image has other than two dimensions or is smaller than a patch.
    """
    if image.ndim != 2 or min(image.shape) < size or size < 1:
        raise ValueError(f"patches: image must be (H, W), both at least {size}, got {tuple(image.shape)}")

    def draw(high: int) -> list[int]:
        return torch.randint(high, (n,), generator=generator).tolist()

    rows, columns = draw(image.shape[0] - size + 1), draw(image.shape[1] - size + 1)
    cut = []
    for i, j, turns, flip in zip(rows, columns, draw(4), draw(2), strict=True):
        patch = torch.rot90(image[i : i + size, j : j + size], turns)
        cut.append(patch.flip(1) if flip else patch)
    return torch.stack(cut) if cut else image.new_empty(0, size, size)
