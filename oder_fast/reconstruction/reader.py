"""What input files hold, and the images or data in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data import (
    ImageFolder,
    Sample,
    espirit_maps,
    normalize_background,
    read_array,
    read_kspace,
    read_led_stack,
    read_projections,
    remove_oversampling,
)
from ..data.arrays import array_layout
from ..data.datasets import Scale
from ..data.files import is_hdf5, naming
from ..data.images import format_of
from ..data.kspace import kspace_selections, read_kspace_header, readout_oversampling
from ..data.matlab import is_matlab_file
from ..data.nifti import is_nifti, nifti_layout
from ..data.projections import SEARCHED, projections_shape
from ..operators import CartesianMRI, ParallelBeamCT
from ..training.configuration import Configuration
from ..training.draws import seed_of
from ..training.scans import CTScan, Scan
from .jobs import Choices, InputError, Item, Job, is_picture, label_of, led_files

FULL = 0.95
"""Share of its samples that are not 0 from which on a line of k-space counts as measured: some may be 0 by chance."""


class Reader:
    """Looks at files, and reads from them what a scan of a run is to be reconstructed of.

    Args:
        scan: Of the run.
        configuration: Of the run.
        choices: What the user chose.
        image_shape: Of images that files do not tell the shape of.

    Attributes:
        scale: How values come to the model's unit.
        array: Which array of files that hold several.
        select: Counters of the acquisitions of ISMRMRD files.

    Raises:
        InputError: For choices that are not for this scan, or coil maps that are none.
    """

    def __init__(
        self, scan: Scan, configuration: Configuration, choices: Choices, image_shape: tuple[int, ...]
    ) -> None:
        self.scan, self.configuration, self.choices = scan, configuration, choices
        self.image_shape = image_shape
        scale: Scale = configuration.data.scale if choices.scale is None else choices.scale
        self.scale: Scale = scale if scan.unit is None else "none"
        self.array = choices.array or configuration.data.array
        self.select = dict(configuration.data.select if choices.select is None else choices.select)
        self.maps = self._read_maps()
        for name, value, kind, wanted in (
            ("normalize", choices.normalize, "intensities", scan.is_intensity and not choices.simulate),
            ("select", choices.select, "k-space", scan.is_kspace),
            ("maps", choices.maps, "k-space", scan.is_kspace),
            ("image_size", choices.image_size, "sinograms", not scan.is_kspace and not choices.simulate),
        ):
            if value and not wanted:
                raise InputError(f"{name}: is for {kind} that were measured")

    def _read_maps(self) -> Tensor | None:
        if self.choices.maps is None:
            return None
        maps = read_array(self.choices.maps)
        if maps.ndim not in (3, 4) or not maps.is_complex():
            raise InputError(
                f"{self.choices.maps}: coil maps must be complex, (C, H, W) or (S, C, H, W), got {maps.dtype} of shape "
                f"{tuple(maps.shape)}"
            )
        if not bool((_norms(maps) > 0).all()):
            raise InputError(f"{self.choices.maps}: its coil maps are zero everywhere")
        return maps

    def _maps_norm(self, k: int) -> float:
        """Return the norm of the coil maps given for a slice, which the model sees at norm 1."""
        if self.maps is None:
            return 1.0
        return float(_norms(self.maps[k] if self.maps.ndim == 4 else self.maps))

    def inspect(self, path: Path, name: str) -> list[Job]:
        """Look at a file's header; return a job for each of the images that it holds of its slices."""
        if path.is_dir():
            return [self._inspect_leds(path, name)]
        if self.choices.simulate and not self._is_kspace(path):
            return [self._inspect_image(path, name)]
        hint = "it holds images; give --simulate (simulate=True) to measure and reconstruct them"
        if is_picture(path):
            raise ValueError(f"{path}: {hint}")
        if self.scan.is_kspace:
            with naming(path):
                selections = kspace_selections(path, self.select)
            return [self._inspect_kspace(path, name, one) for one in selections]
        if isinstance(self.scan, CTScan) and self.array is None:
            with naming(path):
                projections = projections_shape(path)
            if projections is not None:
                return [self._inspect_projections(path, name, projections)]
        shape, is_complex = self._layout(path)
        wanted = self._data_shape(path)
        if is_complex or shape[-len(wanted) :] != wanted or len(shape) - len(wanted) not in (0, 1):
            image = self.image_shape[-2:]
            looks = f" (or {hint})" if shape[-2:] == image != wanted[-2:] else ""
            raise ValueError(
                f"{path}: measurements must be {self.scan.data_axes} = {wanted} or several of them, for images of "
                f"{image[0]} by {image[1]}, got {'complex ' if is_complex else ''}{shape}; the run's "
                f"geometry is fixed, so train with this scan's, or give another image size (--image-size){looks}"
            )
        count = shape[0] if len(shape) > len(wanted) else 1
        return [Job(path, name, count, wanted, self.image_shape, self.scan.is_complex, False)]

    def _inspect_projections(self, path: Path, name: str, shape: tuple[int, int, int]) -> Job:
        """Find the geometry of a scan in a few of its rows."""
        views, rows, bins = shape
        scan = read_projections(path, slice(0, rows, -(-rows // SEARCHED)))
        image = self.choices.image_size or (bins, bins)
        assert isinstance(self.scan, CTScan)
        operator = ParallelBeamCT(image, **scan.geometry, sampling=self.scan.section.sampling)
        job = Job(path, name, rows, (views, bins), image, False, True, operator=operator, axis=scan.axis)
        job.note(f"rows with the axis of rotation at bin {scan.axis:.2f}", rows)
        return job

    def _inspect_leds(self, path: Path, name: str) -> Job:
        wanted, leds = self._data_shape(path), led_files(path)
        height, width = array_layout(leds[0], None)[0]
        if (len(leds), height, width) != wanted:
            raise ValueError(
                f"{path}: measurements must be images (L, H, W) = {wanted} of LEDs, got {(len(leds), height, width)}; "
                "the run's geometry is fixed, so train with this scan's, or give another image size (--image-size)"
            )
        return Job(path, name, 1, wanted, self.image_shape, True, False)

    def _is_kspace(self, path: Path) -> bool:
        """Tell whether a file to be measured holds all of k-space, which is then undersampled, and not images."""
        if not self.scan.is_kspace or is_hdf5(path) or is_matlab_file(path):
            return self.scan.is_kspace
        if path.suffix.lower() != ".npz" or self.array not in (None, "kspace"):
            return False
        with naming(path), np.load(path, allow_pickle=False) as archive:
            return "kspace" in archive.files

    def _data_shape(self, path: Path) -> tuple[int, ...]:
        try:
            shape: tuple[int, ...] = self.scan.operator(self.image_shape).data_shape
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return shape

    def _inspect_kspace(self, path: Path, name: str, select: dict[str, int]) -> Job:
        with naming(path):
            kind, (slices, coils, height, width), metadata = read_kspace_header(
                path, array=self._array(path), select=self.select | select
            )
            if self.maps is not None and self.maps.shape[-3] != coils:
                raise ValueError(
                    f"it has {coils} coils, and {self.choices.maps} maps of {self.maps.shape[-3]}"
                )
        image = (round(height / readout_oversampling(metadata)), width)
        named, shape = name + label_of(select), (coils, height, width)
        return Job(path, named, slices, shape, image, True, kind != "NPZ", True, select)

    def _inspect_image(self, path: Path, name: str) -> Job:
        if self.maps is not None:
            raise ValueError(f"{path}: it holds images, and coil maps are for k-space")
        images = self._images(path)
        shape = images.shapes[0]
        if len(images) > 1 and self.choices.format == "dicom" and format_of(path) == "DICOM":
            raise ValueError(
                f"{path}: of a DICOM file of several frames no header can be carried over; take nifti or tiff"
            )
        is_complex = self.scan.axes == 3 or self._holds_complex(path)
        if is_complex and not self.scan.is_complex:
            raise ValueError(f"{path}: its images are complex, and this model's are real")
        return Job(path, name, len(images), shape, shape, is_complex, True)

    def _images(self, path: Path) -> ImageFolder:
        return ImageFolder([path], scale="none", array=self._array(path), volumes=self.scan.axes == 3)

    def _holds_complex(self, path: Path) -> bool:
        if is_nifti(path):
            with naming(path):
                return nifti_layout(path)[1].kind == "c"
        return format_of(path) not in ("DICOM", "PNG") and self._layout(path)[1]

    def _array(self, path: Path) -> str | None:
        """Return the name of the array to be read, of files that have names."""
        named = (
            path.suffix.lower() == ".npz"
            or is_matlab_file(path)
            or (not self.scan.is_kspace and is_hdf5(path))
        )
        return self.array.strip("/") if named and self.array is not None else None

    def _layout(self, path: Path) -> tuple[tuple[int, ...], bool]:
        with naming(path):
            return array_layout(path, self._array(path))

    def read(self, job: Job, chunk: slice | None) -> list[Item]:
        """Read some images of a file, or all of them."""
        if job.is_kspace:
            return self._read_kspace(job, chunk)
        if self.choices.simulate:
            return self._read_images(job, chunk)
        if job.operator is not None:
            assert chunk is not None
            values = read_projections(job.path, chunk, axis=job.axis).sinograms
            return [Item(job, k, data=one) for k, one in enumerate(values, chunk.start)]
        if job.path.is_dir():
            values, _ = read_led_stack(job.path)
            job.note("images of LEDs, taken as the illuminations by row, then by column", len(values))
        else:
            values = read_array(job.path, self._array(job.path))
        data = values.reshape(-1, *job.shape)
        if self.choices.normalize:
            with naming(job.path):
                data = normalize_background(data)
        return [Item(job, k, data=one) for k, one in enumerate(data)]

    def _read_images(self, job: Job, chunk: slice | None) -> list[Item]:
        assert chunk is not None
        images, items = self._images(job.path), []
        for k in range(chunk.start, chunk.stop):
            sample = images[k]
            image, low, span = _scaled(sample.image, self.scale)
            seed = seed_of(self.configuration.seed, "reconstruction", job.name, k)
            generator = torch.Generator().manual_seed(seed_of(seed, "phase"))
            sample = self.scan.prepare(sample._replace(image=image), generator)
            span *= self.scan.unit or 1.0
            items.append(Item(job, k, sample=sample, low=low, span=span, seed=seed))
        return items

    def _read_kspace(self, job: Job, chunk: slice | None) -> list[Item]:
        array, select = self._array(job.path), self.select | job.select
        kspace, masks, metadata = read_kspace(job.path, chunk, array=array, select=select)
        first = 0 if chunk is None else chunk.start
        job.voxel_size = metadata.get("voxel_size")
        if first == 0:
            for reason, count in metadata.get("left_out", {}).items():
                job.note(f"acquisitions left out ({reason})", count)
            averages = metadata.get("averages", 1)
            job.note("measurements of a line averaged, at most", averages if averages > 1 else 0)
        items = []
        for k, y in enumerate(kspace, first):
            mask = _sampled(y) if masks is None else masks[k - first]
            y = y * mask
            if not bool(y.any()):
                # An empty slice, such as those at the ends of a volume.
                nothing = torch.zeros(len(y), job.image_shape[-2], y.shape[-1], dtype=y.dtype)
                items.append(Item(job, k, data=nothing, maps=nothing, mask=mask[: nothing.shape[-2]]))
                continue
            factor = readout_oversampling(metadata)
            if factor > 1:
                if not bool((mask == mask[:1]).all()):
                    raise ValueError(
                        f"{job.path}: slice {k}: its readout is oversampled and not sampled fully: it cannot be cut to "
                        "the field of view"
                    )
                y = remove_oversampling(y, -2, factor)
                mask = mask[: y.shape[-2]]
            maps = self._maps_of(job, k, y, mask)
            if self.choices.simulate:
                item = self._reference(job, k, y, maps, mask)
            else:
                item = Item(job, k, data=y, maps=maps, mask=mask)
            items.append(item._replace(span=item.span / self._maps_norm(k)))
        return items

    def _reference(self, job: Job, k: int, y: Tensor, maps: Tensor, mask: Tensor) -> Item:
        """Return an image and all its k-space, to be undersampled."""
        lines = mask.any(0).nonzero()[:, 0]
        # Files leave out lines at the ends.
        missing = int((~mask[:, int(lines[0]) : int(lines[-1]) + 1]).sum())
        if missing:
            raise ValueError(
                f"{job.path}: slice {k}: {missing} of its samples are missing: it cannot be measured anew; without "
                "--simulate it is reconstructed as it is"
            )
        everything = CartesianMRI(maps, torch.ones(y.shape[-1], dtype=torch.bool))
        image = everything.adjoint(y[None])[0]
        largest = float(image.abs().max()) or 1.0
        sample = Sample(f"{job.name}[{k}]", image / largest, y / largest, maps)
        seed = seed_of(self.configuration.seed, "reconstruction", job.name, k)
        return Item(job, k, sample=sample, span=largest, seed=seed)

    def _maps_of(self, job: Job, k: int, y: Tensor, mask: Tensor) -> Tensor:
        if self.maps is not None:
            if self.maps.ndim == 4 and k >= len(self.maps):
                raise ValueError(
                    f"{job.path}: slice {k} has no coil maps, {self.choices.maps} is of {len(self.maps)} slices"
                )
            maps = self.maps[k] if self.maps.ndim == 4 else self.maps
            if maps.shape != y.shape:
                raise ValueError(
                    f"{job.path}: coil maps must have the shape of its k-space, {tuple(y.shape)}, got "
                    f"{tuple(maps.shape)} in {self.choices.maps}"
                )
            return maps / self._maps_norm(k)
        if len(y) == 1:
            return torch.ones_like(y)
        try:
            return espirit_maps(y, mask)
        except ValueError as error:
            raise ValueError(f"{job.path}: slice {k}: {error}; or give coil maps (--maps)") from error


def _norms(maps: Tensor) -> Tensor:
    """Return the largest norm over the coils of maps ``(..., C, H, W)``."""
    norms: Tensor = maps.abs().square().sum(-3).flatten(-2).amax(-1).sqrt()
    return norms


def _scaled(image: Tensor, scale: Scale) -> tuple[Tensor, float, float]:
    """Return an image as `ImageFolder` scales it, and the values that became 0 and 1, as that and their difference."""
    if scale == "none":
        return image, 0.0, 1.0
    if image.is_complex():
        largest = float(image.abs().amax()) or 1.0
        return image / largest, 0.0, largest
    low, high = torch.aminmax(image) if isinstance(scale, str) else scale
    low, high = float(low), float(high)
    span = high - low or 1.0
    return ((image - low) / span).clamp(0, 1), low, span


def _sampled(kspace: Tensor) -> Tensor:
    """Return which samples ``(H, W)`` of k-space ``(C, H, W)`` were measured: what is not 0, lines as a whole."""
    points = (kspace != 0).any(0)
    for axis in (0, 1):
        lines = points.any(axis, keepdim=True).expand_as(points)
        if bool(lines.any()) and float(points[lines].float().mean()) >= FULL:
            return lines
    return points
