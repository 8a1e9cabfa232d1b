"""Prepare the images that the model "ct" was trained on, in the folders ct_1, ct_2 and ct_validation.

    python examples/pretrained/prepare_ct.py lidc0314_ct_256.npz lidc0314_ct_512_every5.npz data

Slices of LIDC-IDRI patient 0314 (CC BY 3.0). The first file holds an array "hu", (275, 256, 256), Hounsfield units in
means of 2 x 2 pixels; the second every fifth slice at full size, (55, 512, 512). Slices 110 to 159 of the first, and
those of the second near them, are left out for validation and tests; from 255 on there are streaks. ct_2 has
photographs of scikit-image and an MR slice of pydicom besides.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import skimage.data
from pydicom import examples

TEST, STREAKS, VALIDATION = range(110, 160), 255, (118, 122)
EVERY, MARGIN = 5, 5


def attenuation(hu: np.ndarray) -> np.ndarray:
    """Return attenuation in units of twice that of water, from 0 (air) to 1.6 (dense bone)."""
    return ((hu.astype(np.float32) + 1000) / 2000).clip(0, 1.6)


def photographs() -> dict[str, np.ndarray]:
    """Return images in [0, 1], some of them at half size, mirrored or turned."""
    images = {}
    for name in ("camera", "coins", "moon", "gravel", "brick", "grass"):
        image = getattr(skimage.data, name)().astype(np.float32)
        image /= image.max()
        rows, columns = (n // 2 for n in image.shape)
        half = image[: 2 * rows, : 2 * columns].reshape(rows, 2, columns, 2).mean((1, 3))
        images |= {f"{name}-{k}": v for k, v in enumerate((image, half, image[::-1], half.T))}
    head = examples.overlay.pixel_array.astype(np.float32)
    return {**images, "head": head / head.max()}


def main() -> None:
    """Do it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("small", "large", "output"):
        parser.add_argument(name, type=Path)
    arguments = parser.parse_args()
    small = attenuation(np.load(arguments.small)["hu"])
    large = attenuation(np.load(arguments.large)["hu"])
    slices = {f"small-{k:03d}": small[k] for k in range(0, STREAKS, 2) if k not in TEST}
    for k in range(0, STREAKS, EVERY):
        if not TEST.start - MARGIN <= k < TEST.stop + MARGIN:
            slices[f"large-{k:03d}"] = large[k // EVERY]
    folders = {
        "ct_1": slices,
        "ct_2": {**slices, **photographs()},
        "ct_validation": {f"small-{k:03d}": small[k] for k in VALIDATION},
    }
    for folder, images in folders.items():
        (arguments.output / folder).mkdir(parents=True, exist_ok=True)
        for name, image in images.items():
            np.save(arguments.output / folder / f"{name}.npy", np.ascontiguousarray(image))
    np.save(arguments.output / "ct_test.npy", small[132:156:6])


if __name__ == "__main__":
    main()
