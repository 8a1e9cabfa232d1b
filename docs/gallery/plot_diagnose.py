"""
Diagnosis of a map that diverges
================================

A denoiser that sharpens expands differences, and the iteration may move away from every fixed point. `diagnose` tells
so, and what to change.
"""

# %%
# The denoiser blurs a little and then sharpens too much: differences of its input grow by up to a half.

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from oder_fast import (
    DEQRED,
    DivergenceError,
    ParallelBeamCT,
    Picard,
    TotalVariation,
    diagnose,
    estimate_lipschitz,
)
from oder_fast.data import add_gaussian_noise, psnr, shepp_logan

KERNEL = torch.tensor([1.0, 2.0, 1.0])
KERNEL = (KERNEL[:, None] * KERNEL / 16)[None, None]


def blur(image):
    """Average over 3 x 3 pixels, symmetric at the borders."""
    return F.conv2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), KERNEL)


def sharpening(image):
    """Raise high frequencies, by up to a half."""
    return image + 0.5 * (image - blur(image))


x = shepp_logan(48)[None]
ct = ParallelBeamCT(48, angles=60)
y = add_gaussian_noise(ct(x), 35, torch.Generator().manual_seed(0))

# %%
# `Picard` iterates the map itself. All images diverge, so that an error is raised whatever `on_failure` says; it
# keeps the state of the solve.

model = DEQRED(sharpening, tau=0.1, solver=Picard(300))
try:
    model(y, ct)
except DivergenceError as error:
    print(error)
    diverged = error.solution

# %%
# `diagnose` linearizes the map and names the cause.

generator = torch.Generator().manual_seed(0)
diagnosis = diagnose(model, y, ct, generator=generator)
print(diagnosis)

# %%
# The denoiser by itself: x - D(x) is not monotone, so no step size helps where the data do not.

print(estimate_lipschitz(sharpening, x[:, None], generator=generator))

# %%
# Does a lower tau help? Only where the data determine the image. The direction in which this map expands most changes
# sign between most neighbouring pixels, and the scan sees next to nothing of it: the factor is that of the denoiser,
# whatever tau is. Total variation does not expand, and its map contracts.

taus = (1e-3, 1e-2, 1e-1)
denoisers = {"sharpening": sharpening, "total variation": TotalVariation(0.01, iterations=50)}
contraction = {}
for name, denoiser in denoisers.items():
    for tau in taus:
        here = diagnose(DEQRED(denoiser, tau=tau), y, ct, x, iterations=12, generator=generator)
        contraction[name, tau] = float(here.contraction)

remedy = DEQRED(denoisers["total variation"], tau=0.1)
solution = remedy(y, ct, return_solution=True)
print(solution.message)

# %%
# A map that expands by rho moves a growing image by the share 1 - 1/rho of itself in each iteration, which is where
# the relative residual on the left ends. Beside it, the factor over tau, which must be below 1; the direction, in the
# middle of the image; and the reconstruction by total variation.

fig, axes = plt.subplots(1, 4, figsize=(12, 3.2), layout="constrained")
rho = float(diagnosis.contraction)
axes[0].plot(diverged.residual_iterations, diverged.residuals[:, 0], "C3", label="sharpening, tau = 0.1")
axes[0].axhline(1 - 1 / rho, color="0.5", linestyle=":", label=f"1 - 1/{rho:.3f}")
axes[0].set(xlabel="iteration of Picard", ylabel="relative residual", ylim=(0, 0.5))
for name, color in zip(denoisers, ("C3", "C0"), strict=True):
    axes[1].semilogx(taus, [contraction[name, tau] for tau in taus], "o-", color=color, label=name)
axes[1].axhline(1, color="0.5", linestyle=":")
axes[1].set(xlabel="tau", ylabel="contraction factor")
for axis in axes[:2]:
    axis.legend(fontsize=8)
axes[2].imshow(diagnosis.direction[0, 16:32, 16:32], cmap="RdBu_r", vmin=-0.05, vmax=0.05)
axes[2].set_title("sharpening: the direction\nthat grows, 16 x 16 pixels")
axes[3].imshow(solution.value[0], cmap="gray", vmin=0, vmax=0.6)
axes[3].set_title(f"total variation, tau = 0.1\n{psnr(solution.value, x):.2f} dB")
for axis in axes[2:]:
    axis.set_axis_off()
plt.show()
