"""Random changes of samples that leave them what they are, drawn from the generator they are given alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._numpy import takes_numpy
from .coils import centered_fft
from .samples import Sample

Transform = Callable[[Sample, torch.Generator], Sample]


def _number(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))


def _whole(generator: torch.Generator, count: int) -> int:
    return int(torch.randint(count, (), generator=generator))


def _refuse_kspace(what: str, sample: Sample) -> None:
    if sample.kspace is not None or sample.maps is not None:
        raise ValueError(
            f"{what}: sample {sample.name} comes with k-space or coil maps, which do not follow; leave this transform "
            "out, or train on images alone"
        )


def _moved(sample: Sample, move: Callable[[Tensor], Tensor]) -> Sample:
    """Move pixels of the image, of the coil maps, and of what the coils see."""
    kspace = sample.kspace
    if kspace is not None:
        for inverse in (True, False):
            for axis in (-2, -1):
                kspace = centered_fft(kspace, axis, inverse=inverse)
            kspace = move(kspace).contiguous() if inverse else kspace
    maps = None if sample.maps is None else move(sample.maps).contiguous()
    return Sample(sample.name, move(sample.image).contiguous(), kspace, maps)


class Compose:
    """Apply transforms one after another.

    Args:
        transforms: Called with a sample and a generator, each returns a sample.

    Example:
        >>> import torch
        >>> change = Compose([Patches(16), RandomFlip(), RandomRotate90()])
        >>> change(Sample("a", torch.rand(32, 48)), torch.Generator().manual_seed(0)).image.shape
        torch.Size([16, 16])
    """

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self.transforms = list(transforms)

    def __call__(self, sample: Sample, generator: torch.Generator) -> Sample:
        """Return the transformed sample."""
        for transform in self.transforms:
            sample = transform(sample, generator)
        return sample


@takes_numpy
class Patches:
    """Cut a patch at a random place; of a volume, through all its slices.

    Args:
        size: Rows and columns of the patch.

    Raises:
        ValueError: For a size below 1; on a call, for an image smaller than that, or a sample with k-space or coil
            maps: a patch has no k-space of its own.
    """

    def __init__(self, size: int | tuple[int, int]) -> None:
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"Patches: size must be at least 1, got {size}")

    def __call__(self, sample: Sample, generator: torch.Generator) -> Sample:
        """Return the patch."""
        _refuse_kspace("Patches", sample)
        corner = []
        for length, cut in zip(sample.image.shape[-2:], self.size, strict=True):
            if cut > length:
                raise ValueError(
                    f"Patches: size {self.size} must fit into the images, got {sample.name} of "
                    f"{tuple(sample.image.shape[-2:])}"
                )
            corner.append(_whole(generator, length - cut + 1))
        top, left = corner
        image = sample.image[..., top : top + self.size[0], left : left + self.size[1]]
        return Sample(sample.name, image.contiguous())


@takes_numpy
class RandomFlip:
    """Mirror half of the samples left to right, and half top to bottom; k-space and coil maps with them.

    Args:
        axes: Which ways: -1 left to right, -2 top to bottom.

    Raises:
        ValueError: For another axis.
    """

    def __init__(self, axes: Sequence[int] = (-2, -1)) -> None:
        if not set(axes) <= {-2, -1}:
            raise ValueError(f"RandomFlip: axes must be of -2 and -1, got {tuple(axes)}")
        self.axes = tuple(axes)

    def __call__(self, sample: Sample, generator: torch.Generator) -> Sample:
        """Return the sample, mirrored or not."""
        axes = [axis for axis in self.axes if _whole(generator, 2)]
        return _moved(sample, lambda values: values.flip(axes)) if axes else sample


class RandomRotate90:
    """Turn by 0, 90, 180 or 270 degrees, by 0 or 180 where rows and columns differ; k-space and coil maps with them."""

    def __call__(self, sample: Sample, generator: torch.Generator) -> Sample:
        """Return the turned sample."""
        turns = _whole(generator, 4)
        height, width = sample.image.shape[-2:]
        turns = turns if height == width else 2 * (turns % 2)
        return _moved(sample, lambda values: values.rot90(turns, (-2, -1))) if turns else sample


@takes_numpy
class RandomRotation:
    """Turn by a small random angle, with bicubic interpolation; 0 comes in from outside.

    Args:
        degrees: Largest angle, either way.

    Raises:
        ValueError: For an angle that is not finite or negative; on a call, for a sample with k-space or coil maps,
            of which interpolation would make another.
    """

    def __init__(self, degrees: float) -> None:
        if not (math.isfinite(degrees) and degrees >= 0):
            raise ValueError(f"RandomRotation: degrees must be finite and at least 0, got {degrees}")
        self.degrees = degrees

    def __call__(self, sample: Sample, generator: torch.Generator) -> Sample:
        """Return the turned sample."""
        _refuse_kspace("RandomRotation", sample)
        angle = math.radians(_number(generator, -self.degrees, self.degrees))
        image = sample.image
        height, width = image.shape[-2:]
        c, s = math.cos(angle), math.sin(angle)
        # The grid runs from -1 to 1 along both sides, whatever their lengths.
        matrix = torch.tensor([[[c, -s * height / width, 0.0], [s * width / height, c, 0.0]]])
        grid = torch.nn.functional.affine_grid(matrix, [1, 1, height, width], align_corners=False)
        planes = torch.view_as_real(image).movedim(-1, 0) if image.is_complex() else image
        turned = torch.nn.functional.grid_sample(
            planes.reshape(1, -1, height, width), grid, mode="bicubic", align_corners=False
        ).reshape(planes.shape)
        if image.is_complex():
            turned = torch.view_as_complex(turned.movedim(0, -1).contiguous())
        else:
            # The cubic overshoots at edges.
            low, high = image.aminmax()
            turned = turned.clamp(low.clamp(max=0), high.clamp(min=0))
        return Sample(sample.name, turned)


@takes_numpy
class RandomScaleIntensity:
    """Multiply image and k-space by one random factor.

    Args:
        low: Least factor, above 0.
        high: Largest factor.

    Raises:
        ValueError: Unless ``0 < low <= high``.
    """

    def __init__(self, low: float, high: float) -> None:
        if not 0 < low <= high < math.inf:
            raise ValueError(f"RandomScaleIntensity: 0 < low <= high is needed, got {low} and {high}")
        self.low, self.high = low, high

    def __call__(self, sample: Sample, generator: torch.Generator) -> Sample:
        """Return the brighter or darker sample."""
        factor = _number(generator, self.low, self.high)
        kspace = None if sample.kspace is None else sample.kspace * factor
        return sample._replace(image=sample.image * factor, kspace=kspace)
