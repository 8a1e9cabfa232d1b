"""
A beamline's sinogram
=====================

Scans of synchrotrons come as counts in DataExchange HDF5, the format of TomoPy. `read_projections` makes sinograms of
them and finds the axis of rotation. Here such a file is written from a phantom first; give the path of your own
instead.
"""

# %%
# Write the file: 181 views over 180 degrees, two rows of a detector whose middle is 4.5 bins beside the axis of
# rotation, bins of unequal gain, frames of the open beam and of the dark, photon noise.

from pathlib import Path

import h5py
import matplotlib.pyplot as plt
import numpy as np
import torch

from oder_fast import ParallelBeamCT, choose_weight
from oder_fast.data import psnr, random_ellipses, read_projections

generator = torch.Generator().manual_seed(0)
size, n_bins = 128, 160
x = 0.02 * random_ellipses(2, size, generator)  # attenuation per width of a bin
degrees = torch.arange(181.0)
exact = ParallelBeamCT(size, torch.deg2rad(degrees), n_bins=n_bins, bin_offset=-4.5)

gain = 1 + 0.02 * torch.randn(2, n_bins, generator=generator)
beam = 20_000 * gain.expand(10, 2, n_bins)
drift = 1 + 0.01 * torch.randn(2, n_bins, generator=generator) * (
    torch.rand(2, n_bins, generator=generator) < 0.1
)
counts = 20_000 * gain[:, None] * drift[:, None] * torch.exp(-exact(x))
path = Path("scan.h5")
with h5py.File(path, "w") as file:
    file["exchange/data"] = (
        (100 + torch.poisson(counts, generator)).movedim(0, 1).numpy()
    )  # (views, rows, bins)
    file["exchange/data_white"] = (100 + torch.poisson(beam, generator)).numpy()
    file["exchange/data_dark"] = np.full((10, 2, n_bins), 100.0)
    file["exchange/theta"] = degrees.numpy()

# %%
# Read it. Counts become line integrals, -log((counts - dark) / (open beam - dark)), and the axis is found from views
# half a turn apart. ``ring_width`` removes what bins of drifting gain leave in every view.

scan = read_projections(path, ring_width=9)
path.unlink()
print(
    tuple(scan.sinograms.shape),
    f"axis at bin {scan.axis:.2f}, written with it at {(n_bins - 1) / 2 + 4.5:.2f}",
)
print(scan.metadata)

# %%
# Filtered back-projection of all views: with the axis taken to be in the middle of the detector, and with the one
# found.

y = scan.sinograms
centred = ParallelBeamCT(size, scan.angles, n_bins=n_bins)
ct = ParallelBeamCT(size, **scan.geometry)
images = {"Truth": x, "FBP, axis in the middle": centred.fbp(y, "hann"), "FBP, axis found": ct.fbp(y, "hann")}

# %%
# Every sixth view alone: by filtered back-projection, and by RED with total variation, whose weight those views
# choose.

few = ParallelBeamCT(size, **(scan.geometry | {"angles": scan.angles[::6]}))
choice = choose_weight(y[:, ::6], few, tau=0.1, nonnegative=True)
print(choice)
images["FBP, 31 views"] = few.fbp(y[:, ::6], "hann")
images["RED, 31 views"] = choice.model(y[:, ::6], few)

fig, axes = plt.subplots(2, 5, figsize=(12, 5.2), layout="constrained")
for column, (name, image) in zip(axes.T, images.items(), strict=True):
    shown = column[0].imshow(image[0], cmap="gray", vmin=0, vmax=0.02)
    column[0].set_title(name if name == "Truth" else f"{name}\n{psnr(image[0], x[0]):.2f} dB")
    if name != "Truth":
        error = column[1].imshow((image - x)[0], cmap="RdBu_r", vmin=-0.006, vmax=0.006)
for axis in axes.flat:
    axis.set_axis_off()
axes[1, 0].imshow(y[0], cmap="gray", aspect="auto")
axes[1, 0].set_title("Sinogram, 181 views")
fig.colorbar(shown, ax=axes[0], label="attenuation per bin")
fig.colorbar(error, ax=axes[1], label="error")
plt.show()
