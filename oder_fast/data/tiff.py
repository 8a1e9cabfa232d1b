"""Read TIFF files: all images that one holds, or an error that says what is missing.

The pages are counted along the chain of offsets in the file; tifffile decodes them and says how they are arranged.
"""

from __future__ import annotations

import math
import struct
import warnings
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from .._extras import needs
from .colours import grey, through_palette
from .files import Stamp, stamp

MINISWHITE, MINISBLACK, RGB, PALETTE, YCBCR = 0, 1, 2, 3, 6
COLOURS = (RGB, YCBCR)

LARGEST_COMPRESSION = 2**15
"""No page may ask for more memory than this many times the size of its file."""

# Bytes of one number of each type of field.
FIELD_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 6: 1, 7: 1, 8: 2, 9: 4, 13: 4, 16: 8, 17: 8, 18: 8}


class Page(NamedTuple):
    """What the directory of one page says.

    Attributes:
        offset: Where the directory begins.
        shape: Rows and columns.
        samples: Values a pixel.
        number: Bits and kind of a value.
        photometric: What its values stand for.
        compression: Which.
        reduced: Whether it is a smaller copy, or a mask, of another page.
        children: Offsets of the directories below it.
    """

    offset: int
    shape: tuple[int, int]
    samples: int
    number: tuple[int, int]
    photometric: int
    compression: int
    reduced: bool
    children: tuple[int, ...]


class TiffLayout(NamedTuple):
    """What a TIFF file holds.

    Attributes:
        stack: Lengths of the axes before rows and columns, such as time, slice and channel; their product is the
            number of images.
        pages: One for each image, or the only one, which holds all.
        dtype: Of the values of the first.
        in_order: Whether all pages are alike and tifffile's one series is all of them.
        left_out: Numbers of pages left out, by reason.
        files: Number of files in the OME-TIFF set that it belongs to; 1 for a file of its own.
    """

    stack: tuple[int, ...]
    pages: list[Page]
    dtype: np.dtype[Any]
    in_order: bool
    left_out: dict[str, int]
    files: int

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Rows and columns of each image."""
        shapes = [page.shape for page in self.pages]
        return shapes * math.prod(self.stack) if len(shapes) == 1 else shapes

    @property
    def inverted(self) -> bool:
        """Whether low values are to be shown bright."""
        return self.pages[0].photometric == MINISWHITE

    @property
    def coloured(self) -> bool:
        """Whether an image may be in colours."""
        return any(page.samples > 1 or page.photometric == PALETTE for page in self.pages)


# ------------------------------------------------------------------ directories


class _Directories:
    """Directories of a TIFF file, read without tifffile, which ends a damaged chain without an error."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.size = file, size
        head = file.read(16)
        self.order = "<" if head[:2] == b"II" else ">"
        self.big = self._unpack("H", head[2:4]) == 43
        self.offset = "Q" if self.big else "I"
        self.first = self._unpack(self.offset, head[8:16] if self.big else head[4:8])

    def _unpack(self, kind: str, content: bytes) -> int:
        if len(content) < struct.calcsize(self.order + kind):
            raise ValueError("it is cut off before its first page")
        return int(struct.unpack_from(self.order + kind, content)[0])

    def _at(self, offset: int, length: int, what: str) -> bytes:
        if offset + length > self.size:
            raise ValueError(f"it is cut off: {what} is at byte {offset}, and the file has {self.size}")
        self.file.seek(offset)
        return self.file.read(length)

    def page(self, offset: int, what: str) -> tuple[Page, int]:
        """Return what a directory says, and the offset of the next one, 0 after the last."""
        counter, entry = ("Q", 20) if self.big else ("H", 12)
        width = struct.calcsize(self.order + counter)
        n = self._unpack(counter, self._at(offset, width, what))
        link = struct.calcsize(self.order + self.offset)
        content = self._at(offset + width, n * entry + link, what)
        entries = struct.iter_unpack(f"{self.order}HH{self.offset}{link}s", content[: n * entry])
        fields = {code: (kind, count, value) for code, kind, count, value in entries}

        def numbers(code: int, default: int) -> tuple[int, ...]:
            if code not in fields:
                return (default,)
            kind, count, value = fields[code]
            size = FIELD_SIZES.get(kind, 0)
            if not size or not count:
                return (default,)
            if size * count > link:
                value = self._at(self._unpack(self.offset, value), size * count, what)
            return struct.unpack_from(f"{self.order}{count}{' BH I   Q'[size]}", value)

        def number(code: int, default: int) -> int:
            return numbers(code, default)[0]

        page = Page(
            offset,
            (number(257, 0), number(256, 0)),
            number(277, 1),
            (number(258, 1), number(339, 1)),
            number(262, MINISBLACK),
            number(259, 1),
            bool(number(254, 0) & 5) or number(255, 1) == 2,
            tuple(child for child in numbers(330, 0) if child),
        )
        return page, self._unpack(self.offset, content[n * entry :])


def _chain(path: Path) -> tuple[list[Page], dict[str, int]]:
    """Return all pages of the chain that are images of their own, and the numbers of those that are not, by reason."""
    pages: list[Page] = []
    left_out: Counter[str] = Counter()
    with path.open("rb") as file:
        directories = _Directories(file, path.stat().st_size)
        offset = directories.first
        seen: set[int] = set()
        while offset:
            if offset in seen:
                raise ValueError(f"its page {len(seen)} is followed by one that came before: damaged")
            page, after = directories.page(offset, f"page {len(seen)}")
            seen.add(offset)
            if page.reduced:
                left_out["a reduced copy or a mask of another TIFF page"] += 1
            else:
                pages.append(page)
            for child in page.children:
                below = directories.page(child, f"a page below page {len(seen) - 1}")[0]
                if math.prod(below.shape) >= math.prod(page.shape):
                    raise ValueError(
                        f"page {len(seen) - 1} of {page.shape} has below it one of {below.shape}, no smaller copy, "
                        "which is not read"
                    )
                left_out["a reduced copy or a mask of another TIFF page"] += 1
            offset = after
    if not pages:
        raise ValueError("it holds no pages but reduced copies or masks" if seen else "it holds no pages")
    return pages, dict(left_out)


# ------------------------------------------------------------------ layout


def _open(path: Path, *, set_of_files: bool = False) -> Any:
    needs("reading TIFF", "tifffile")
    import tifffile

    # Else the files that an OME header names are opened, too.
    return tifffile.TiffFile(path, _multifile=set_of_files)


def _directory(file: Any, offset: int) -> Any:
    """Return tifffile's view of the page at an offset."""
    import tifffile

    file.filehandle.seek(offset)
    return tifffile.TiffPage(file, 0)


def _promised(file: Any, name: str) -> tuple[int, int]:
    """Return how many pages the OME header of a file says that it has at least, and how many files its set has."""
    if not file.is_ome:
        return 0, 1
    root = ElementTree.fromstring(file.ome_metadata)
    least, others = 0, set()
    for planes in root.iter():
        if not planes.tag.endswith("TiffData"):
            continue
        uuid = next((child for child in planes if child.tag.endswith("UUID")), None)
        file_name = "" if uuid is None else uuid.get("FileName", "")
        if uuid is not None and uuid.text != root.get("UUID") and file_name.lower() != name.lower():
            others.add(uuid.text)
            continue
        count = planes.get("PlaneCount", planes.get("NumPlanes", "1" if "IFD" in planes.attrib else "0"))
        least = max(least, int(planes.get("IFD", 0)) + int(count))
    # A file that was given another name belongs to no set.
    return least, 1 if not least and len(others) == 1 else 1 + len(others)


def _check_page(page: Any, size: int) -> None:
    """Raise where the values of a page cannot be read as grey or colours, before they are."""
    if page.photometric not in (MINISWHITE, MINISBLACK, RGB, PALETTE, YCBCR):
        raise ValueError(f"its photometric interpretation is {page.photometric}, neither grey nor RGB")
    if page.dtype is None or 0 in page.shape:
        raise ValueError(f"its pages are {page.shape} of {page.bitspersample} bits, which are no images")
    if page.nbytes > (
        size if page.compression == 1 and page.bitspersample >= 8 else size * LARGEST_COMPRESSION
    ):
        raise ValueError(f"a page of {page.nbytes} bytes is not in a file of {size} bytes (truncated)")
    # Without data, a decoder that is missing raises and others return.
    page.decode(None, 0)


def tiff_layout(path: Path) -> TiffLayout:
    """Find out what a TIFF file holds, without reading its images.

    Raises:
        OSError: Where the file is missing or unreadable.
        ValueError: For a file that is cut off, of which pages are missing, or that cannot be decoded.
    """
    return _layout(path, stamp(path))


@lru_cache(maxsize=16)
def _layout(path: Path, stamp: Stamp) -> TiffLayout:
    pages, left_out = _chain(path)
    with _open(path) as file:
        promised, files = _promised(file, path.name)
        if promised > len(pages):
            raise ValueError(
                f"{promised - len(pages)} of the {promised} planes that its OME header names are missing"
            )
        for page in {page[1:6]: page for page in pages}.values():
            _check_page(_directory(file, page.offset), stamp[1])
        first, size = _directory(file, pages[0].offset), math.prod(pages[0].shape)
        banded = first.planarconfig == 2 and first.photometric not in COLOURS
        samples = 1 if banded else first.samplesperpixel
        by_offset = {page.offset: page for page in pages}
        series = [one for one in file.series if one.keyframe.offset in by_offset]
        planes = [page for one in series for page in one]
        if None in planes:
            raise ValueError(
                f"{planes.count(None)} of the {len(planes)} planes that its header names are missing"
            )
        a_page = math.prod(first.shape) // (size * samples)
        named = a_page * sum(math.prod(one.shape) // math.prod(one.keyframe.shape) for one in series)
        if first.is_imagej:
            # It is right also where tifffile has given up.
            named = max(named, int(file.imagej_metadata.get("images", 1)) // (1 if banded else samples))
        axes, dtype = series[0].shape if series else (), np.dtype(first.dtype)
        if len(pages) == 1 and named > 1 and math.prod(axes) == named * size * samples:
            stack = axes[: len(axes) - (2 if samples == 1 else 3)]
            if axes[len(stack) :][:2] != pages[0].shape:
                raise ValueError(f"its axes are {axes}, of which rows and columns must come last")
            pages[0] = pages[0]._replace(samples=samples)
            return TiffLayout(stack, pages, dtype, True, left_out, files)
        if a_page > 1:
            raise ValueError(f"each of its {len(pages)} pages holds {a_page} images, which are not read")
        if named > len(pages):
            raise ValueError(f"{named - len(pages)} of the {named} images that its header names are missing")
        alike = len({page[1:6] for page in pages}) == 1
        if len(series) == 1 and sorted(page.offset for page in planes) == sorted(by_offset):
            stack = axes[: len(axes) - len(series[0].keyframe.shape)]
            pages = [by_offset[page.offset] for page in planes]
            return TiffLayout(stack, pages, dtype, alike, left_out, files)
    return TiffLayout((len(pages),), pages, dtype, False, left_out, files)


# ------------------------------------------------------------------ values


def _check_stored(page: Any) -> None:
    if 0 in page.dataoffsets or 0 in page.databytecounts:
        raise ValueError("some of its pixels were never written")


def _page_values(file: Any, page: Page) -> NDArray[Any]:
    """Return the values of one page, ``(H, W)`` or ``(H, W, samples)``."""
    directory = _directory(file, page.offset)
    _check_stored(directory)
    values: NDArray[Any] = directory.asarray()
    # The palettes of ImageJ colour what was measured.
    if page.photometric == PALETTE and not file.is_imagej:
        return grey(through_palette(values, directory.colormap.T))
    return np.moveaxis(values, 0, 2) if values.ndim == 3 and directory.planarconfig == 2 else values


def _all_in_order(path: Path) -> NDArray[Any]:
    """Return all images of a file of which tifffile's one series is everything."""
    with _open(path) as file:
        series = file.series[0]
        if not series.is_truncated:
            for page in series:
                _check_stored(page)
        values: NDArray[Any] = series.asarray()
        return values


def read_tiff(path: Path, frame: int | None) -> NDArray[Any]:
    """Read one image ``(H, W)`` or ``(H, W, samples)`` of several, or all ``(N, H, W)`` or ``(N, H, W, samples)``.

    Of a file with one image, without a stack, that image is all.

    Raises:
        OSError: Where the file is missing or unreadable.
        ValueError: For a damaged file, or images that differ in shape where all are wanted.
    """
    layout = tiff_layout(path)
    samples = max(page.samples for page in layout.pages)
    if samples > 4:
        raise ValueError(f"it holds {samples} values a pixel, neither grey nor colours")
    if len(layout.pages) == 1 and math.prod(layout.stack) > 1:
        values = _packed(path, layout)
        return values if frame is None else np.array(values[frame])
    with _open(path) as file:
        if frame is not None:
            return _page_values(file, layout.pages[frame])
        images = [_page_values(file, page) for page in layout.pages]
    if len({image.shape for image in images}) > 1:
        raise ValueError(f"its images differ in shape: {_kinds(layout.pages)}")
    return np.stack(images) if layout.stack else images[0]


def _packed(path: Path, layout: TiffLayout) -> NDArray[Any]:
    """Return the images ``(N, H, W)`` or ``(N, H, W, samples)`` that one page holds, mapped."""
    with _open(path) as file:
        series = file.series[0]
        shape = (math.prod(layout.stack), *series.shape[len(layout.stack) :])
        if series.dataoffset is None:
            _check_stored(series.keyframe)
            values: NDArray[Any] = series.asarray().reshape(shape)
            return values
        dtype = np.dtype(file.byteorder + series.dtype.char)
        if series.dataoffset + math.prod(shape) * dtype.itemsize > path.stat().st_size:
            raise ValueError("it is truncated")
        return np.memmap(path, dtype, "r", series.dataoffset, shape)


def _kinds(pages: list[Page]) -> str:
    counts = Counter((page.shape, page.number, page.samples) for page in pages)
    return ", ".join(
        f"{count} of {shape} with {samples} times {bits} bits"
        for (shape, (bits, _), samples), count in counts.items()
    )


def _of_array(layout: TiffLayout) -> list[Page]:
    """Return the pages that make an array: all, or all but smaller ones, such as previews."""
    sizes = [math.prod(page.shape) for page in layout.pages]
    pages = [page for page, size in zip(layout.pages, sizes, strict=True) if size == max(sizes)]
    if len({(page.shape, page.number, page.samples) for page in pages}) > 1:
        raise ValueError(f"its images make no array: {_kinds(layout.pages)}")
    return pages


def tiff_array_shape(path: Path) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and dtype of what `read_tiff_array` reads, without reading it."""
    layout = tiff_layout(path)
    if layout.files > 1:
        with _open(path, set_of_files=True) as file:
            series = _whole_set(file, path)
            return tuple(series.shape), np.dtype(series.dtype)
    if layout.in_order:
        with _open(path) as file:
            return tuple(file.series[0].shape), layout.dtype
    pages = _of_array(layout)
    stack = layout.stack if len(pages) == len(layout.pages) else (len(pages),)
    colours = (pages[0].samples,) if pages[0].samples > 1 else ()
    return (*stack, *pages[0].shape, *colours), layout.dtype


def _whole_set(file: Any, path: Path) -> Any:
    """Return the one series of an OME-TIFF set of several files, all of which must be there."""
    if len(file.series) != 1:
        raise ValueError(
            f"its OME-TIFF set holds {len(file.series)} series; read its files one by one as images"
        )
    pages = list(file.series[0])
    if None in pages:
        raise ValueError(f"{pages.count(None)} of the {len(pages)} planes of its OME-TIFF set are missing")
    if any(Path(page.parent.filehandle.path).parent != path.parent.absolute() for page in pages):
        raise ValueError("its OME-TIFF set has files in other folders")
    return file.series[0]


def read_tiff_array(path: Path) -> NDArray[Any]:
    """Read all values of a file, or of the OME-TIFF set that it belongs to.

    Warns where smaller pages, such as previews and pyramids, are left out.

    Raises:
        OSError: Where the file is missing or unreadable.
        ValueError: For a damaged or incomplete file, or pages that make no array.
    """
    layout = tiff_layout(path)
    if layout.left_out:
        counts = ", ".join(f"{count} times {reason}" for reason, count in layout.left_out.items())
        warnings.warn(f"{path}: left out: {counts}", stacklevel=3)
    if layout.files > 1:
        with _open(path, set_of_files=True) as file:
            values: NDArray[Any] = _whole_set(file, path).asarray()
            return values
    if layout.in_order and (
        layout.pages[0].photometric != PALETTE or math.prod(layout.stack) > len(layout.pages)
    ):
        return _all_in_order(path)
    pages = _of_array(layout)
    if len(pages) < len(layout.pages):
        smaller = [page for page in layout.pages if page.shape != pages[0].shape]
        warnings.warn(f"{path}: left out, as smaller than the others: {_kinds(smaller)}", stacklevel=3)
    with _open(path) as file:
        values = np.stack([_page_values(file, page) for page in pages])
    stack = layout.stack if len(pages) == len(layout.pages) else (len(pages),)
    return values.reshape(*stack, *values.shape[1:])
