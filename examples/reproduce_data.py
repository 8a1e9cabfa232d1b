"""Prepare folders for `oder-fast reproduce` from public data.

    python examples/reproduce_data.py ct lidc0314_ct_256.npz invesalius_cranium_256.npz data/ct
    python examples/reproduce_data.py mri forrest_t1_256.npz ch2.nii.gz adi_t1_192.npz data/mri
    python examples/reproduce_data.py idt qlsi_3d_hl60-cell_A140.tar.lzma data/idt

CT: LIDC-IDRI patient 0314 (CC BY 3.0), arrays "hu" of Hounsfield units, and a head that comes with InVesalius (GPL-2),
in means of 2 x 2 pixels: 128 x 128. Training and validation are slices of the first, with gaps of 10 slices and more
to those tested; the head is tested alone, as another patient. From slice 255 on there are streaks.

MRI: T1 volumes of three people. Trained on are studyforrest (PDDL 1.0) and Colin27 (any purpose), but for the middle of
the latter, which is tested. FNNDSC's adi_brain (Apache-2.0), a person of whom nothing is trained on, is tested too, and
slices of it, 20 and more away, choose weights. Means of 2 x 2 pixels where the slice is larger than 192, then the
middle 128 x 128.

IDT: cell-like phantoms of eight slices of 64 x 64 pixels, trained on and tested, and a real HL60 cell (CC0), tested:
refractive index by back-projection of 140 phase images, in means of two pixels across and 17 along the light.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

TEST, STREAKS, VALIDATION = range(130, 151), 255, (112, 118)
"""Of LIDC: slices 105 to 160 train nothing."""

GAP = range(105, 165)
HEAD = range(30, 80, 10)


def halved(image: np.ndarray) -> np.ndarray:
    """Return means of 2 x 2 pixels."""
    rows, columns = (n // 2 for n in image.shape)
    return image[: 2 * rows, : 2 * columns].reshape(rows, 2, columns, 2).mean((1, 3))


def attenuation(hu: np.ndarray) -> np.ndarray:
    """Return attenuation in units of twice that of water, from 0 (air) to 1.6 (dense bone)."""
    return ((hu.astype(np.float32) + 1000) / 2000).clip(0, 1.6)


def ct(lidc: Path, head: Path) -> dict[str, np.ndarray]:
    """Return images by the files they go to."""
    body, skull = attenuation(np.load(lidc)["hu"]), attenuation(np.load(head)["hu"])
    images = {f"train/{k:03d}": body[k] for k in range(0, STREAKS, 3) if k not in GAP}
    images |= {f"validation/{k:03d}": body[k] for k in VALIDATION}
    images |= {f"test/lidc/{k:03d}": body[k] for k in TEST[::5]}
    images |= {f"test/head/{k:03d}": skull[k] for k in HEAD}
    return {name: halved(image) for name, image in images.items()}


def squared(image: np.ndarray, size: int = 128) -> np.ndarray:
    """Return the middle of an image, or the image with zeros around it, of size x size pixels."""
    image = halved(image) if max(image.shape) > 1.5 * size else image
    for axis in (0, 1):
        n = image.shape[axis]
        if n > size:
            image = np.take(image, range((n - size) // 2, (n - size) // 2 + size), axis)
        else:
            before = (size - n) // 2
            widths = [(0, 0), (0, 0)]
            widths[axis] = (before, size - n - before)
            image = np.pad(image, widths)
    return image


def mri(forrest: Path, colin: Path, adi: Path) -> dict[str, np.ndarray]:
    """Return images by the files they go to."""
    import nibabel

    volumes = [np.load(forrest)["t1"], np.asarray(nibabel.load(colin).dataobj), np.load(adi)["t1"]]
    one, clean, other = (v.astype(np.float32) / float(np.percentile(v, 99.9)) for v in volumes)
    clean = np.moveaxis(clean, 2, 0)
    images = {f"train/forrest-{k:03d}": one[k] for k in range(60, 250, 4)}
    images |= {f"train/colin-{k:03d}": clean[k] for k in range(30, 150, 2) if not 80 <= k <= 120}
    images |= {f"validation/adi-{k:03d}": other[k] for k in (45, 50)}
    images |= {f"test/adi/{k:03d}": other[k] for k in (70, 75, 80, 85, 90)}
    images |= {f"test/colin/{k:03d}": clean[k] for k in (90, 95, 100, 105, 110)}
    return {name: squared(image.clip(0, 1.3)) for name, image in images.items()}


def idt(archive: Path) -> dict[str, np.ndarray]:
    """Return volumes by the files they go to."""
    from pretrained.prepare_idt import OPTIONS, SLICES, draw, real_cell

    generator = torch.Generator().manual_seed(0)
    parts = {"train": 60, "validation": 2, "test/phantoms": 5}
    images = {f"{part}/{k:03d}": draw((64,), generator) for part, n in parts.items() for k in range(n)}
    index = real_cell(archive)
    layers, rows, columns = index.shape
    each = layers // SLICES
    index = index[: each * SLICES].reshape(SLICES, each, rows, columns).mean(1)
    index = np.stack([halved(one) for one in index])
    top, left = ((n - 64) // 2 for n in index.shape[1:])
    index = index[:, top : top + 64, left : left + 64]
    images["test/cell/hl60"] = ((2 * OPTIONS["medium_index"] + index) * index).astype(np.complex64)
    return images


def main() -> None:
    """Do it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("ct", "mri", "idt"))
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    for name, image in {"ct": ct, "mri": mri, "idt": idt}[arguments.what](*arguments.files).items():
        path = arguments.output / f"{name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = np.complex64 if np.iscomplexobj(image) else np.float32
        np.save(path, np.ascontiguousarray(image, dtype=kind))


if __name__ == "__main__":
    main()
