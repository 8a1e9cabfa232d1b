"""How well the models of the package do: a table over how much is measured, and noise.

    python benches/models.py ct slices.npy          # (N, H, W), values from 0 (air)
    python benches/models.py mri slices.npy         # (N, H, W), magnitudes; get smooth random phases

Beside the direct method (filtered back-projection, the best of four filters; zeros where nothing was sampled) and total
variation, the best of six weights, both as the truth has it. tau is the card's, for 256 x 256 pixels and 50 dB (CT) or 30 dB
(MRI); it follows the amplitude of the noise, and for CT 256 / size.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from oder_fast import DEQRED, Anderson, CartesianMRI, ParallelBeamCT, TotalVariation, model_card, pretrained
from oder_fast.data import add_gaussian_noise, birdcage_maps, gaussian_lines, psnr, smooth_phase

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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=KINDS)
    parser.add_argument("images", type=Path)
    parser.add_argument("--cases", type=int, help="the first of them alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
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
