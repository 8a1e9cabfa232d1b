"""
A measured tooth
================

TomoPy's scan of a tooth, measured at a synchrotron: reconstructed from every fourth of its 181 views, and judged by the
views that were left out. The scan is not in this repository. The figure is of a run with it.

.. image:: ../images/tooth.png
   :alt: The tooth by filtered back-projection of 46 views and of 181, and by RED from 46 views; the part in the middle
         enlarged
"""

# %%
# The file is ``tooth.h5`` of the `repository of TomoPy <https://github.com/tomopy/tomopy>`_. Name its path by the
# variable ``TOOTH`` of the environment; the build of this site runs the page only where it is set.

# sphinx_gallery_thumbnail_path = 'images/tooth.png'
import os

import matplotlib.pyplot as plt
import numpy as np
import torch

from oder_fast import DEQRED, ParallelBeamCT, TotalVariation
from oder_fast.data import read_projections

path = os.environ["TOOTH"]

# %%
# One row of the detector. The file says that the last view is at 179 degrees, yet it mirrors the first: the scan went
# on to 180, and angles given here take the place of the file's.

scan = read_projections(path, rows=0, angles=np.deg2rad(np.arange(181.0)))
y = scan.sinograms
print(tuple(y.shape), f"axis of rotation at bin {scan.axis:.2f}")
print(scan.metadata)

# %%
# The views in three parts: 46 to reconstruct from, and the 135 others to judge by.

size, few = 448, torch.arange(0, 181, 4)
others = torch.tensor(sorted(set(range(181)) - set(few.tolist())))


def scanner(views):
    """The scan of some views alone."""
    return ParallelBeamCT(size, **(scan.geometry | {"angles": scan.angles[views]}))


ct, left_out = scanner(few), scanner(others)
model = DEQRED(TotalVariation(0.1), tau=0.003, nonnegative=True, normalize=True)
solution = model(y[:, few], ct, return_solution=True)
print(solution.message)
print(f"{solution.denoiser_calls} calls of the denoiser, {solution.operator_calls:g} of the operator")

images = {
    "FBP, 46 views": ct.fbp(y[:, few]),
    "FBP with a Hann window, 46 views": ct.fbp(y[:, few], "hann"),
    "RED, total variation, 46 views": solution.value,
    "FBP, all 181 views": scanner(torch.arange(181)).fbp(y),
}

# %%
# What each image predicts of the views left out. Filtered back-projection of all views has seen them.

off = {}
for name, image in images.items():
    off[name] = float((left_out(image) - y[:, others]).norm() / y[:, others].norm())
    print(f"{name}: off by {off[name]:.1%}")

images.pop("FBP, 46 views")
fig, axes = plt.subplots(2, 3, figsize=(9, 5.7), layout="constrained")
for column, (name, image) in zip(axes.T, images.items(), strict=True):
    column[0].imshow(image[0], cmap="gray", vmin=0, vmax=0.01)
    column[0].set_title(f"{name}\n{off[name]:.1%} off", fontsize=10)
    shown = column[1].imshow(image[0, 160:288, 160:288], cmap="gray", vmin=0, vmax=0.01)
for axis in axes.flat:
    axis.set_axis_off()
fig.colorbar(shown, ax=axes, label="attenuation per bin")
plt.show()
