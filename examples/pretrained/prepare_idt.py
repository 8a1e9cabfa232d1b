"""Draw the volumes that the model "idt" was trained on, in the folders idt_train and idt_validation.

    python examples/pretrained/prepare_idt.py data --cell qlsi_3d_hl60-cell_A140.tar.lzma

Permittivity contrasts of cell-like phantoms, complex64: eight slices, 64, 80 or 96 pixels wide. Half of them hold one
to five cells, half one that is up to twice as wide and 1.7 times as high. Two of three are blurred and textured, as the
insides of cells are less sharp than ellipsoids.

The file (CC0; RI-imaging/ODTbrain; Schürmann et al., J. Biophotonics 11 (2018)) has 140 phase images of a turning HL60
cell, which become idt_test.npy: the refractive index above the medium's, (z, y, x), voxels of 0.139 um. Nothing learns
from it.
"""

from __future__ import annotations

import argparse
import io
import lzma
import math
import tarfile
from pathlib import Path

import h5py
import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from oder_fast import ParallelBeamCT
from oder_fast.data import cell_like

SLICES, MOST_CELLS = 8, 5
OPTIONS = {"medium_index": 1.33, "index_contrast": 0.01}
ABSORPTION = 2e-3
WIDEST, HIGHEST = 2.0, 1.7
FOLDERS = {
    # Volumes, their widths, and the seed.
    "idt_train": (300, (64, 80, 96), 0),
    "idt_validation": (8, (64, 80, 96), 1),
}
CELL_WAVELENGTH, CELL_PIXEL = 0.647, 0.139


def window(volume: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Cut the window around what is in a volume that is too large."""
    mass = np.abs(volume)
    for axis, (n, wanted) in enumerate(zip(volume.shape, shape, strict=True)):
        profile = mass.sum(tuple({0, 1, 2} - {axis}))
        centre = (profile * np.arange(n)).sum() / profile.sum()
        first = int(np.clip(round(centre - wanted / 2), 0, n - wanted))
        volume = volume.take(range(first, first + wanted), axis)
    return volume


def draw(sizes: tuple[int, ...], generator: torch.Generator) -> np.ndarray:
    """Draw a volume (Z, size, size)."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    size = sizes[int(uniform(0, len(sizes)))]
    cells, high, wide = int(uniform(1, MOST_CELLS + 1)), SLICES, size
    if uniform(0, 1) < 0.5:
        cells, high, wide = 1, round(uniform(1, HIGHEST) * SLICES), round(uniform(1, WIDEST) * size)
    volume = cell_like(
        1,
        (high, wide, wide),
        generator,
        cells=cells,
        absorption=uniform(0, ABSORPTION),
        **OPTIONS,
    )[0].numpy()
    volume = window(volume, (SLICES, size, size))
    if uniform(0, 3) < 2:
        sigma = (uniform(0, 0.5), *[uniform(0.3, 1.5)] * 2)
        noise = torch.randn(volume.shape, generator=generator).numpy()
        texture = gaussian_filter(noise, (0.7, *[uniform(2, 6)] * 2), mode="wrap")
        volume = volume * (1 + uniform(0, 0.2) * texture / texture.std())
        # Outside the frame is the medium.
        volume = gaussian_filter(volume.real, sigma, mode="constant") + 1j * gaussian_filter(
            volume.imag, sigma, mode="constant"
        )
    return volume[:: 1 if uniform(0, 1) < 0.5 else -1].astype(np.complex64)


def real_cell(archive: Path) -> np.ndarray:
    """Back-project phase images: rays are straight, and each row turns by itself."""
    with tarfile.open(fileobj=io.BytesIO(lzma.decompress(archive.read_bytes()))) as files:
        content = {Path(m.name).name: files.extractfile(m).read() for m in files if m.isfile()}
    angles = np.loadtxt(io.BytesIO(content["angles.txt"]))
    with h5py.File(io.BytesIO(content["series.h5"])) as series:
        phases = np.stack([series[f"qpi_{k}/phase/raw"][()] for k in range(len(angles))])
    # Views stand for as much of the circle as is nearer to them than to others.
    gaps = np.diff(angles, append=angles[0] + 2 * math.pi)
    shares = (gaps + np.roll(gaps, 1)) / (2 * gaps.mean())
    paths = phases * shares[:, None, None] * CELL_WAVELENGTH / (2 * math.pi)
    size = phases.shape[2]
    ct = ParallelBeamCT(size, torch.from_numpy(angles), size, pixel_size=CELL_PIXEL)
    slices = ct.fbp(torch.from_numpy(paths.astype(np.float32)).permute(1, 0, 2), filter="hann")
    return np.ascontiguousarray(slices.permute(1, 0, 2).numpy())


def main() -> None:
    """Do it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--cell", type=Path, help="archive of the phase images")
    arguments = parser.parse_args()
    output = arguments.output
    for folder, (n, sizes, seed) in FOLDERS.items():
        (output / folder).mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(seed)
        for k in range(n):
            np.save(output / folder / f"{k:03d}.npy", draw(sizes, generator))
    if arguments.cell is not None:
        np.save(output / "idt_test.npy", real_cell(arguments.cell))


if __name__ == "__main__":
    main()
