"""
From a k-space file to NIfTI
============================

Multi-coil k-space in the layout of fastMRI is read, coil maps are estimated from its centre, the image is
reconstructed by regularization by denoising and written as NIfTI with its voxel size. The file is written from a
phantom first; give the path of your own instead.
"""

# %%
# Write the file: a head, eight coils, a quarter of the lines, of which those in the middle lie side by side.

from pathlib import Path

import h5py
import matplotlib.pyplot as plt
import nibabel
import torch

from oder_fast import CartesianMRI, TotalVariation, choose_weight
from oder_fast.data import (
    birdcage_maps,
    brain_like,
    espirit_maps,
    gaussian_lines,
    psnr,
    read_kspace,
    write_nifti,
)

generator = torch.Generator().manual_seed(0)
size = 128
x = brain_like(1, size, generator)
maps, mask = birdcage_maps(8, (size, size)), gaussian_lines(size, 4, 0.14, generator)
kspace = CartesianMRI(maps, mask)(x)
noise = 0.01 * torch.randn(kspace.shape, dtype=kspace.dtype, generator=generator)
header = f"""<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD"><encoding><encodedSpace>
<matrixSize><x>{size}</x><y>{size}</y><z>1</z></matrixSize>
<fieldOfView_mm><x>220</x><y>220</y><z>4</z></fieldOfView_mm>
</encodedSpace></encoding></ismrmrdHeader>"""
path = Path("scan.h5")
with h5py.File(path, "w") as file:
    file["kspace"] = (kspace + noise * mask).numpy()  # (slices, coils, rows, columns)
    file["mask"] = mask.numpy()
    file["ismrmrd_header"] = header

# %%
# Read it. The image's unit is that of the k-space, and ``normalize`` scales it for the denoiser.

file = read_kspace(path)
path.unlink()
print(tuple(file.kspace.shape), file.metadata["format"], "voxels of", file.metadata["voxel_size"], "mm")
sampled = file.mask[0]
mri = CartesianMRI(espirit_maps(file.kspace[0], sampled), sampled)

# %%
# Total variation with ``joint=True`` lets real and imaginary part share their edges. Its weight comes from the data:
# a tenth of the lines is left out, and scores.

choice = choose_weight(file.kspace, mri, lambda w: TotalVariation(w, joint=True), tau=0.1, bounds=(1e-3, 0.3))
solution = choice.model(file.kspace, mri, return_solution=True)
print(choice)
print(f"{solution.denoiser_calls} calls of the denoiser, {solution.operator_calls:g} of the operator")

# %%
# Beside it, zero filling and least squares with Tikhonov's weight (CG-SENSE), the best of four in hindsight. Shown
# and compared are magnitudes.

fidelity = mri.least_squares(file.kspace)
zero, accuracy = torch.zeros_like(x), torch.tensor([1e-4])
truth, source = x.abs(), mri.adjoint(file.kspace)
solved = (fidelity.solve(source, torch.tensor(w), zero, accuracy).abs() for w in (1e-4, 1e-3, 1e-2, 1e-1))
sense = max(solved, key=lambda image: psnr(image, truth))
images = {
    "Truth": truth,
    "Zero filling": mri.initial(file.kspace).abs(),
    "CG-SENSE": sense,
    "RED, total variation": solution.value.abs(),
}
fig, axes = plt.subplots(2, 4, figsize=(10.5, 5.4), layout="constrained")
for column, (name, image) in zip(axes.T, images.items(), strict=True):
    column[0].imshow(image[0], cmap="gray", vmin=0, vmax=1)
    column[0].set_title(name if name == "Truth" else f"{name}\n{psnr(image, truth):.2f} dB")
    if name != "Truth":
        error = column[1].imshow((image - truth)[0], cmap="RdBu_r", vmin=-0.2, vmax=0.2)
for axis in axes.flat:
    axis.set_axis_off()
axes[1, 0].imshow(torch.log10(file.kspace[0, 0].abs() + 1e-3), cmap="gray", aspect="auto")
axes[1, 0].set_title("k-space, coil 1 (log)")
fig.colorbar(error, ax=axes[1], label="error of the magnitude")
plt.show()

# %%
# The NIfTI file, as nibabel reads it: column, row, slice.

written = Path("image.nii.gz")
write_nifti(written, solution.value.abs(), file.metadata["voxel_size"])
volume = nibabel.load(written)
print(volume.shape, [round(float(side), 3) for side in volume.header.get_zooms()])
written.unlink()
