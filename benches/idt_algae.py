"""Reconstruct spirogyra algae from measured intensity images, by Tikhonov and RED.

The data are public (High-Throughput-IDT of Boston University's computational imaging systems lab): 89 images of the
LEDs of a board, each TIFF file with the LED's row (y) and column (x) in its name. Wavelength 0.630 um, NA 0.25, pixels of
6.5 um at a magnification of 10.07, in water; LEDs 4 mm apart, 79 mm below. The camera sees the board's columns mirrored.

What a reconstruction does not explain is told as the share of the energy of the data's spectra within the pupils.

    python benches/idt_algae.py FOLDER --crop 384 --output algae
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from oder_fast import DEQRED, Anderson, DiffractionTomography, DnCNN
from oder_fast.data import led_grid, normalize_background, random_ellipses, read_led_stack, save_npz

OPTICS = {
    "pixel_size": 6.5,
    "magnification": 10.07,
    "wavelength": 0.63,
    "numerical_aperture": 0.25,
    "medium_index": 1.33,
}
BOARD, CENTER = 33, 17
DEPTHS = (-20.0, 100.0)
"""Of the first and last slice in the authors' reconstruction, in micrometres of air."""


class Slicewise(nn.Module):
    """A denoiser of real images, for the real and the imaginary part of each slice in a unit that suits it."""

    def __init__(self, denoiser: nn.Module, unit: float) -> None:
        super().__init__()
        self.denoiser, self.unit = denoiser, unit

    def forward(self, x: Tensor) -> Tensor:
        """Denoise ``(B, 2 Z, H, W)``."""
        flat = (x / self.unit).reshape(-1, 1, *x.shape[-2:])
        result: Tensor = self.denoiser(flat).reshape(x.shape) * self.unit
        return result


def read(source: Path, crop: int) -> tuple[Tensor, Tensor]:
    """Return images over their background minus 1 (L, N, N), and the directions of the light (L, 2)."""
    if source.suffix == ".npz":
        with np.load(source) as arrays:
            images = torch.from_numpy(arrays["intensity"].astype("float32"))
            index = torch.from_numpy(arrays["led_row_col"].astype("int64"))
    else:
        images, index = read_led_stack(source)
    y = normalize_background(images)
    top, left = ((n - crop) // 2 for n in y.shape[1:])
    sines, _ = led_grid(BOARD, BOARD, 4.0, 79.0, center=(CENTER, CENTER))
    lights = sines.reshape(BOARD, BOARD, 2)[index[:, 0], index[:, 1]] * torch.tensor([1.0, -1.0])
    return y[:, top : top + crop, left : left + crop], lights


def trained() -> DnCNN:
    """Train a small denoiser on ellipses, noise up to 0.1."""
    torch.manual_seed(0)
    denoiser = DnCNN(depth=4, width=24, bias=False)
    optimizer = torch.optim.Adam(denoiser.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        clean = random_ellipses(8, 64, generator)[:, None] - 0.3
        sigma = 0.1 * torch.rand(8, 1, 1, 1, generator=generator)
        noisy = clean + sigma * torch.randn(clean.shape, generator=generator)
        optimizer.zero_grad()
        (denoiser(noisy) - clean).square().mean().backward()
        optimizer.step()
    return denoiser


def unexplained(idt: DiffractionTomography, x: Tensor, y: Tensor) -> float:
    """Return the share of the data's energy, within the pupils, that a reconstruction leaves."""
    height, width = y.shape[-2:]
    columns = torch.arange(width // 2 + 1)
    rows = -torch.arange(height) % height
    # The pupils in half a spectrum, and what they see of the other half, mirrored.
    begin, end = idt.support.unbind(-1)
    inside = (columns >= begin[..., None]) & (columns < end[..., None])
    inside |= (-columns >= begin[:, rows, None]) & (-columns < end[:, rows, None])
    residual, data = (torch.fft.rfft2(v)[:, inside] for v in (idt(x) - y, y))
    return float((residual.norm() / data.norm()) ** 2)


def main() -> None:
    """Reconstruct, tell the residuals, draw the slices."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "source", type=Path, help="folder of TIFF files, or an NPZ of intensity and led_row_col"
    )
    parser.add_argument("--crop", type=int, default=384, help="pixels along a side, from the middle")
    parser.add_argument("--slices", type=int, default=13)
    parser.add_argument("--weight", type=float, default=1e-3, help="of Tikhonov, in units of |A|^2")
    parser.add_argument("--tau", type=float, default=1e-2, help="in units of |A|^2")
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--output", type=Path, default=Path("idt-algae"))
    arguments = parser.parse_args()
    y, lights = read(arguments.source, arguments.crop)
    y = y[None]
    depths = OPTICS["medium_index"] * torch.linspace(*DEPTHS, arguments.slices)
    idt = DiffractionTomography(arguments.crop, depths, lights, gram=False, **OPTICS)
    weight = arguments.weight * idt.norm_squared()
    print(idt)
    single = []
    for depth in depths.tolist():
        alone = DiffractionTomography(
            arguments.crop, [depth], lights, thickness=idt.optics.spacing, gram=False, **OPTICS
        )
        single.append(unexplained(alone, alone.tikhonov(y, 1e-3 * alone.norm_squared()), y))
    best = min(range(len(single)), key=single.__getitem__)
    print(
        f"one slice alone leaves {100 * single[best]:.1f} % of the energy at best, at {depths[best]:.1f} um"
    )
    start = time.perf_counter()
    tikhonov = idt.tikhonov(y, weight)
    print(f"Tikhonov leaves {100 * unexplained(idt, tikhonov, y):.1f} %, {time.perf_counter() - start:.0f} s")
    denoiser = trained()
    # Every seventh value is enough for a quantile, and few enough for torch.quantile.
    unit = float(tikhonov.abs().flatten()[::7].quantile(0.999))
    model = DEQRED(
        Slicewise(denoiser, unit),
        tau=arguments.tau,
        solver=Anderson(arguments.iterations),
        on_failure="ignore",
    )
    start = time.perf_counter()
    with torch.no_grad():
        solution = model(y, idt, tikhonov, return_solution=True)
    red = solution.value
    print(
        f"RED leaves {100 * unexplained(idt, red, y):.1f} %, {time.perf_counter() - start:.0f} s; {solution.message}"
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    save_npz(arguments.output / "arrays.npz", tikhonov=tikhonov[0], red=red[0], depths=depths)
    draw(arguments.output / "figure.png", idt, depths, {"Tikhonov": tikhonov[0], "RED": red[0]})


def draw(path: Path, idt: DiffractionTomography, depths: Tensor, volumes: dict[str, Tensor]) -> None:
    """Draw slices, and a cut along the light, of the refractive index."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picked = [round(k * (len(depths) - 1) / 4) for k in range(5)]
    figure = Figure(figsize=(18, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(volumes), 6)
    for line, (name, contrast) in zip(axes, volumes.items(), strict=True):
        index = idt.refractive_index(contrast).real
        low, high = (float(index[picked].flatten()[::7].quantile(q)) for q in (0.01, 0.995))
        for axis, k in zip(line, picked, strict=False):
            axis.imshow(index[k].numpy(), cmap="gray", vmin=low, vmax=high)
            axis.set(title=f"{name}, {depths[k]:.0f} um", xticks=[], yticks=[])
        middle = index[:, index.shape[1] // 2]
        shown = line[5].imshow(middle.numpy(), cmap="gray", vmin=low, vmax=high, aspect="auto")
        line[5].set(title=f"{name}, x-z cut", xticks=[], yticks=[])
        figure.colorbar(shown, ax=line[5], label="refractive index")
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
