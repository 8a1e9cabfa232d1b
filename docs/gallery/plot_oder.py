"""
ODER as it was published
========================

Online deep equilibrium learning takes gradient steps with minibatches of the measurements. `oder` builds it as its
official code has it. Its minibatches' noise leaves a floor under the error; variance reduction takes the floor away.
"""

# %%
# A CT scan of 60 views, of which each step takes 15. Views are drawn in sectors, as in the official code.

import matplotlib.pyplot as plt
import torch

from oder_fast import DEQRED, Anderson, GradientStep, Nesterov, ParallelBeamCT, TotalVariation, oder
from oder_fast.data import add_gaussian_noise, psnr, shepp_logan

x = shepp_logan(64)[None]
ct = ParallelBeamCT(64, angles=60, sampling="stratified")
y = add_gaussian_noise(ct(x), 30, torch.Generator().manual_seed(0))
denoiser, tau = TotalVariation(0.02, iterations=30, tolerance=0), 0.03
exact = DEQRED(
    denoiser, tau=tau, nonnegative=True, normalize=False, solver=Anderson(300, 1e-6), on_failure="ignore"
)(y, ct)

# %%
# The published iteration ends after a fixed number of steps, whatever its error; each point below is a solve of its
# own. The other model is the same step with variance reduction, by Nesterov's momentum with restarts, and it ends by
# a test.

lengths = (10, 20, 40, 80, 160)
curves = {}
for name, minibatch in (
    ("ODER, 15 of 60 views", 15),
    ("ODER, 30 of 60 views", 30),
    ("ODER, all 60 views", 60),
):
    rows = []
    for length in lengths:
        generator = torch.Generator().manual_seed(0)
        model = oder(denoiser, tau, minibatch, max_iterations=length, generator=generator)
        solution = model(y, ct, return_solution=True)
        rows.append((solution.operator_calls, float((solution.value - exact).norm() / exact.norm())))
    curves[name] = rows
    if minibatch == 15:
        published = solution.value

rows = []
for length in lengths:
    reduced = DEQRED(
        denoiser,
        tau=tau,
        step=GradientStep(minibatch_size=15),
        solver=Nesterov(length, 1e-4),
        nonnegative=True,
        normalize=False,
        generator=torch.Generator().manual_seed(0),
        on_failure="ignore",
    )
    solution = reduced(y, ct, return_solution=True)
    rows.append((solution.operator_calls, float((solution.value - exact).norm() / exact.norm())))
curves["variance-reduced, 15 of 60 views"] = rows

# %%
# The distance from the fixed point over calls of the operator, where a minibatch counts as its share of the views. At
# first minibatches are the cheaper way; then the published form stays at the floor of its noise.

fig, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained", width_ratios=(1.6, 1, 1))
for name, rows in curves.items():
    axes[0].loglog(*zip(*rows, strict=True), "o-", label=name)
axes[0].set(xlabel="calls of the operator (all views)", ylabel="relative distance from the fixed point")
axes[0].legend(fontsize=8)
for axis, name, image in (
    (axes[1], "ODER, 15 of 60 views,\n160 steps", published),
    (axes[2], "fixed point", exact),
):
    axis.imshow(image[0], cmap="gray", vmin=0, vmax=0.5)
    axis.set_title(f"{name}, {psnr(image, x):.2f} dB")
    axis.set_axis_off()
plt.show()
