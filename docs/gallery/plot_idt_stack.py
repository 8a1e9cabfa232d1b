"""
Diffraction tomography of a stack
=================================

A board of LEDs lights a cell from many directions, one after the other, and the camera takes an image of each. From
that stack of intensities the refractive index of several slices in depth is reconstructed.
"""

# %%
# Write the stack: TIFF files whose names end in the row and the column of the LED. The light is simulated by beam
# propagation, which knows of multiple scattering; the reconstruction assumes single scattering, as it does for real
# cells.

import shutil
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tifffile
import torch

from oder_fast import DEQRED, Anderson, DiffractionTomography, TotalVariation, choose_weight
from oder_fast.data import beam_propagation, cell_like, led_grid, normalize_background, psnr, read_led_stack

generator = torch.Generator().manual_seed(3)
depths = torch.arange(-4.0, 5.0, 2.0)  # micrometres
optics = {"pixel_size": 0.2, "wavelength": 0.53, "numerical_aperture": 0.65, "medium_index": 1.33}
board = {"n_rows": 11, "n_columns": 11, "pitch": 4.0, "distance": 40.0, "numerical_aperture": 0.6}
leds, index = led_grid(**board)
x = cell_like(1, (5, 80, 80), generator, index_contrast=0.01, cells=2)
intensity = 1 + beam_propagation(x, leds, depths=depths, **optics)[0]
folder = Path(tempfile.mkdtemp())
for image, (row, column) in zip(intensity, index.tolist(), strict=True):
    counts = torch.poisson(20_000 * image, generator)
    tifffile.imwrite(folder / f"led_{row}_{column}.tif", counts.numpy().astype(np.uint16))
print(f"{len(leds)} images of {tuple(intensity.shape[1:])} pixels")

# %%
# Read it. Each image is divided by its background, and minus 1. Of the board's directions those are taken whose LEDs
# the stack has.

stack, read = read_led_stack(folder)
shutil.rmtree(folder)
order = [index.tolist().index(led) for led in read.tolist()]
y = normalize_background(stack)[None]
idt = DiffractionTomography(tuple(stack.shape[1:]), depths, leds[order], **optics)
print(idt.gram_reason)

# %%
# Tikhonov's solution is closed; its weight is the best of five in hindsight. The weight of total variation comes from
# the data, by illuminations left out. Real and imaginary part of each slice are channels, and each its own. What
# varies slowly in a slice, neither camera nor total variation determines well, so that the last part of the way is
# long: solves end after 40 calls of the denoiser, and the residual tells how far they came.

weights = (1e-4, 1e-3, 3e-3, 1e-2, 1e-1)
n = idt.refractive_index(x).real
tikhonov = max(
    (idt.refractive_index(idt.tikhonov(y, w * idt.norm_squared())).real for w in weights),
    key=lambda image: psnr(image, n),
)


def model(weight):
    """Total variation of that weight, with a solver that ends early."""
    denoiser = TotalVariation(weight, iterations=30)
    return DEQRED(denoiser, tau=0.03, solver=Anderson(40, 1e-3), on_failure="ignore")


choice = choose_weight(y, idt, model, tau=0.03, bounds=(1e-3, 0.3), solves=5)
solution = choice.model(y, idt, return_solution=True)
red = idt.refractive_index(solution.value).real
print(choice)
print(f"relative residual {float(solution.residual):.1g}; ", end="")
print(f"{solution.denoiser_calls} calls of the denoiser, {solution.operator_calls:g} of the operator")

# %%
# Refractive index of three of the five slices. What is uniform in a slice hardly reaches the camera: the mean of each
# slice is lost, so that cells look darker than they are, within a dark rim.

rows = {"Truth": n, f"Tikhonov, {psnr(tikhonov, n):.2f} dB": tikhonov, f"RED, {psnr(red, n):.2f} dB": red}
fig, axes = plt.subplots(3, 4, figsize=(9.5, 7), layout="constrained")
for row, (name, volume) in zip(axes, rows.items(), strict=True):
    for axis, z in zip(row, (1, 2, 3), strict=False):
        shown = axis.imshow(volume[0, z], cmap="gray", vmin=1.325, vmax=1.34)
        axis.set_title(f"{name}\nz = {depths[z]:g} um" if z == 1 else f"z = {depths[z]:g} um")
for axis, led in zip(axes[:, 3], (0, len(leds) // 2, len(leds) - 1), strict=True):
    intensities = axis.imshow(y[0, led], cmap="gray", vmin=-0.1, vmax=0.1)
    axis.set_title(f"LED at {read[led].tolist()}")
for axis in axes.flat:
    axis.set_axis_off()
fig.colorbar(shown, ax=axes[:, 2], label="refractive index", shrink=0.6)
fig.colorbar(intensities, ax=axes[:, 3], label="intensity over background, minus 1", shrink=0.6)
plt.show()
