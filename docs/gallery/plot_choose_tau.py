"""
Choosing tau from the data
==========================

The weight of the prior decides between noise and blur. `choose_weight` and `choose_tau` find it without the truth:
they leave a tenth of the views out, reconstruct from the rest, and score by what was left out.
"""

# %%
# A CT scan of the Shepp-Logan phantom: 40 views with noise at 25 dB. The truth is used below to judge the choice
# alone.

import matplotlib.pyplot as plt
import torch

from oder_fast import DEQRED, ParallelBeamCT, TotalVariation, choose_tau, choose_weight
from oder_fast.data import add_gaussian_noise, psnr, shepp_logan

x = shepp_logan(64)[None]
ct = ParallelBeamCT(64, angles=40)
y = add_gaussian_noise(ct(x), 25, torch.Generator().manual_seed(0))

# %%
# With total variation the product of tau and weight is what regularizes. So one is fixed, tau = 0.1, and the other
# chosen.

choice = choose_weight(y, ct, tau=0.1, bounds=(1e-4, 1.0))
print(choice)
for trial in choice.tried:
    print(f"weight {trial.value:.4f}: score {trial.score:.4f}")

# %%
# Below, the scores beside the error of the image, which only a simulation knows. Both are least at nearly the same
# weight. Images with a fifth of it and with five times as much show what is at stake.

grid = [choice.value * factor for factor in (0.1, 0.2, 0.5, 1, 2, 5, 10)]
models = {weight: DEQRED(TotalVariation(weight), tau=0.1, on_failure="ignore") for weight in grid}
images = {weight: model(y, ct) for weight, model in models.items()}
quality = {weight: psnr(image, x) for weight, image in images.items()}

fig = plt.figure(figsize=(11, 3.4), layout="constrained")
left, right = fig.subfigures(1, 2, width_ratios=(1.15, 2))
axis = left.subplots()
axis.plot(
    *zip(*[(t.value, t.score) for t in choice.tried if t.value >= grid[0] / 2], strict=True),
    "o-",
    label="score, views left out",
)
axis.set(xscale="log", ylim=(0.26, 0.55), xlabel="weight", ylabel="mean square of the residual, left out")
twin = axis.twinx()
twin.plot(quality.keys(), quality.values(), "s--", color="C1", label="PSNR of the image")
twin.set_ylabel("PSNR in dB")
axis.axvline(choice.value, color="0.5", linestyle=":")
left.legend(handles=[*axis.lines[:1], *twin.lines], loc="outside upper center", ncols=2, fontsize=8)
for axis, factor, name in zip(
    right.subplots(1, 3), (0.2, 1, 5), ("a fifth of it", "chosen", "five times as much"), strict=True
):
    weight = choice.value * factor
    axis.imshow(images[weight][0], cmap="gray", vmin=0, vmax=0.5)
    axis.set_title(f"{name}: {weight:.3g}\n{quality[weight]:.2f} dB")
    axis.set_axis_off()
plt.show()

# %%
# For any other denoiser, choose tau. Here it is total variation of one weight again, so that both can be compared.

by_tau = choose_tau(y, ct, TotalVariation(0.02))
print(by_tau)
print(
    f"chosen weight {psnr(choice.model(y, ct), x):.2f} dB, chosen tau {psnr(by_tau.model(y, ct), x):.2f} dB"
)

fig, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
by_tau.plot(axis)
plt.show()
