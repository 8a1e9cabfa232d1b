"""
Physics of deepinv in a fixed point
===================================

A linear physics of `deepinv <https://deepinv.org>`_ is an operator as it is: ``model(y, physics)``. One model serves
three of them here, a blur, missing pixels and a scan of Fourier space. This page needs
``pip install -e '.[all,interop]'``.
"""

# %%
# A photograph of 128 x 128 pixels, in the shapes of deepinv: ``(B, C, H, W)``.

import deepinv
import matplotlib.pyplot as plt
import skimage.data
import torch

from oder_fast import DEQRED, TotalVariation
from oder_fast.data import psnr

x = torch.from_numpy(skimage.data.camera()[30:286:2, 150:406:2] / 255).float()[None, None]

# %%
# Three physics with noise. ``MRI`` has complex images, whose real and imaginary part are two channels; its mask, of
# every third line and those in the middle, comes from a generator of deepinv.

torch.manual_seed(0)
noise = deepinv.physics.GaussianNoise(0.02)
lines = deepinv.physics.generator.GaussianMaskGenerator((128, 128), acceleration=3)
scans = {
    "Blur": deepinv.physics.BlurFFT(
        img_size=(1, 128, 128),
        filter=deepinv.physics.functional.gaussian_blur(sigma=(1.5, 1.5)),
        noise_model=noise,
    ),
    "Missing pixels": deepinv.physics.Inpainting(img_size=(1, 128, 128), mask=0.4, noise_model=noise),
    "MRI": deepinv.physics.MRI(mask=lines.step()["mask"], img_size=(2, 128, 128), noise_model=noise),
}
truths = {name: torch.cat((x, 0 * x), 1) if name == "MRI" else x for name in scans}
data = {name: physics(truths[name]) for name, physics in scans.items()}
for name, y in data.items():
    print(f"{name}: data {tuple(y.shape)}")

# %%
# The operator comes with the data, so that one model reconstructs all three. Norm and start are found from ``A`` and
# ``A_adjoint``; the first call tests that one is the transpose of the other. The weight of total variation
# was chosen by eye; ``choose_weight(y, physics)`` finds one from the data alone.

model = DEQRED(TotalVariation(0.03), tau=0.05)
solutions = {name: model(data[name], physics, return_solution=True) for name, physics in scans.items()}
for name, solution in solutions.items():
    print(f"{name}: {solution.message}")
    print(f"  {solution.denoiser_calls} calls of the denoiser, {solution.operator_calls:g} of the operator")

# %%
# Gradients go through the fixed point: here that of the error in the weight of total variation.

weight = torch.nn.Parameter(torch.tensor(0.03))
loss = (DEQRED(TotalVariation(weight), tau=0.05)(data["Blur"], scans["Blur"]) - x).square().mean()
loss.backward()
print(f"d loss / d weight = {float(weight.grad):.3g}")

# %%
# The image that the adjoint makes of the data, the fixed point, and its error, in one grey window.

fig, axes = plt.subplots(3, 4, figsize=(10, 8), layout="constrained")
for row, (name, physics) in zip(axes, scans.items(), strict=True):
    start, found = physics.A_adjoint(data[name])[:, 0], solutions[name].value[:, 0]
    images = {"Truth": x[:, 0], f"{name}: adjoint of the data": start, "RED, total variation": found}
    for axis, (title, image) in zip(row, images.items(), strict=False):
        axis.imshow(image[0], cmap="gray", vmin=0, vmax=1)
        axis.set_title(title if title == "Truth" else f"{title}\n{psnr(image, x[:, 0]):.2f} dB", fontsize=10)
    error = row[3].imshow((found - x[:, 0])[0], cmap="RdBu_r", vmin=-0.3, vmax=0.3)
for axis in axes.flat:
    axis.set_axis_off()
fig.colorbar(error, ax=axes[:, 3], label="error")
plt.show()
