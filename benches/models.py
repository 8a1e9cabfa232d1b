"""How well the models of the package do: a table over how much is measured, and noise.

    python benches/models.py ct slices.npy          # (N, H, W), values from 0 (air)
    python benches/models.py mri slices.npy         # (N, H, W), magnitudes; get smooth random phases
    python benches/models.py kspace scan.npy        # (C, H, W), all of k-space as measured
    python benches/models.py idt cell.npy           # (Z, H, W), refractive index above the medium's; and phantoms

Beside the direct method (filtered back-projection, the best of four filters; zeros where nothing was sampled) and total
variation, the best of six weights, both as the truth has it. tau is the card's, for 256 x 256 pixels and 50 dB (CT) or 30 dB
(MRI); it follows the amplitude of the noise, and for CT 256 / size.

Volumes are compared by their refractive index, beside Tikhonov's, the best of nine weights as the truth has it. The background
of each slice is that of the network, in the truth and in all reconstructions. tau is the card's for 15 dB.

Of measured k-space lines are left out, coil maps estimated from the rest, and magnitudes compared with those from all lines; tau
is the best of several, as what is compared with has it.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from oder_fast import (
    DEQRED,
    Anderson,
    CartesianMRI,
    DiffractionTomography,
    ParallelBeamCT,
    TotalVariation,
    model_card,
    pretrained,
)
from oder_fast.data import (
    add_gaussian_noise,
    beam_propagation,
    birdcage_maps,
    cell_like,
    espirit_maps,
    gaussian_lines,
    led_ring,
    psnr,
    smooth_phase,
)
from oder_fast.denoisers.slices import background

TRAINED_SIZE = 256
FILTERS = ("ramp", "shepp-logan", "cosine", "hann")
WEIGHTS, TV_TAU, TV_ITERATIONS = (3e-4, 6e-4, 1.2e-3, 2.4e-3, 5e-3, 1e-2), 0.03, 60
COILS, CENTER = 8, 0.32


class Scan(NamedTuple):
    """What is measured of an image, its direct reconstructions, and what tau is multiplied by."""

    truth: torch.Tensor
    operator: torch.nn.Module
    y: torch.Tensor
    direct: list[torch.Tensor]
    factor: float


def scan_ct(image, views, snr, g):
    ct = ParallelBeamCT(tuple(image.shape), views)
    y = add_gaussian_noise(ct(image[None]), snr, g)
    direct = [ct.fbp(y, filter=name).clamp(min=0)[0] for name in FILTERS]
    return Scan(image, ct, y, direct, TRAINED_SIZE / max(image.shape) * 10 ** ((50 - snr) / 20))


def scan_mri(image, acceleration, snr, g):
    shape = tuple(image.shape)
    truth = torch.polar(image / image.max(), smooth_phase(1, shape, g)[0])
    maps = birdcage_maps(COILS, shape)
    everything = CartesianMRI(maps, torch.ones(shape[1], dtype=torch.bool))
    mask = gaussian_lines(shape[1], acceleration, CENTER / acceleration, g)
    y = add_gaussian_noise(everything(truth[None]), snr, g) * mask
    mri = CartesianMRI(maps, mask)
    return Scan(truth, mri, y, [mri.adjoint(y)[0]], 10 ** ((30 - snr) / 20))


class Kind(NamedTuple):
    """Of a model: how it is tested.

    Attributes:
        scan: Measures an image.
        measured: What is varied.
        cases: Its values, with the noise in dB.
        nonnegative: Of total variation.
    """

    scan: Callable[..., Scan]
    measured: str
    cases: list[tuple[float, float]]
    nonnegative: bool


KINDS = {
    "ct": Kind(scan_ct, "views", [(90, 50), (180, 50), (60, 50), (45, 50), (90, 40), (90, 60)], True),
    "mri": Kind(scan_mri, "R", [(4, 30), (2, 30), (6, 30), (8, 30), (4, 20), (4, 40)], False),
}


def measure(name, image, amount, snr, seed):
    """Return PSNR of the three methods, calls of denoiser and operator, seconds, and whether the model converged."""
    kind = KINDS[name]
    scan = kind.scan(image, amount, snr, torch.Generator().manual_seed(seed))

    def quality(x):
        return psnr(x.abs(), scan.truth.abs())

    with torch.no_grad():
        smooth = max(
            quality(
                DEQRED(
                    TotalVariation(weight),
                    tau=TV_TAU,
                    solver=Anderson(TV_ITERATIONS),
                    nonnegative=kind.nonnegative,
                    on_failure="ignore",
                )(scan.y, scan.operator)[0]
            )
            for weight in WEIGHTS
        )
        model = pretrained(name, tau=model_card(name)["tau"] * scan.factor, on_failure="ignore")
        start = time.perf_counter()
        solution = model(scan.y, scan.operator, return_solution=True)
    seconds = time.perf_counter() - start
    return (
        max(map(quality, scan.direct)),
        smooth,
        quality(solution.value[0]),
        solution.denoiser_calls,
        solution.operator_calls,
        seconds,
        float(solution.converged.all()),
    )


class Volume(NamedTuple):
    """What is measured, and how.

    Attributes:
        name: Of the object.
        contrast: n^2 - n_0^2, shape (Z, H, W), complex.
        spacing: Of slices, in micrometres.
        optics: Arguments of `DiffractionTomography`.
    """

    name: str
    contrast: torch.Tensor
    spacing: float
    optics: dict[str, Any]

    def operator(self, leds: int) -> DiffractionTomography:
        slices, *size = self.contrast.shape
        depths = [self.spacing * (k - (slices - 1) / 2) for k in range(slices)]
        aperture = self.optics["numerical_aperture"]
        rings = torch.cat([led_ring(n, aperture * share) for n, share in RINGS[leds]])
        return DiffractionTomography(tuple(size), depths, rings, thickness=self.spacing, **self.optics)


DRY = {"pixel_size": 0.14, "wavelength": 0.515, "numerical_aperture": 0.9, "medium_index": 1.33}
LOWER = {"pixel_size": 0.2, "wavelength": 0.53, "numerical_aperture": 0.65, "medium_index": 1.33}
OF_CELL = {"pixel_size": 0.139, "wavelength": 0.647, "numerical_aperture": 0.9, "medium_index": 1.335}
RINGS = {
    64: ((21, 1.0), (17, 0.8), (13, 0.6), (9, 0.4), (4, 0.2)),
    32: ((13, 1.0), (10, 0.75), (6, 0.5), (3, 0.25)),
    16: ((9, 1.0), (5, 0.6), (2, 0.3)),
}
TIKHONOV = tuple(10 ** (-5 + k / 2) for k in range(9))
IDT_TRAINED_SNR = 15.0


def phantom(seed: int, shape: tuple[int, int, int], spacing: float, optics: dict[str, Any]) -> Volume:
    drawn = cell_like(1, shape, torch.Generator().manual_seed(seed), index_contrast=0.01)[0]
    return Volume("phantom", drawn, spacing, optics)


def real_cell(path: Path, layers: int) -> Volume:
    """Return the cell, the mean of so many layers in each slice."""
    index = torch.from_numpy(np.load(path)).float()
    slices = len(index) // layers
    index = index[: slices * layers].reshape(slices, layers, *index.shape[1:]).mean(1)
    medium = OF_CELL["medium_index"]
    contrast = ((2 * medium + index) * index).to(torch.complex64)
    return Volume("HL60 cell", contrast, layers * OF_CELL["pixel_size"], OF_CELL)


def above(contrast: torch.Tensor, medium: float) -> torch.Tensor:
    """Return the index above the background of each slice, to first order."""
    real = contrast.real / (2 * medium)
    return real - background(real)


def measure_idt(volume: Volume, leds: int, snr: float, exact: bool, seed: int):
    """Return PSNR of Tikhonov and the model, its calls of the denoiser, seconds, and whether it converged."""
    idt, x = volume.operator(leds), volume.contrast[None]
    y = idt(x)
    if exact:
        y = beam_propagation(
            x, idt.illuminations, depths=idt.depths, thickness=volume.spacing, **volume.optics
        )
    y = add_gaussian_noise(y, snr, torch.Generator().manual_seed(seed))
    truth = above(x, idt.medium_index)

    def quality(value):
        return psnr(above(value, idt.medium_index), truth)

    tau = model_card("idt")["tau"] * 10 ** ((IDT_TRAINED_SNR - snr) / 20)
    with torch.no_grad():
        direct = max(quality(idt.tikhonov(y, share * idt.norm_squared())) for share in TIKHONOV)
        start = time.perf_counter()
        solution = pretrained("idt", tau=tau, on_failure="ignore")(y, idt, return_solution=True)
    seconds = time.perf_counter() - start
    return (
        direct,
        quality(solution.value),
        solution.denoiser_calls,
        seconds,
        float(solution.converged.all()),
    )


def idt_table(cell: Path, cases: int | None) -> None:
    usual = [phantom(seed, (6, 96, 96), 2.0, DRY) for seed in (4, 5)]
    thick, thin = [real_cell(cell, 14)], [real_cell(cell, 10)]
    rows: list[tuple[list[Volume], int, float, bool]] = [
        (thick, 64, 20.0, False),
        (thick, 64, 10.0, False),
        (thick, 32, 20.0, False),
        (thin, 64, 20.0, False),
        *((usual, 64, snr, False) for snr in (10.0, 20.0, 30.0, 0.0)),
        (usual, 64, 20.0, True),
        (usual, 16, 20.0, False),
        ([phantom(6, (12, 128, 128), 1.0, DRY)], 64, 20.0, False),
        ([phantom(7, (3, 120, 70), 4.0, DRY)], 32, 20.0, False),
        ([phantom(8, (6, 96, 96), 3.0, LOWER)], 64, 20.0, False),
    ]
    print("| object | slices | pixels | LEDs | noise | Tikhonov | model | its calls | seconds | converged |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for volumes, leds, snr, exact in rows[:cases]:
        measured = [measure_idt(v, leds, snr, exact, seed) for seed, v in enumerate(volumes)]
        direct, ours, calls, seconds, converged = map(statistics.mean, zip(*measured, strict=True))
        first = volumes[0]
        slices, height, width = first.contrast.shape
        name = first.name + (", beam propagation" if exact else "")
        name += f", NA {first.optics['numerical_aperture']:g}" if first.optics is LOWER else ""
        print(
            f"| {name} | {slices}, {first.spacing:.3g} um apart | {height} x {width} | {leds} | {snr:g} dB | {direct:.2f} dB | "
            f"{ours:.2f} dB | {math.ceil(calls)} | {seconds:.1f} | {converged:.0%} |",
            flush=True,
        )


REAL_WEIGHTS, REAL_TAUS, ALL_TAU = (4e-3, 8e-3, 1.6e-2, 2.4e-2), (0.03, 0.06, 0.12, 0.2), 1e-4


def kspace_table(path: Path) -> None:
    kspace = torch.from_numpy(np.load(path)).to(torch.complex64)
    width = kspace.shape[2]
    print("| R | zero filling | total variation | model | its calls of denoiser, operator | seconds |")
    print("|---|---|---|---|---|---|")
    for acceleration in (4, 6):
        mask = gaussian_lines(width, acceleration, CENTER / acceleration, torch.Generator().manual_seed(0))
        maps = espirit_maps(kspace, mask)
        common = {"normalize": False, "on_failure": "ignore"}
        with torch.no_grad():
            everything = CartesianMRI(maps, torch.ones(width, dtype=torch.bool))
            whole = DEQRED(torch.zeros_like, tau=ALL_TAU, **common)(kspace[None], everything)[0].abs()
            unit = float(np.quantile(whole.numpy(), 0.999))
            y, mri = (kspace * mask / unit)[None], CartesianMRI(maps, mask)

            def quality(x, whole=whole / unit):
                return psnr(x.abs(), whole, 1.0)

            smooth = max(
                quality(DEQRED(TotalVariation(w), tau=TV_TAU, solver=Anderson(50), **common)(y, mri)[0])
                for w in REAL_WEIGHTS
            )
            tried = []
            for tau in REAL_TAUS:
                start = time.perf_counter()
                solution = pretrained("mri", tau=tau, **common)(y, mri, return_solution=True)
                tried.append((quality(solution.value[0]), solution, time.perf_counter() - start))
        best, solution, seconds = max(tried, key=lambda one: one[0])
        print(
            f"| {acceleration} | {quality(mri.adjoint(y)[0]):.2f} dB | {smooth:.2f} dB | {best:.2f} dB | "
            f"{solution.denoiser_calls}, {solution.operator_calls:.0f} | {seconds:.1f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=[*KINDS, "kspace", "idt"])
    parser.add_argument("images", type=Path)
    parser.add_argument("--cases", type=int, help="the first of them alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.model == "kspace":
        kspace_table(arguments.images)
        return
    if arguments.model == "idt":
        idt_table(arguments.images, arguments.cases)
        return
    images = torch.from_numpy(np.load(arguments.images)).float()
    kind = KINDS[arguments.model]
    print(f"{len(images)} images of {images.shape[1]} x {images.shape[2]} pixels, means, one thread")
    print(
        f"| {kind.measured} | noise | direct | total variation | model | its calls of denoiser, operator | seconds | "
        "converged |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for amount, snr in kind.cases[: arguments.cases]:
        rows = [measure(arguments.model, image, amount, snr, seed) for seed, image in enumerate(images)]
        direct, tv, ours, calls, products, seconds, converged = map(statistics.mean, zip(*rows, strict=True))
        print(
            f"| {amount:g} | {snr:g} dB | {direct:.2f} dB | {tv:.2f} dB | {ours:.2f} dB | {calls:.0f}, {products:.0f} | "
            f"{seconds:.1f} | {converged:.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
