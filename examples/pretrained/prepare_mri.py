"""Prepare the images that the model "mri" was trained on, in the folders mri_1, mri_2 and mri_validation.

    python examples/pretrained/prepare_mri.py forrest_t1_256.npz ch2.nii.gz adi_t1_192.npz data

T1 heads of three people: studyforrest (PDDL 1.0), an array "t1" of axial slices (280, 256, 256); Colin27, the mean of
27 scans of one man (any purpose); FNNDSC's adi_brain (Apache-2.0), an array "t1" of sagittal slices (140, 192, 192),
of which slices 40 to 58 validate and test. mri_2 has slices of the last besides those of mri_1.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import nibabel
import numpy as np

VALIDATION, TEST = 50, (40, 46, 52, 58)
BRIGHTEST = 99.9
"""Percentile that becomes 1."""


def main() -> None:
    """Do it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("forrest", "colin", "adi", "output"):
        parser.add_argument(name, type=Path)
    arguments = parser.parse_args()
    forrest, colin, adi = (
        volume.astype(np.float32) / float(np.percentile(volume.astype(np.float32), BRIGHTEST))
        for volume in (
            np.load(arguments.forrest)["t1"],
            np.asarray(nibabel.load(arguments.colin).dataobj),
            np.load(arguments.adi)["t1"],
        )
    )
    first = {f"forrest-{k:03d}": forrest[k].clip(0, 1.3) for k in range(60, 250, 3)}
    for axis, slices in enumerate((range(30, 150, 4), range(30, 190, 4), range(30, 150, 4))):
        first |= {f"colin-{axis}-{k:03d}": np.take(colin, k, axis).clip(0, 1.3) for k in slices}
    second = {f"adi-{k:03d}": adi[k].clip(0, 1.5) for k in range(68, 132, 2)}
    second |= {f"adi-across-{k:03d}": adi[:, k].clip(0, 1.5) for k in range(70, 132, 4)}
    folders = {
        "mri_1": first,
        "mri_2": {**first, **second},
        "mri_validation": {f"adi-{VALIDATION:03d}": adi[VALIDATION].clip(0, 1.5)},
    }
    for folder, images in folders.items():
        (arguments.output / folder).mkdir(parents=True, exist_ok=True)
        for name, image in images.items():
            np.save(arguments.output / folder / f"{name}.npy", np.ascontiguousarray(image))
    np.save(arguments.output / "mri_test.npy", adi[list(TEST)].clip(0, 1.5))


if __name__ == "__main__":
    main()
