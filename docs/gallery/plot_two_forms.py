"""
Proximal and gradient form
==========================

Both forms have the same fixed point. The proximal form takes few calls of the denoiser and several of the operator
for each; the gradient form takes one of each in every step, and many steps.
"""

# %%
# A CT scan of 60 views, with total variation as the denoiser.

import matplotlib.pyplot as plt
import torch

from oder_fast import (
    DEQRED,
    Anderson,
    GradientStep,
    Nesterov,
    ParallelBeamCT,
    Picard,
    ProximalStep,
    TotalVariation,
)
from oder_fast.data import add_gaussian_noise, psnr, shepp_logan

x = shepp_logan(64)[None]
ct = ParallelBeamCT(64, angles=60)
y = add_gaussian_noise(ct(x), 35, torch.Generator().manual_seed(0))
denoiser, tau = TotalVariation(0.02, iterations=30, tolerance=0), 0.03

# %%
# The fixed point, to which both are compared, by many iterations to a small tolerance.

exact = DEQRED(denoiser, tau=tau, solver=Anderson(300, 1e-6), on_failure="ignore")(y, ct)

# %%
# Each solver stops where its estimated relative distance from the fixed point is below a tolerance. For a row of
# tolerances: the calls, and the true distance.

forms = {
    "proximal, Anderson": (ProximalStep(), Anderson),
    "proximal, Picard": (ProximalStep(), Picard),
    "gradient, Nesterov": (GradientStep(), Nesterov),
    "gradient, Picard": (GradientStep(), Picard),
}
found = {}
for name, (step, solver) in forms.items():
    rows = []
    for tolerance in (0.3, 0.1, 0.03, 0.01, 0.003, 0.001):
        model = DEQRED(denoiser, tau=tau, step=step, solver=solver(600, tolerance), on_failure="ignore")
        solution = model(y, ct, return_solution=True)
        distance = float((solution.value - exact).norm() / exact.norm())
        rows.append((solution.denoiser_calls, solution.operator_calls, distance))
        if not bool(solution.converged):
            break
    found[name] = rows
    print(f"{name}: to {distance:.1g} {rows[-1][0]} calls of the denoiser, {rows[-1][1]:g} of the operator")

# %%
# Left and middle, the same distances over the calls of the denoiser and of the operator. With a network as the
# denoiser the left plot is what counts, since one call of it costs far more than one of the operator. On the right
# the image that all of them go to.

fig, axes = plt.subplots(1, 3, figsize=(11, 3.9), layout="constrained")
for (name, rows), color in zip(found.items(), ("C0", "C9", "C1", "C3"), strict=True):
    denoiser_calls, operator_calls, distances = zip(*rows, strict=True)
    axes[0].loglog(denoiser_calls, distances, "o-", color=color, label=name)
    axes[1].loglog(operator_calls, distances, "o-", color=color, label=name)
for axis, what in zip(axes, ("denoiser", "operator"), strict=False):
    axis.set(xlabel=f"calls of the {what}", ylabel="relative distance from the fixed point", xlim=(1, 1000))
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
axes[2].imshow(exact[0], cmap="gray", vmin=0, vmax=0.5)
axes[2].set_title(f"fixed point, {psnr(exact, x):.2f} dB")
axes[2].set_axis_off()
plt.show()
