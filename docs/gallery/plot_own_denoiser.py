"""
Your own denoiser
=================

Any function from ``(B, C, H, W)`` to the same is a denoiser. Here it shrinks coefficients of shift-invariant Haar
wavelets; its threshold is a parameter that can be chosen from the data or trained.
"""

# %%
# The wavelets form a tight frame, :math:`W^T W = 1`. With soft thresholds, :math:`D(x) = W^T \mathrm{soft}(W x)` is
# firmly nonexpansive, so that RED with it converges.

import matplotlib.pyplot as plt
import torch

from oder_fast import DEQRED, ParallelBeamCT, TotalVariation, choose_weight, diagnose, estimate_lipschitz
from oder_fast.data import add_gaussian_noise, psnr, shepp_logan


class HaarShrinkage(torch.nn.Module):
    """Soft thresholds on undecimated Haar wavelets of several scales, periodic at the borders.

    Args:
        threshold: In the unit of the image.
        scales: Number of scales; that with index j has details of 2^j pixels.
    """

    def __init__(self, threshold, scales=3):
        super().__init__()
        self.threshold = torch.nn.Parameter(torch.as_tensor(threshold, dtype=torch.float32))
        self.scales = scales

    def forward(self, image):
        coarse, details = image, []
        for j in range(self.scales):
            # Mean and half difference of two pixels, along rows and columns: one coarse image, three of details.
            parts = [coarse]
            for axis in (-2, -1):
                parts = [q for p in parts for q in haar(p, 2**j, axis)]
            coarse, *bands = parts
            details.append([soft(band, self.threshold) for band in bands])
        for j in reversed(range(self.scales)):
            parts = [coarse, *details[j]]
            for axis in (-1, -2):
                parts = [
                    transposed_haar(*pair, 2**j, axis) for pair in zip(parts[::2], parts[1::2], strict=True)
                ]
            (coarse,) = parts
        return coarse


def haar(image, step, axis):
    """Mean and half difference of each pixel and the one `step` further."""
    other = image.roll(-step, axis)
    return (image + other) / 2, (image - other) / 2


def transposed_haar(mean, difference, step, axis):
    """The transpose of `haar`, which is also its inverse."""
    return (mean + mean.roll(step, axis)) / 2 + (difference - difference.roll(step, axis)) / 2


def soft(values, threshold):
    """Move values to 0 by a threshold."""
    return values.sign() * (values.abs() - threshold).clamp(min=0)


# %%
# Two things to check before use: without a threshold it changes nothing, and it does not expand.

x = shepp_logan(96)[None]
generator = torch.Generator().manual_seed(0)
noisy = (x + 0.1 * torch.randn(x.shape, generator=generator))[:, None]
with torch.no_grad():
    print("largest change without a threshold:", float((HaarShrinkage(0.0)(noisy) - noisy).abs().max()))
print(estimate_lipschitz(HaarShrinkage(0.05), noisy, generator=generator))

# %%
# A CT scan of 40 views. `choose_weight` takes any function that makes a denoiser of a number, and finds the threshold
# from the data. The same for total variation.

ct = ParallelBeamCT(96, angles=40)
y = add_gaussian_noise(ct(x), 30, generator)
haar_choice = choose_weight(y, ct, HaarShrinkage, tau=0.03, bounds=(1e-4, 0.3))
smooth_choice = choose_weight(y, ct, TotalVariation, tau=0.03)
print(haar_choice)
with torch.no_grad():
    solution = haar_choice.model(y, ct, return_solution=True)
    smooth = smooth_choice.model(y, ct)
print(solution.message)
print(diagnose(haar_choice.model, y, ct, generator=generator))

# %%
# The threshold can be trained, too: here is the derivative of the error of the image in it, through the fixed point.

model = DEQRED(HaarShrinkage(haar_choice.value), tau=0.03)
loss = (model(y, ct) - x).square().mean()
loss.backward()
print(f"d loss / d threshold = {float(model.denoiser.threshold.grad):.3g}")

# %%
# Images in one grey window, and their errors.

images = {
    "Truth": x,
    "FBP, Hann": ct.fbp(y, "hann"),
    "RED, Haar": solution.value,
    "RED, total variation": smooth,
}
fig, axes = plt.subplots(2, 4, figsize=(10.5, 5.4), layout="constrained")
for column, (name, image) in zip(axes.T, images.items(), strict=True):
    column[0].imshow(image[0], cmap="gray", vmin=0, vmax=0.5)
    column[0].set_title(name if name == "Truth" else f"{name}\n{psnr(image, x):.2f} dB")
    if name != "Truth":
        error = column[1].imshow((image - x)[0], cmap="RdBu_r", vmin=-0.2, vmax=0.2)
axes[1, 0].imshow(y[0], cmap="gray", aspect="auto")
axes[1, 0].set_title("Sinogram")
for axis in axes.flat:
    axis.set_axis_off()
fig.colorbar(error, ax=axes[1], label="error")
plt.show()
