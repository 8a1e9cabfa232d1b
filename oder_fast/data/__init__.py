"""Real images and k-space, phantoms, simulated measurements, and how good a reconstruction is."""

from .coils import birdcage_maps, espirit_maps, noise_covariance, remove_oversampling, whiten
from .images import ImageFile, atomic, read_image, save_npz
from .kspace import KSpaceFile, read_kspace, read_nifti, write_nifti
from .masks import equispaced_lines, gaussian_lines, poisson_disc, radial, random_lines
from .metrics import psnr, snr, ssim
from .microscopy import led_grid, led_ring, normalize_background, read_led_stack
from .phantoms import brain_like, cell_like, patches, random_ellipses, shepp_logan, smooth_phase
from .simulation import add_gaussian_noise, add_poisson_noise, beam_propagation

__all__ = [
    "ImageFile",
    "KSpaceFile",
    "add_gaussian_noise",
    "add_poisson_noise",
    "atomic",
    "beam_propagation",
    "birdcage_maps",
    "brain_like",
    "cell_like",
    "equispaced_lines",
    "espirit_maps",
    "gaussian_lines",
    "led_grid",
    "led_ring",
    "noise_covariance",
    "normalize_background",
    "patches",
    "poisson_disc",
    "psnr",
    "radial",
    "random_ellipses",
    "random_lines",
    "read_image",
    "read_kspace",
    "read_led_stack",
    "read_nifti",
    "remove_oversampling",
    "save_npz",
    "shepp_logan",
    "smooth_phase",
    "snr",
    "ssim",
    "whiten",
    "write_nifti",
]
