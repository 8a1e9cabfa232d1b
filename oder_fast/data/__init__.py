"""Real images and k-space, phantoms, datasets, simulated measurements, and how good a reconstruction is."""

from .arrays import read_array
from .cache import Cached
from .coils import birdcage_maps, espirit_maps, noise_covariance, remove_oversampling, whiten
from .datasets import ImageFolder, Phantoms
from .files import atomic, save_npz
from .images import ImageFile, read_image
from .kspace import KSpaceFile, read_kspace
from .kspace_folder import KSpaceFolder
from .masks import equispaced_lines, gaussian_lines, poisson_disc, radial, random_lines
from .metrics import psnr, snr, ssim
from .microscopy import led_grid, led_ring, normalize_background, read_led_stack
from .nifti import read_nifti, write_nifti
from .phantoms import (
    brain_like,
    cell_like,
    patches,
    random_ellipses,
    random_shepp_logan,
    shepp_logan,
    smooth_phase,
)
from .projections import ProjectionFile, normalize_projections, read_projections, remove_rings
from .rotation_axis import RotationAxis, find_rotation_axis
from .samples import Batch, Sample, Samples, Subset, collate, common_shape, seeded_generator, split
from .simulation import add_gaussian_noise, add_poisson_noise, beam_propagation
from .transforms import (
    Compose,
    Patches,
    RandomFlip,
    RandomRotate90,
    RandomRotation,
    RandomScaleIntensity,
)
from .writers import WRITERS, write_image, writer_suffix

__all__ = [
    "WRITERS",
    "Batch",
    "Cached",
    "Compose",
    "ImageFile",
    "ImageFolder",
    "KSpaceFile",
    "KSpaceFolder",
    "Patches",
    "Phantoms",
    "ProjectionFile",
    "RandomFlip",
    "RandomRotate90",
    "RandomRotation",
    "RandomScaleIntensity",
    "RotationAxis",
    "Sample",
    "Samples",
    "Subset",
    "add_gaussian_noise",
    "add_poisson_noise",
    "atomic",
    "beam_propagation",
    "birdcage_maps",
    "brain_like",
    "cell_like",
    "collate",
    "common_shape",
    "equispaced_lines",
    "espirit_maps",
    "find_rotation_axis",
    "gaussian_lines",
    "led_grid",
    "led_ring",
    "noise_covariance",
    "normalize_background",
    "normalize_projections",
    "patches",
    "poisson_disc",
    "psnr",
    "radial",
    "random_ellipses",
    "random_lines",
    "random_shepp_logan",
    "read_array",
    "read_image",
    "read_kspace",
    "read_led_stack",
    "read_nifti",
    "read_projections",
    "remove_oversampling",
    "remove_rings",
    "save_npz",
    "seeded_generator",
    "shepp_logan",
    "smooth_phase",
    "snr",
    "split",
    "ssim",
    "whiten",
    "write_image",
    "write_nifti",
    "writer_suffix",
]
