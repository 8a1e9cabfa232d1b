"""
Train through the fixed point
=============================

A denoiser that learned to remove noise is not the best one for a reconstruction. Deep equilibrium training (DEQ)
differentiates the fixed point itself, so that the network learns from the images that are reconstructed with it.
"""

# %%
# Images of random ellipses, scans of 24 views with noise at 30 dB. The images that are shown at the end are none of
# those that are learned from. Everything here is tiny, to end in seconds.

import warnings

import matplotlib.pyplot as plt
import torch

from oder_fast import DEQRED, Anderson, DnCNN, Implicit, NotConvergedWarning, ParallelBeamCT, choose_weight
from oder_fast.data import add_gaussian_noise, psnr, random_ellipses

torch.manual_seed(0)
generator = torch.Generator().manual_seed(0)
ct = ParallelBeamCT(48, angles=24)


def draw(n):
    """Draw images and their noisy sinograms."""
    images = random_ellipses(n, 48, generator)
    return images, add_gaussian_noise(ct(images), 30, generator)


x, y = draw(8)  # for tests alone
denoiser = DnCNN(depth=4, width=16, bias=False)
solver, differentiation = Anderson(30, 3e-3), Implicit(Anderson(30, 0.05))
model = DEQRED(denoiser, tau=0.05, solver=solver, differentiation=differentiation, on_failure="ignore")

# %%
# First stage: the network removes Gaussian noise of random strength.

optimizer = torch.optim.Adam(denoiser.parameters(), 3e-3)
for _ in range(250):
    images = random_ellipses(8, 48, generator)[:, None]
    sigma = 0.2 * torch.rand(8, 1, 1, 1, generator=generator)
    loss = (
        (denoiser(images + sigma * torch.randn(images.shape, generator=generator)) - images).square().mean()
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
with torch.no_grad():
    on_noise = model(y, ct)

# %%
# Second stage: the same network, through the fixed point. The backward pass solves one more fixed point; its memory
# does not grow with the iterations. Solves may take 30 calls; the plot below shows which ones come to that, so
# nothing warns here.

warnings.simplefilter("ignore", NotConvergedWarning)
optimizer = torch.optim.Adam(denoiser.parameters(), 1e-3)
losses, calls = [], []
for _ in range(50):
    images, sinograms = draw(4)
    solution = model(sinograms, ct, return_solution=True)
    loss = (solution.value - images).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(float(loss.detach()))
    calls.append((solution.denoiser_calls, solution.adjoint[-1].denoiser_calls))
with torch.no_grad():
    trained = model(y, ct)

# %%
# Total variation, whose weight the test scans choose, is the baseline to beat. The loss varies with the images drawn.
# Calls grow as the network comes to do more to the image, until solves end at the limit: a sign to watch in longer
# trainings.

smooth = choose_weight(y, ct, tau=0.1).model(y, ct)
reconstructions = {
    "FBP, Hann": ct.fbp(y, "hann"),
    "RED, total variation": smooth,
    "RED, trained on noise": on_noise,
    "RED, trained through it": trained,
}
mean = {name: sum(map(psnr, images, x)) / len(x) for name, images in reconstructions.items()}
for name, value in mean.items():
    print(f"{name}: {value:.2f} dB, mean over {len(x)} test images")

fig, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
axes[0].semilogy(losses)
axes[0].set(xlabel="step of the second stage", ylabel="mean square error")
axes[1].plot(calls, label=["forward solve", "adjoint solve"])
axes[1].set(xlabel="step of the second stage", ylabel="calls of the denoiser", ylim=(0, None))
axes[1].legend()
plt.show()

# %%
# One of the test images, in one grey window, and the errors.

fig, axes = plt.subplots(2, 5, figsize=(12, 5.2), layout="constrained")
for column, (name, images) in zip(axes.T, {"Truth": x, **reconstructions}.items(), strict=True):
    column[0].imshow(images[0], cmap="gray", vmin=0, vmax=1)
    column[0].set_title(name if name == "Truth" else f"{name}\n{psnr(images[0], x[0]):.2f} dB")
    if name != "Truth":
        error = column[1].imshow((images - x)[0], cmap="RdBu_r", vmin=-0.3, vmax=0.3)
for axis in axes.flat:
    axis.set_axis_off()
fig.colorbar(error, ax=axes[1], label="error")
plt.show()
