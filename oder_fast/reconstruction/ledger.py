"""What is done: a line for each file, by which a run that was broken off goes on."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TextIO, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, InstanceOf

from ..data.files import atomic, remove_unfinished
from ..training.trainer import RunError
from .jobs import InputError, Job, escaped, led_files

LEDGER, QUALITY = "reconstructed.jsonl", "quality.csv"
MEASURES = ("psnr", "ssim", "psnr_start", "ssim_start")

Text = InstanceOf[str]
"""Names may hold bytes that are not UTF-8, which pydantic's own text may not."""


class _Head(BaseModel):
    """The first line of a ledger: what made all the others."""

    model_config = ConfigDict(strict=True)

    checkpoint: str
    settings: dict[str, Any]


class _Quality(BaseModel):
    model_config = ConfigDict(strict=True)

    psnr: float
    ssim: float
    psnr_start: float
    ssim_start: float


class _Entry(BaseModel):
    """A file that is done: as it was, the SHA-256 of what was written, and how good that is."""

    model_config = ConfigDict(strict=True)

    file: Text
    path: Text
    size: int
    mtime_ns: int
    checkpoint: str
    settings: str
    outputs: Annotated[list[Text], Field(min_length=1)]
    digests: list[str]
    converged: bool
    quality: _Quality | None = None
    images: int = 0


Line = TypeVar("Line", bound=BaseModel)


def _read(kind: type[Line], line: str) -> Line | None:
    """Return what a line holds, or None where it is damaged."""
    try:
        return kind.model_validate(json.loads(line))
    except (ValueError, RecursionError):
        return None


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


class Ledger:
    """What was finished in an output folder: a line for each file, written after its outputs.

    Raises:
        InputError: Where another run is writing there, or what is there was made by another checkpoint or with other
            settings, or is not known.
        OSError: Where the folder cannot be written.
    """

    def __init__(self, folder: Path, checkpoint: str, chosen: dict[str, Any], overwrite: bool) -> None:
        self.folder, self.checkpoint, self.chosen = folder, checkpoint, chosen
        self.digest = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()
        self.entries: dict[str, _Entry] = {}
        self.file: TextIO = (folder / LEDGER).open("a+", encoding="utf-8", errors="replace")
        try:
            self._open(overwrite)
        except BaseException:
            self.file.close()
            raise

    def _open(self, overwrite: bool) -> None:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.folder}: another run is writing to it") from None
        except OSError:
            pass  # some network file systems know no locks
        self.file.seek(0)
        # The last line is empty, or was cut short by a crash.
        first, *others = self.file.read().split("\n")
        begin = overwrite or not others
        if not begin:
            self._check(_read(_Head, first))
        for folder, _, _ in os.walk(self.folder):
            remove_unfinished(folder)
        if begin:
            self.file.truncate(0)
            self._append(_Head(checkpoint=self.checkpoint, settings=self.chosen))
            return
        # A file whose line is damaged is done again.
        self.entries = {entry.file: entry for line in others if (entry := _read(_Entry, line)) is not None}
        if others[-1]:
            self._append_text("\n")

    def _check(self, head: _Head | None) -> None:
        way_out = "choose another output, or --overwrite (overwrite=True) to do all again"
        if head is None:
            raise InputError(
                f"{self.folder / LEDGER}: its first line, the checkpoint and settings, is damaged; {way_out}"
            )
        if head.checkpoint != self.checkpoint:
            raise InputError(f"{self.folder}: holds reconstructions by another checkpoint; {way_out}")
        changed = [
            f"{key} was {head.settings.get(key)!r} and is {value!r}"
            for key, value in self.chosen.items()
            if head.settings.get(key) != value
        ]
        if changed:
            raise InputError(
                f"{self.folder}: holds reconstructions with other settings: {'; '.join(changed)}; {way_out}"
            )

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()

    def _append_text(self, text: str) -> None:
        if os.fstat(self.file.fileno()).st_nlink == 0:
            raise RunError(f"{self.folder}: was removed while the run wrote to it")
        self.file.write(text)
        self.file.flush()
        os.fsync(self.file.fileno())

    def _append(self, line: BaseModel) -> None:
        self._append_text(json.dumps(line.model_dump()) + "\n")

    def _stamp(self, job: Job) -> dict[str, Any]:
        files = [path.stat() for path in (led_files(job.path) if job.path.is_dir() else [job.path])]
        return {
            "file": job.name,
            "path": str(job.path.resolve()),
            "size": sum(file.st_size for file in files),
            "mtime_ns": max(file.st_mtime_ns for file in files),
            "checkpoint": self.checkpoint,
            "settings": self.digest,
        }

    def is_finished(self, job: Job) -> bool:
        """Tell whether a file was done as it is, and all that was written is there and whole."""
        entry = self.entries.get(job.name)
        if entry is None or any(getattr(entry, key) != value for key, value in self._stamp(job).items()):
            return False
        paths = [self.folder / name for name in entry.outputs]
        return all(path.is_file() for path in paths) and [*map(digest_of, paths)] == entry.digests

    def add(self, job: Job, outputs: list[str]) -> None:
        """Note that a file is done."""
        entry = _Entry(
            **self._stamp(job),
            outputs=outputs,
            digests=[digest_of(self.folder / name) for name in outputs],
            converged=job.converged,
        )
        if job.quality:
            columns = zip(*job.quality, strict=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                means = [float(np.nanmean(column)) for column in columns]
            entry.quality = _Quality(**dict(zip(MEASURES, means, strict=True)))
            # Uniform ones have no scale to be compared on.
            entry.images = sum(not np.isnan(row[0]) for row in job.quality)
        self._append(entry)
        self.entries[job.name] = entry

    def write_quality(self, names: Sequence[str]) -> dict[str, float]:
        """Write the table of the files that are done, now or before; return the means over them."""
        entries = [e for e in map(self.entries.get, names) if e is not None]
        rows = sorted(
            (escaped(e.file), e.images, e.quality.model_dump()) for e in entries if e.quality is not None
        )
        if not rows:
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            mean = {m: float(np.nanmean([quality[m] for _, _, quality in rows])) for m in MEASURES}
        with (
            atomic(self.folder / QUALITY) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(["file", "images", *MEASURES])
            for name, images, quality in [*rows, ("mean", sum(images for _, images, _ in rows), mean)]:
                writer.writerow([name, images, *(f"{quality[m]:.6g}" for m in MEASURES)])
        return mean
