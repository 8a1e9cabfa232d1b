"""Copy figures of the gallery, as the last build of the site made them, to docs/images, small enough to be committed.

``python docs/keep_images.py`` after ``sphinx-build -b html docs build/docs``.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).parent
KEPT = {
    "ct.png": "plot_ct_dicom",
    "choosing.png": "plot_choose_tau",
    "forms.png": "plot_two_forms",
    "mri.png": "plot_mri_kspace",
    "tooth.png": "plot_ct_tooth",
}
# Bytes of a file, at most; widths that are tried, in pixels.
LARGEST, WIDTHS = 150_000, (1000, 900, 800, 700, 600, 500)


def encoded(figure: Image.Image, width: int) -> Iterator[bytes]:
    """Give a figure of that width as PNG: with all of its colours, then with 256."""
    small = figure.resize((width, round(figure.height * width / figure.width)), Image.Resampling.LANCZOS)
    for image in (small, small.quantize(256, kmeans=2)):
        file = io.BytesIO()
        image.save(file, "PNG", optimize=True)
        yield file.getvalue()


def main() -> None:
    """Copy all that pages outside of the gallery show."""
    (FOLDER / "images").mkdir(exist_ok=True)
    for name, example in KEPT.items():
        made = FOLDER / f"auto_gallery/images/sphx_glr_{example}_001.png"
        if not made.exists():
            print(f"{name} stays as it is: the last build did not run {example}")
            continue
        figure = Image.open(made).convert("RGB")
        sizes = (png for width in WIDTHS for png in encoded(figure, width))
        target = FOLDER / "images" / name
        target.write_bytes(next(png for png in sizes if len(png) < LARGEST))
        print(f"{target.name}: {target.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
