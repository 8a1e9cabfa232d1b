"""Run sparse-view CT as the official code of ODER sets it up, with its weights or others.

512 x 512 pixels scaled to [0, 1], 90 views over 180 degrees, 725 bins, noise at exactly 50 dB; from the Hann-filtered
back-projection, clipped at 0, 180 iterations with Nesterov's momentum, never restarted, each with 30 views: the
same 6 offsets in each of 5 sectors. The official operator pair has the norm L = 776.6 and the step 1e-3; ours is
scaled otherwise, so that step * L = 0.777 and step * tau = 1e-3 * tau are what is kept.

What differs: ours is Joseph's projector with its exact transpose (the official one interpolates bilinearly and
back-projects by other weights), and turns about the image's centre, half a pixel from the official axis.

    python benches/paper_ct.py --weights ODER.pth --image slice.dcm --tau 1.18034
    python benches/paper_ct.py --weights "RED(DEQ).pth" --image slice.dcm --tau 1.66626 --minibatch 90
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch

from oder_fast import DnCNN, ParallelBeamCT, UNet, oder
from oder_fast.data import add_gaussian_noise, read_image, save_npz, shepp_logan, snr

VIEWS, SNR, ITERATIONS, SIZE = 90, 50.0, 180, 512
STEP_TIMES_NORM = 0.777
OFFICIAL_STEP = 1e-3


def read_denoiser(path: Path | None) -> tuple[torch.nn.Module, str]:
    """Load the official checkpoint, or what `oder-fast demo` wrote; random weights without a file."""
    if path is None:
        torch.manual_seed(0)
        return UNet(), "RANDOM WEIGHTS: the time is right, the image is not (give --weights)"
    saved = torch.load(path, map_location="cpu", weights_only=True)
    if "arguments" in saved:
        denoiser = DnCNN(**saved["arguments"])
        denoiser.load_state_dict(saved["state_dict"])
        return denoiser, f"the DnCNN of oder-fast demo, {path}"
    unet = UNet()
    unet.load_official_state_dict(saved)
    return unet, f"the official U-Net, {path}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, metavar="FILE")
    parser.add_argument("--image", type=Path, metavar="FILE", help="default: the Shepp-Logan phantom")
    parser.add_argument("--tau", type=float, default=1.18034, help="as in the official code")
    parser.add_argument("--minibatch", type=int, default=30, help=f"views a step; {VIEWS} is RED (DEQ)")
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="two at least")
    parser.add_argument("--seed", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, metavar="FILE.npz")
    arguments = parser.parse_args()

    truth = shepp_logan(SIZE) if arguments.image is None else read_image(arguments.image).image
    if truth.shape != (SIZE, SIZE):
        raise SystemExit(f"{arguments.image}: must have {SIZE} x {SIZE} pixels, has {tuple(truth.shape)}")
    truth = ((truth - truth.min()) / (truth.max() - truth.min()))[None].to(arguments.device)
    denoiser, name = read_denoiser(arguments.weights)
    denoiser.eval().to(arguments.device)
    print(f"Denoiser: {name}")

    ct = ParallelBeamCT(SIZE, VIEWS, n_bins=math.ceil(SIZE * math.sqrt(2)), sampling="stratified")
    ct.to(arguments.device)
    generator = torch.Generator().manual_seed(arguments.seed)
    y = add_gaussian_noise(ct(truth), SNR, generator)
    drawn = generator.get_state()
    initial = ct.fbp(y, filter="hann").clamp(min=0)
    before = image = initial
    seconds = 0.0
    # The official code reports the iterate before the last update.
    for iterations in (arguments.iterations - 1, arguments.iterations):
        model = oder(
            denoiser,
            OFFICIAL_STEP * arguments.tau / STEP_TIMES_NORM,
            arguments.minibatch,
            step_size=STEP_TIMES_NORM,
            max_iterations=iterations,
            generator=generator.set_state(drawn),
        )
        start = time.perf_counter()
        with torch.no_grad():
            before, image = image, model(y, ct, initial)
        if truth.is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    print(f"FBP, Hann, clipped: SNR {snr(initial, truth):.2f} dB")
    print(
        f"{arguments.minibatch} of {VIEWS} views a step, {arguments.iterations} iterations: SNR "
        f"{snr(before, truth):.2f} dB (official metric), {snr(image, truth):.2f} dB at the end; {seconds:.1f} s"
    )
    if arguments.output:
        save_npz(
            arguments.output,
            truth=truth[0].cpu(),
            fbp=initial[0].cpu(),
            image=image[0].cpu(),
            sinogram=y[0].cpu(),
        )


if __name__ == "__main__":
    main()
