"""
CT from a DICOM slice
=====================

A slice of a CT volume is measured by 60 noisy views, reconstructed by regularization by denoising (RED) with total
variation, and written back as DICOM with the header of its source.
"""

# %%
# The slice comes with pydicom. `read_image` turns Hounsfield units into attenuation in 1/mm. Give the path of your
# own file instead.

from pathlib import Path

import matplotlib.pyplot as plt
import pydicom.data
import torch

from oder_fast import ParallelBeamCT, choose_weight
from oder_fast.data import add_poisson_noise, psnr, read_image, write_image

path = pydicom.data.get_testdata_file("CT_small.dcm")
x, metadata = read_image(path)
x = x[None]  # images have a batch axis first: (B, H, W)
print(tuple(x.shape), metadata["unit"], metadata["pixel_spacing"])

# %%
# The scan: 60 views over 180 degrees, pixels of the file's size in mm, so that line integrals have no unit. The
# detector counts 30 000 photons for each bin of the open beam.

ct = ParallelBeamCT(x.shape[-1], angles=60, pixel_size=metadata["pixel_spacing"][0])
y = add_poisson_noise(ct(x), photons=3e4, generator=torch.Generator().manual_seed(0))

# %%
# `choose_weight` finds the weight of total variation from the data alone: it leaves a tenth of the views out, and
# scores reconstructions by them. The truth is not looked at.

choice = choose_weight(y, ct, tau=0.1, nonnegative=True)
model = choice.model
solution = model(y, ct, return_solution=True)
print(choice)
print(solution.message)
print(f"{solution.denoiser_calls} calls of the denoiser, {solution.operator_calls:g} of the operator")

# %%
# Filtered back-projection, without and with a Hann window, and RED in one window of -200 to 300 HU. Errors are in HU,
# too.


def hounsfield(image):
    """Attenuation in 1/mm to Hounsfield units."""
    return 1000 * (image / 0.02 - 1)


images = {
    "Truth": x,
    "FBP": ct.fbp(y),
    "FBP, Hann": ct.fbp(y, "hann"),
    "RED, total variation": solution.value,
}
fig, axes = plt.subplots(2, 4, figsize=(10, 5.4), layout="constrained")
for k, (name, image) in enumerate(images.items()):
    shown = axes[0, k].imshow(hounsfield(image[0]), cmap="gray", vmin=-200, vmax=300)
    axes[0, k].set_title(name if k == 0 else f"{name}\n{psnr(image, x):.2f} dB")
    if k:
        error = axes[1, k].imshow(1000 * (image - x)[0] / 0.02, cmap="RdBu_r", vmin=-200, vmax=200)
for axis in axes.flat:
    axis.set_axis_off()
axes[1, 0].set_title("Sinogram")
axes[1, 0].imshow(y[0], cmap="gray", aspect="auto")
fig.colorbar(shown, ax=axes[0], label="HU")
fig.colorbar(error, ax=axes[1], label="error in HU")
plt.show()

# %%
# Written as DICOM, the image keeps patient, study and geometry of its source.

written = Path("reconstruction.dcm")
write_image(written, solution.value[0], like=path, description="RED, 60 views")
header = pydicom.dcmread(written)
print(header.SeriesDescription, header.PixelSpacing, header.RescaleType)
written.unlink()
