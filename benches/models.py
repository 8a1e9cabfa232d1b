"""How well the model "ct" of the package does: a table over views and noise.

    python benches/models.py slices.npy        # (N, H, W), values from 0 (air)

Beside filtered back-projection, the best of four filters, and total variation, the best of six weights, both as the truth has
it. tau is the card's for 256 x 256 pixels and 50 dB; it follows the amplitude of the noise, and 256 / size.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from oder_fast import DEQRED, Anderson, ParallelBeamCT, TotalVariation, model_card, pretrained
from oder_fast.data import add_gaussian_noise, psnr

CASES = [(90, 50.0), (180, 50.0), (60, 50.0), (45, 50.0), (90, 40.0), (90, 60.0)]
TRAINED_SIZE, TRAINED_SNR = 256, 50.0
FILTERS = ("ramp", "shepp-logan", "cosine", "hann")
WEIGHTS, TV_TAU, TV_ITERATIONS = (3e-4, 6e-4, 1.2e-3, 2.4e-3, 5e-3, 1e-2), 0.03, 60


def measure(x, views, snr, seed):
    """Return PSNR of the three methods, calls of denoiser and operator, seconds, and whether the model converged."""
    ct = ParallelBeamCT(tuple(x.shape[1:]), views)
    y = add_gaussian_noise(ct(x), snr, torch.Generator().manual_seed(seed))
    noise = 10 ** ((TRAINED_SNR - snr) / 20)
    tau = model_card("ct")["tau"] * TRAINED_SIZE / max(x.shape[1:]) * noise
    with torch.no_grad():
        direct = max(psnr(ct.fbp(y, filter=name).clamp(min=0), x) for name in FILTERS)
        smooth = max(
            psnr(
                DEQRED(
                    TotalVariation(weight),
                    tau=TV_TAU,
                    solver=Anderson(TV_ITERATIONS),
                    nonnegative=True,
                    on_failure="ignore",
                )(y, ct),
                x,
            )
            for weight in WEIGHTS
        )
        start = time.perf_counter()
        solution = pretrained("ct", tau=tau, on_failure="ignore")(y, ct, return_solution=True)
    seconds = time.perf_counter() - start
    return (
        direct,
        smooth,
        psnr(solution.value, x),
        solution.denoiser_calls,
        solution.operator_calls,
        seconds,
        float(solution.converged.all()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", type=Path)
    parser.add_argument("--cases", type=int, help="the first of them alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    images = torch.from_numpy(np.load(arguments.images)).float()
    print(f"{len(images)} images of {images.shape[1]} x {images.shape[2]} pixels, means, one thread")
    print(
        "| views | noise | FBP | total variation | model | its calls of denoiser, operator | seconds | converged |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for views, snr in CASES[: arguments.cases]:
        rows = [measure(image[None], views, snr, seed) for seed, image in enumerate(images)]
        fbp, tv, ours, calls, products, seconds, converged = map(statistics.mean, zip(*rows, strict=True))
        print(
            f"| {views} | {snr:g} dB | {fbp:.2f} dB | {tv:.2f} dB | {ours:.2f} dB | {calls:.0f}, {products:.0f} | "
            f"{seconds:.1f} | {converged:.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
