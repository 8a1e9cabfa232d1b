"""Input files as jobs, what the user chose for them, and where their outputs go."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from ..data import Sample
from ..data.arrays import array_layout
from ..data.datasets import IMAGE_SUFFIXES, Scale, is_image
from ..data.images import DICOM_SUFFIXES
from ..data.kspace import SUFFIXES
from ..data.microscopy import LED_NAME
from ..data.nifti import NIFTI_SUFFIXES
from ..operators import ParallelBeamCT
from ..training.configuration import MOST_PIXELS

Format = Literal["dicom", "tiff", "png", "npy", "npz", "nifti"]
Part = Literal["magnitude", "phase", "real", "imaginary"]


class InputError(ValueError):
    """Files or settings that cannot be reconstructed with, found before anything long starts."""


@dataclass(frozen=True)
class Choices:
    """Settings that change what is written, besides those of the solver; see `reconstruct_files`."""

    format: Format | None
    part: Part | None
    simulate: bool
    image_size: tuple[int, int] | None
    scale: Scale | None
    array: str | None
    select: Mapping[str, int] | None
    maps: str | Path | None
    normalize: bool

    def __post_init__(self) -> None:
        for name, kind in (("format", Format), ("part", Part)):
            value = getattr(self, name)
            if value is not None and value not in get_args(kind):
                raise InputError(f"{name}: must be one of {', '.join(get_args(kind))}, got {value!r}")
        size = self.image_size
        if size is not None and (len(size) != 2 or min(size) < 1 or math.prod(size) > MOST_PIXELS):
            raise InputError(
                f"image_size: must be rows and columns, at least 1 and at most {MOST_PIXELS} pixels, got {size}"
            )
        if isinstance(self.scale, str) or self.scale is None:
            if self.scale not in (None, "slice", "none"):
                raise InputError(f"scale: must be slice, none or a window, got {self.scale!r}")
        elif not -math.inf < self.scale[0] < self.scale[1] < math.inf:
            raise InputError(f"scale: a window must be (low, high) with low < high, got {self.scale}")


@dataclass
class Job:
    """An input file, one of several images of its slices, or a folder of images of LEDs.

    Attributes:
        path: Of the file.
        name: Below the folder given.
        count: Images in it.
        shape: Of what is read of each image, by which files are put in order.
        image_shape: Of each image.
        complex: Whether the images to be written are complex.
        by_slice: Whether slices can be read one by one, without the others.
        is_kspace: Whether it holds k-space.
        select: Counters of the acquisitions of this job, of a file with several images of its slices.
        operator: Of a scan whose file tells its geometry; None where it is the run's.
        axis: Of rotation, of such a scan, in bins.
        notes: What the user should know of what was read.
    """

    path: Path
    name: str
    count: int
    shape: tuple[int, ...]
    image_shape: tuple[int, ...]
    complex: bool
    by_slice: bool
    is_kspace: bool = False
    select: dict[str, int] = field(default_factory=dict)
    operator: ParallelBeamCT | None = None
    axis: float | None = None
    notes: dict[str, int] = field(default_factory=dict)
    base: str = ""
    images: dict[int, Tensor] = field(default_factory=dict)
    quality: list[list[float]] = field(default_factory=list)
    converged: bool = True
    voxel_size: tuple[float, float, float] | None = None
    failed: str | None = None

    def note(self, what: str, count: int) -> None:
        """Count something that the user should know of."""
        if count:
            self.notes[what] = self.notes.get(what, 0) + count

    def chunks(self, size: int) -> list[slice | None]:
        """Return what is read at once."""
        if not self.by_slice:
            return [None]
        return [slice(first, min(first + size, self.count)) for first in range(0, self.count, size)]


class Found(NamedTuple):
    """A file.

    Attributes:
        path: Of it.
        name: Below the folder given.
        named: Whether it was given itself, not its folder.
    """

    path: Path
    name: str
    named: bool


class Item(NamedTuple):
    """An image to be solved for.

    Attributes:
        job: Its file.
        number: Its number there.
        sample: The image to be measured; or None.
        data: What was measured of it; or None.
        maps: Coil maps (MRI).
        mask: Of k-space, ``(H, W)``.
        low: Value that the model sees as 0.
        span: Difference of values that it sees as 1.
        seed: Of noise and mask.
    """

    job: Job
    number: int
    sample: Sample | None = None
    data: Tensor | None = None
    maps: Tensor | None = None
    mask: Tensor | None = None
    low: float = 0.0
    span: float = 1.0
    seed: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to be reconstructed: all is 0."""
        values = self.data if self.sample is None else self.sample.image
        return values is None or not bool(values.any())

    @property
    def key(self) -> tuple[Any, ...]:
        """What images of one batch have in common."""
        if self.sample is not None:
            coils = 0 if self.sample.kspace is None else len(self.sample.kspace)
            return (tuple(self.sample.image.shape), coils)
        assert self.data is not None
        # A scan with a geometry of its own stays by itself.
        own = None if self.job.operator is None else self.job.path
        return (tuple(self.data.shape), own, None if self.maps is None else tuple(self.maps.shape))


class Solved(NamedTuple):
    """What became of an image.

    Attributes:
        image: As it is to be written.
        converged: Whether the solve reached its tolerance.
        quality: PSNR and SSIM of the image and of its start, where the truth is known.
        calls: Of the denoiser, for this image.
    """

    image: Tensor
    converged: bool
    quality: list[float] | None
    calls: int


def escaped(text: str) -> str:
    r"""Return a text on one line of UTF-8, whatever characters and bytes a name holds.

    Backslashes, characters that are not printed and bytes that are not UTF-8 are written as in JSON and Python: ``\\``,
    ``\n``, ``\udce9`` for the byte E9. ``text.encode("latin-1", "backslashreplace").decode("unicode_escape")`` gives
    the name back.

    Example:
        >>> print(escaped("h\udce9las\n"), escaped("Zähne 1"))
        h\udce9las\n Zähne 1
    """
    return "".join(c if c.isprintable() and c != "\\" else json.dumps(c)[1:-1] for c in text)


def label_of(select: Mapping[str, int]) -> str:
    """Return what is added to the name of a file for one of its images."""
    return f"[{','.join(f'{name}={n}' for name, n in select.items())}]" if select else ""


def reason_of(error: Exception, path: Path) -> str:
    """Return what went wrong with a file, in a line without its name."""
    said = " ".join(str(error).removeprefix(f"{path}: ").split())
    known = isinstance(error, (ValueError, OSError, RuntimeError))
    return said if known and said else f"{type(error).__name__}: {said}"


def is_picture(path: Path) -> bool:
    """Tell whether a file is of a kind that holds images alone."""
    with path.open("rb") as file:
        head = file.read(132)
    picture = head[128:] == b"DICM" or head.startswith(b"\x89PNG")
    return picture or path.name.lower().endswith((*NIFTI_SUFFIXES, *DICOM_SUFFIXES))


def led_files(folder: Path) -> list[Path]:
    """Return the files of a folder whose names tell the row and column of an LED."""
    visible = sorted(path for path in folder.iterdir() if path.name[0] != "." and path.is_file())
    return [path for path in visible if re.search(LED_NAME, path.name, re.IGNORECASE)]


def is_led_stack(folder: Path) -> bool:
    """Tell whether a folder holds images of LEDs, one in each file; a file may hold the images of all, too."""
    files = led_files(folder)
    if not files:
        return False
    with suppress(ValueError):
        return len(array_layout(files[0], None)[0]) == 2
    return False


def _is_known(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES) or is_image(path)


def find_files(inputs: Iterable[Path], output: Path, leds: bool) -> list[Found]:
    """Return the files in an order that does not depend on the system.

    Args:
        inputs: Files and folders.
        output: Folder that is no input.
        leds: Whether a folder of images of LEDs is found as a whole.

    Raises:
        InputError: For a file that is missing, or folders without files of a known kind.
    """
    missing = [str(path) for path in inputs if not path.exists()]
    if missing:
        raise InputError(f"no such file or folder: {', '.join(missing)}")
    own = output.resolve()
    found: dict[Path, Found] = {}
    for given in inputs:
        if not given.is_dir():
            found.setdefault(given, Found(given, given.name, True))
            continue
        if given.resolve() == own:
            raise InputError(f"{output}: is an input too; choose another output folder")
        for folder, folders, files in os.walk(given, followlinks=False):
            here = Path(folder)
            stack = led_files(here) if leds and is_led_stack(here) else []
            if stack:
                name = here.relative_to(given).as_posix() if here != given else given.resolve().name
                found.setdefault(here, Found(here, name, here == given))
            folders[:] = sorted(f for f in folders if f[0] != "." and (here / f).resolve() != own)
            for name in sorted(files):
                path = here / name
                if name[0] != "." and path not in stack and path.is_file() and _is_known(path):
                    found.setdefault(path, Found(path, path.relative_to(given).as_posix(), False))
    if not found:
        raise InputError(f"no file of a known kind in {', '.join(map(str, inputs)) or 'nothing'}")
    return list(found.values())


def name_outputs(jobs: list[Job]) -> None:
    """Name outputs as inputs, less the suffix; with it where two would be the same."""
    suffixes = sorted((*IMAGE_SUFFIXES, *SUFFIXES), key=len, reverse=True)
    for job in jobs:
        file = job.name.removesuffix(label_of(job.select))
        cut = 0 if job.path.is_dir() else next((len(s) for s in suffixes if file.lower().endswith(s)), 0)
        job.base = file[: len(file) - cut] + "".join(f"-{name}{n}" for name, n in job.select.items())
    counts: dict[str, int] = {}
    for job in jobs:
        counts[job.base] = counts.get(job.base, 0) + 1
    for job in jobs:
        job.base = job.base if counts[job.base] == 1 else job.name
