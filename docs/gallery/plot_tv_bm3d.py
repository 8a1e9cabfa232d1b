"""
RED with total variation and with BM3D
======================================

Neither denoiser learns anything. Total variation is a proximal map, and RED with it converges by a theorem; BM3D
compares patches of the image, and RED with it converges in practice, if not always.
"""

# %%
# A photograph in place of a slice: 96 x 96 pixels, 60 views, noise at 35 dB.

import importlib.util

import matplotlib.pyplot as plt
import skimage.data
import torch

from oder_fast import BM3D, DEQRED, Anderson, ParallelBeamCT, choose_weight
from oder_fast.data import add_gaussian_noise, psnr, ssim

x = torch.from_numpy(skimage.data.camera()[60:252:2, 150:342:2] / 255).float()[None]
ct = ParallelBeamCT(96, angles=60)
y = add_gaussian_noise(ct(x), 35, torch.Generator().manual_seed(0))

# %%
# The weight of total variation comes from the data. BM3D takes a second and more for a call, so its noise level and
# tau are those that were the best of seven pairs on another photograph, ``skimage.data.coins()``; its solve ends
# after ten calls.

solutions = {}
choice = choose_weight(y, ct, tau=0.1, nonnegative=True)
solutions["RED, total variation"] = choice.model(y, ct, return_solution=True)

if importlib.util.find_spec("bm3d") is None:
    print("BM3D needs the package of its authors: pip install bm3d (its licence is for noncommercial use)")
else:
    model = DEQRED(
        BM3D(0.04), tau=0.03, nonnegative=True, normalize=True, solver=Anderson(10, 1e-2), on_failure="ignore"
    )
    with torch.no_grad():  # BM3D has no derivative
        solutions["RED, BM3D"] = model(y, ct, return_solution=True)
for name, solution in solutions.items():
    print(f"{name}: {solution.message}")

# %%
# Relative residuals over the calls of the denoiser.

fig, axis = plt.subplots(figsize=(5, 3), layout="constrained")
for name, solution in solutions.items():
    axis.semilogy(solution.residual_iterations, solution.residuals[:, 0], "o-", label=name)
axis.set(xlabel="calls of the denoiser", ylabel="relative residual")
axis.legend()
plt.show()

# %%
# The images in one grey window, and their errors.

images = {"Truth": x, "FBP, Hann": ct.fbp(y, "hann")} | {name: s.value for name, s in solutions.items()}
fig, axes = plt.subplots(2, len(images), figsize=(2.6 * len(images), 5.4), layout="constrained")
for column, (name, image) in zip(axes.T, images.items(), strict=True):
    column[0].imshow(image[0], cmap="gray", vmin=0, vmax=1)
    figures = f"{psnr(image, x):.2f} dB, SSIM {ssim(image[0], x[0]):.2f}"
    column[0].set_title(name if name == "Truth" else f"{name}\n{figures}")
    if name != "Truth":
        error = column[1].imshow((image - x)[0], cmap="RdBu_r", vmin=-0.25, vmax=0.25)
for axis in axes.flat:
    axis.set_axis_off()
fig.colorbar(error, ax=axes[1], label="error")
plt.show()
