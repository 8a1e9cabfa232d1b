"""Measured data and operators for batches of images: CT, MRI, diffraction tomography."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..data import (
    add_gaussian_noise,
    add_poisson_noise,
    birdcage_maps,
    equispaced_lines,
    gaussian_lines,
    led_ring,
    poisson_disc,
    radial,
    random_lines,
    smooth_phase,
)
from ..data.datasets import Scale
from ..data.samples import Batch, Sample
from ..operators import CartesianMRI, DiffractionTomography, ParallelBeamCT
from . import configuration as settings

Generators = Sequence[torch.Generator]

MOST_VALUES = 2**31
"""Largest number of values of what is measured of an image, or of an operator."""


class Measured(NamedTuple):
    """What a model is given.

    Attributes:
        operator: Of these images.
        data: Shape ``(B, *operator.data_shape)``.
    """

    operator: Any
    data: Tensor


class Scan(ABC):
    """Makes measurements of images, each image with random numbers of its own.

    Attributes:
        nonnegative: Whether images have no values below 0.
        is_complex: Whether images are complex.
        axes: Of an image: 2, or 3 of a volume.
        data_axes: What is measured of an image, for messages.
        is_kspace: Whether data are k-space, which brings coil maps and a mask of its own.
        is_intensity: Whether data are intensities, one image for each LED, whose background may be unknown.
        unit: Value that the denoiser sees as 1; None where each image is scaled.
    """

    nonnegative: ClassVar[bool] = False
    is_complex: ClassVar[bool] = False
    axes: ClassVar[int] = 2
    data_axes: ClassVar[str]
    is_kspace: ClassVar[bool] = False
    is_intensity: ClassVar[bool] = False
    unit: float | None = None

    @property
    @abstractmethod
    def channels(self) -> int:
        """Channels that a denoiser sees."""

    @abstractmethod
    def measure(self, batch: Batch, generators: Generators) -> Measured:
        """Measure images ``(B, ...)``, or take what was measured of them.

        Args:
            batch: The images.
            generators: On the CPU, one for each image: equal ones give equal noise and masks, whatever else is in
                the batch.
        """

    @abstractmethod
    def operator(self, shape: tuple[int, ...]) -> Any:
        """Return the operator of images of this shape; for MRI that of the birdcage and all of k-space."""

    def operator_of(self, shape: tuple[int, ...], maps: Sequence[Tensor], masks: Sequence[Tensor]) -> Any:
        """Return the operator of measured data: that of images of this shape, or of the data's own maps and masks."""
        return self.operator(shape)

    def scaled(self, measured: Measured, scale: Scale) -> tuple[Measured, list[float], list[float]]:
        """Return measured data in the unit of the model, and value and span of images that it sees as 0 and as 1."""
        operator, data = measured
        low, span = [0.0] * len(data), [1.0] * len(data)
        if scale != "none":
            with torch.no_grad():
                largest = operator.initial(data).abs().flatten(1).amax(1)
            largest = torch.where(largest > 0, largest, 1)
            data, span = data / largest.reshape(-1, *(1,) * (data.ndim - 1)), largest.tolist()
        return Measured(operator, data), low, span

    def prepare(self, sample: Sample, generator: torch.Generator) -> Sample:
        """Return a sample as it is reconstructed: in the unit and of the kind that the denoiser sees."""
        return sample

    def show(self, image: Tensor) -> Tensor:
        """Return what is looked at and judged of an image ``(H, W)`` or ``(Z, H, W)``, real."""
        return image.abs() if image.is_complex() else image

    def check(self, shape: tuple[int, ...], is_complex: bool) -> None:
        """Check that images are of the kind that is measured.

        Raises:
            ValueError: With what is wanted and what there is.
        """
        kind = "complex" if self.is_complex else "real"
        if is_complex != self.is_complex or len(shape) != self.axes:
            axes = ", ".join("ZHW"[-self.axes :])
            got = "complex" if is_complex else "real"
            raise ValueError(
                f"{type(self).__name__.removesuffix('Scan')} takes {kind} images ({axes}), got {got} ones of shape "
                f"{shape}"
            )


def make_scan(section: settings.CT | settings.MRI | settings.IDT) -> Scan:
    """Return the scan that the configuration describes."""
    if isinstance(section, settings.CT):
        return CTScan(section)
    if isinstance(section, settings.MRI):
        return MRIScan(section)
    return IDTScan(section)


def _require_bounded(what: str, sizes: tuple[int, ...]) -> None:
    if math.prod(sizes) > MOST_VALUES:
        raise ValueError(f"{what}: must have at most {MOST_VALUES} values, got {' x '.join(map(str, sizes))}")


def _noisy(y: Tensor, snr: float | None, generators: Generators) -> Tensor:
    if snr is None:
        return y
    return torch.cat([add_gaussian_noise(one[None], snr, g) for one, g in zip(y, generators, strict=True)])


class CTScan(Scan):
    """Sinograms; the geometry goes with the size of the images."""

    nonnegative = True
    data_axes = "(V, D)"

    def __init__(self, section: settings.CT) -> None:
        self.section = section
        self._operators: dict[tuple[int, ...], ParallelBeamCT] = {}

    @property
    def channels(self) -> int:
        """One."""
        return 1

    def operator(self, shape: tuple[int, ...]) -> ParallelBeamCT:
        """Return the operator of images of this shape."""
        if shape not in self._operators:
            s = self.section
            operator = ParallelBeamCT(
                (shape[0], shape[1]),
                s.angles,
                s.n_bins,
                bin_spacing=s.bin_spacing,
                bin_offset=s.bin_offset,
                pixel_size=s.pixel_size,
                sampling=s.sampling,
            )
            _require_bounded("CT: sinograms (V, D)", operator.data_shape)
            self._operators[shape] = operator
        return self._operators[shape]

    def scaled(self, measured: Measured, scale: Scale) -> tuple[Measured, list[float], list[float]]:
        """Scale by the window of the images, or each by its start."""
        if isinstance(scale, str):
            return super().scaled(measured, scale)
        (operator, data), (low, high) = measured, scale
        n, span = len(data), high - low
        if low:
            data = data - low * operator(torch.ones(1, *operator.image_shape, device=data.device))
        return Measured(operator, data / span), [low] * n, [span] * n

    def measure(self, batch: Batch, generators: Generators) -> Measured:
        """Project images, and add noise."""
        image = batch.image
        operator = self.operator(tuple(image.shape[1:])).to(image.device)
        if batch.measured is not None:
            return Measured(operator, batch.measured)
        y = operator(image)
        if self.section.photons is None:
            return Measured(operator, _noisy(y, self.section.snr, generators))
        noisy = [
            add_poisson_noise(one[None], self.section.photons, g)
            for one, g in zip(y, generators, strict=True)
        ]
        return Measured(operator, torch.cat(noisy))


class MRIScan(Scan):
    """K-space, undersampled; each image with a mask of its own, and with its coil maps where it has some."""

    is_complex = True
    is_kspace = True
    data_axes = "(C, H, W)"

    def __init__(self, section: settings.MRI) -> None:
        self.section = section
        self._maps: dict[tuple[int, ...], Tensor] = {}

    @property
    def channels(self) -> int:
        """Real and imaginary part."""
        return 2

    def prepare(self, sample: Sample, generator: torch.Generator) -> Sample:
        """Give a real image a smooth random phase, as coils see it."""
        image = sample.image
        if image.is_complex() or image.ndim != 2:
            return sample
        phase = smooth_phase(1, (image.shape[0], image.shape[1]), generator)[0]
        return sample._replace(image=torch.polar(image.abs(), phase) * image.sign())

    def birdcage(self, shape: tuple[int, ...]) -> Tensor:
        """Return the maps of images without their own, ``(C, H, W)``."""
        if shape not in self._maps:
            _require_bounded("MRI: coil maps (C, H, W)", (self.section.coils, *shape))
            self._maps[shape] = birdcage_maps(self.section.coils, (shape[0], shape[1]))
        return self._maps[shape]

    def operator(self, shape: tuple[int, ...]) -> CartesianMRI:
        """Return the operator of the birdcage and all of k-space."""
        return CartesianMRI(self.birdcage(shape), torch.ones(shape[1], dtype=torch.bool))

    def operator_of(
        self, shape: tuple[int, ...], maps: Sequence[Tensor], masks: Sequence[Tensor]
    ) -> CartesianMRI:
        """Return the operator of these maps and masks."""
        return CartesianMRI(torch.stack([*maps]), torch.stack([*masks]))

    def draw_mask(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draw a mask, bool, ``(W,)`` of lines or ``(H, W)`` of points."""
        s, size = self.section, (shape[0], shape[1])
        if s.mask == "poisson_disc":
            return poisson_disc(size, s.acceleration, max(1, round(s.center_fraction * min(size))), generator)
        if s.mask == "radial":
            first = float(torch.rand((), generator=generator)) * math.pi
            return radial(size, s.spokes, first_angle=first)
        draw = {
            "random_lines": random_lines,
            "equispaced_lines": equispaced_lines,
            "gaussian_lines": gaussian_lines,
        }[s.mask]
        return draw(size[1], s.acceleration, s.center_fraction, generator)

    def measure(self, batch: Batch, generators: Generators) -> Measured:
        """Sample k-space, the image's or what was measured, by masks."""
        image, shape = batch.image, tuple(batch.image.shape[1:])
        device = image.device
        maps = (self.birdcage(shape) if batch.maps is None else batch.maps).to(device)
        if batch.measured is not None:
            return Measured(CartesianMRI(maps, (batch.measured != 0).any(1)), batch.measured)
        sampled = batch.kspace.shape[-2:] if batch.kspace is not None else shape
        masks = torch.stack([self.draw_mask(tuple(sampled), g) for g in generators]).to(device)
        masks = masks[:, None] if masks.ndim == 2 else masks
        if batch.kspace is not None:
            y = batch.kspace
        else:
            everything = CartesianMRI(maps, torch.ones(shape[1], dtype=torch.bool, device=device))
            y = _noisy(everything(image), self.section.snr, generators)
        return Measured(CartesianMRI(maps, masks), y * masks[:, None])


class IDTScan(Scan):
    """Intensities; images are contrasts in the configuration's unit."""

    is_complex = True
    axes = 3
    data_axes = "(L, H, W)"
    is_intensity = True

    def __init__(self, section: settings.IDT) -> None:
        self.section, self.unit = section, section.contrast_unit
        self._operators: dict[tuple[int, ...], DiffractionTomography] = {}

    @property
    def channels(self) -> int:
        """Real and imaginary part of each slice."""
        return 2 * len(self.section.depths)

    def prepare(self, sample: Sample, generator: torch.Generator) -> Sample:
        """Bring contrasts to the configuration's unit."""
        return sample._replace(image=sample.image / self.section.contrast_unit)

    def scaled(self, measured: Measured, scale: Scale) -> tuple[Measured, list[float], list[float]]:
        """Leave the data as they are: the operator takes contrasts in the configuration's unit."""
        n = len(measured.data)
        return measured, [0.0] * n, [self.section.contrast_unit] * n

    def show(self, image: Tensor) -> Tensor:
        """Return the phase part, less each slice's median: its mean hardly reaches the camera."""
        return image.real - image.real.flatten(1).median(1).values[:, None, None]

    def operator(self, shape: tuple[int, ...]) -> DiffractionTomography:
        """Return the operator of volumes of this shape."""
        s = self.section
        if shape[0] != len(s.depths):
            raise ValueError(f"IDT: images have {shape[0]} slices, and depths name {len(s.depths)}")
        if shape not in self._operators:
            number = sum(n for n, _ in s.rings)
            _require_bounded("IDT: transfer functions (L, Z, H, W)", (number, *shape))
            leds = torch.cat([led_ring(n, sine) for n, sine in s.rings])
            thickness = s.thickness
            if thickness is None and len(s.depths) > 1:
                thickness = (s.depths[-1] - s.depths[0]) / (len(s.depths) - 1)
            self._operators[shape] = DiffractionTomography(
                (shape[1], shape[2]),
                s.depths,
                leds,
                pixel_size=s.pixel_size,
                wavelength=s.wavelength,
                numerical_aperture=s.numerical_aperture,
                medium_index=s.medium_index,
                magnification=s.magnification,
                # The model is linear: slices thicker by the unit take contrasts in that unit.
                thickness=None if thickness is None else thickness * s.contrast_unit,
                axial=s.axial,
            )
        return self._operators[shape]

    def measure(self, batch: Batch, generators: Generators) -> Measured:
        """Image volumes, and add noise."""
        operator = self.operator(tuple(batch.image.shape[1:])).to(batch.image.device)
        if batch.measured is not None:
            return Measured(operator, batch.measured)
        return Measured(operator, _noisy(operator(batch.image), self.section.snr, generators))
