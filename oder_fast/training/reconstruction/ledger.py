"""What is done: a line for each file, by which a run that was broken off goes on."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from ...data import atomic
from .jobs import InputError, Job, led_files

LEDGER, QUALITY = "reconstructed.jsonl", "quality.csv"
MEASURES = ("psnr", "ssim", "psnr_start", "ssim_start")
UNFINISHED = re.compile(r"\..+-[0-9a-f]{16}(\.\w+)+")
"""Names of files that `atomic` had not renamed when a run was killed."""


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Ledger:
    """What was finished in an output folder: a line for each file, written after its outputs.

    Raises:
        InputError: Where another run is writing there, or what is there was made by another checkpoint or with other
            settings.
        OSError: Where the folder cannot be written.
    """

    def __init__(self, folder: Path, checkpoint: str, chosen: dict[str, Any], overwrite: bool) -> None:
        self.folder, self.checkpoint, self.chosen = folder, checkpoint, chosen
        self.digest = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()
        self.entries: dict[str, dict[str, Any]] = {}
        self.file: TextIO = (folder / LEDGER).open("a+", encoding="utf-8")
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
        text = self.file.read()
        lines = []
        for line in text.splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                continue  # cut short by a crash: that file is done again
        for folder, _, files in os.walk(self.folder):
            for name in filter(UNFINISHED.fullmatch, files):
                Path(folder, name).unlink(missing_ok=True)
        if lines and not overwrite:
            self._check(lines[0])
            self.entries = {line["file"]: line for line in lines[1:]}
            if not text.endswith("\n"):
                self._append_text("\n")
            return
        self.file.truncate(0)
        self._append({"checkpoint": self.checkpoint, "settings": self.chosen})

    def _check(self, head: Mapping[str, Any]) -> None:
        way_out = "choose another output, or --overwrite (overwrite=True) to do all again"
        if head.get("checkpoint") != self.checkpoint:
            raise InputError(f"{self.folder}: holds reconstructions by another checkpoint; {way_out}")
        before = head.get("settings", {})
        changed = [
            f"{key} was {before.get(key)!r} and is {value!r}"
            for key, value in self.chosen.items()
            if before.get(key) != value
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
        self.file.write(text)
        self.file.flush()
        os.fsync(self.file.fileno())

    def _append(self, entry: Mapping[str, Any]) -> None:
        self._append_text(json.dumps(entry) + "\n")

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
        """Tell whether a file was done as it is, and all that was written is there."""
        entry = self.entries.get(job.name)
        if entry is None or any(entry.get(key) != value for key, value in self._stamp(job).items()):
            return False
        return all((self.folder / name).is_file() for name in entry["outputs"])

    def add(self, job: Job, outputs: list[str]) -> None:
        """Note that a file is done."""
        entry = {**self._stamp(job), "outputs": outputs, "converged": job.converged}
        if job.quality:
            columns = zip(*job.quality, strict=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                entry["quality"] = {
                    name: float(np.nanmean(column)) for name, column in zip(MEASURES, columns, strict=True)
                }
            # Uniform ones have no scale to be compared on.
            entry["images"] = sum(not np.isnan(row[0]) for row in job.quality)
        self._append(entry)
        self.entries[job.name] = entry

    def write_quality(self, names: Sequence[str]) -> dict[str, float]:
        """Write the table of the files that are done, now or before; return the means over them."""
        entries = [e for e in (self.entries.get(name) for name in names) if e is not None and "quality" in e]
        if not entries:
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            mean = {m: float(np.nanmean([e["quality"][m] for e in entries])) for m in MEASURES}
        with atomic(self.folder / QUALITY) as temporary, temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "images", *MEASURES])
            for e in sorted(entries, key=lambda e: str(e["file"])):
                writer.writerow([e["file"], e["images"], *(f"{e['quality'][m]:.6g}" for m in MEASURES)])
            writer.writerow(["mean", sum(e["images"] for e in entries), *(f"{v:.6g}" for v in mean.values())])
        return mean
