"""
Operators of this package in deepinv
====================================

`OperatorPhysics` makes CT, MRI and diffraction tomography physics of `deepinv <https://deepinv.org>`_: its algorithms,
losses and trainer then run on the kernels of this package. This page needs ``pip install -e '.[all,interop]'``.
"""

# %%
# A CT scan of 60 views with noise. The physics of deepinv for the same scan is ``Tomography``.

import time

import deepinv
import matplotlib.pyplot as plt
import torch

from oder_fast import DEQRED, CartesianMRI, ParallelBeamCT, TotalVariation
from oder_fast.data import birdcage_maps, psnr, random_lines, shepp_logan
from oder_fast.deepinv import OperatorPhysics

torch.manual_seed(0)
size = 128
x = shepp_logan(size)[None, None]  # (B, 1, H, W)
ct = ParallelBeamCT(size, angles=60)
physics = OperatorPhysics(ct, noise_model=deepinv.physics.GaussianNoise(0.1))
y = physics(x)
print(physics)

# %%
# It has all that a ``LinearPhysics`` of deepinv has: here its own test of the adjoint, its norm, and the proximal map
# of the data fidelity, which this package solves by preconditioned conjugate gradients.

print(f"adjointness {float(physics.adjointness_test(x)):.1e}, norm {float(physics.compute_sqnorm(x)):.1f}")

# %%
# Half-quadratic splitting (HQS) of deepinv with its total variation, on both physics with the same settings, from the
# same start. Sinograms of ``Tomography`` have bins before views and sample rays in another way, so each physics makes
# its own data. The options of ``Tomography`` are its fastest.

theirs = deepinv.physics.Tomography(
    angles=60,
    img_width=size,
    circle=False,
    normalize=False,
    adjoint_via_backprop=False,
    parallel_computation=False,
    noise_model=physics.noise_model,
)
scans = {"kernels of this package": (physics, y), "deepinv's Tomography": (theirs, theirs(x))}
images, seconds = {"Truth": x, "FBP, Hann": ct.fbp(y[:, 0], "hann")[:, None]}, {}
for name, (scan, data) in scans.items():
    hqs = deepinv.optim.HQS(
        deepinv.optim.L2(),
        deepinv.optim.PnP(denoiser=deepinv.models.TVDenoiser(n_it_max=100)),
        stepsize=30 / ct.norm_squared(),
        sigma_denoiser=0.02,
        g_first=True,
        max_iter=8,
    )
    began = time.perf_counter()
    images[f"HQS, {name}"] = hqs(data, scan, init=images["FBP, Hann"])
    seconds[name] = time.perf_counter() - began
print({name: f"{value:.2f} s" for name, value in seconds.items()})

# %%
# In MRI both physics have the same numbers, so that one takes the place of the other, with its data.

maps, mask = birdcage_maps(4, (64, 64)), random_lines(64, 4, 0.08, torch.Generator().manual_seed(0))
ours = OperatorPhysics(CartesianMRI(maps, mask))
multi_coil = deepinv.physics.MultiCoilMRI(
    mask=mask.float().expand(64, 64), coil_maps=maps, img_size=(2, 64, 64)
)
image = torch.randn(1, 2, 64, 64)
apart = (ours.A(image) - multi_coil.A(image)).norm() / ours.A(image).norm()
print(f"k-space of both: {float(apart):.1e} apart")

# %%
# A `DEQRED` is a reconstructor of deepinv, ``model(y, physics)``, so that its trainer and its test take it. It solves
# nearly the same equation as HQS above, and goes on to the fixed point, which eight iterations of HQS do not reach.

model = DEQRED(TotalVariation(0.02), tau=0.03)
images["DEQRED"] = model(y, physics)
found = deepinv.test(
    model,
    torch.utils.data.DataLoader([{"x": x[0]}]),
    physics,
    online_measurements=True,
    device="cpu",
    non_blocking_transfers=False,
    show_progress_bar=False,
    verbose=False,
)
print(f"by deepinv.test: {float(found['PSNR']):.2f} dB")

# %%
# Images in one grey window, and their errors.

fig, axes = plt.subplots(2, 5, figsize=(13, 5.6), layout="constrained")
for column, (name, image) in zip(axes.T, images.items(), strict=True):
    title = name.replace(", ", ",\n", 1)
    column[0].imshow(image[0, 0], cmap="gray", vmin=0, vmax=0.5)
    column[0].set_title(title if name == "Truth" else f"{title}\n{psnr(image, x):.2f} dB", fontsize=10)
    if name != "Truth":
        error = column[1].imshow((image - x)[0, 0], cmap="RdBu_r", vmin=-0.2, vmax=0.2)
for axis in axes.flat:
    axis.set_axis_off()
axes[1, 0].imshow(y[0, 0], cmap="gray", aspect="auto")
axes[1, 0].set_title("Sinogram", fontsize=10)
fig.colorbar(error, ax=axes[1], label="error")
plt.show()
