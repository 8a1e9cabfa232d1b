"""What a run tells while it goes: tables, TensorBoard, a live line, pictures."""

from __future__ import annotations

import csv
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..data import atomic
from ..viz import largest_of, new_figure, show_error, show_image, window_of

SOLVED = ("iterations", "denoiser_calls", "operator_calls", "converged")
TRAINING = (
    "stage",
    "step",
    "seconds",
    "loss",
    "gradient_norm",
    "learning_rate",
    "residual",
    *SOLVED,
    "adjoint_iterations",
    "adjoint_denoiser_calls",
    "adjoint_operator_calls",
    "tau",
    "halvings",
)
VALIDATION = (
    "stage",
    "step",
    "seconds",
    "loss",
    "psnr",
    "ssim",
    "psnr_start",
    "ssim_start",
    *SOLVED,
)

Value = float | int | str | None


class Table:
    """A CSV file that grows line by line.

    Args:
        path: The file.
        columns: Its header.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, tuple(columns)
        if not path.exists():
            with path.open("w", newline="") as file:
                csv.writer(file).writerow(self.columns)

    def add(self, row: Mapping[str, Value]) -> None:
        """Write a line; a column without a value stays empty."""
        # One that was removed is not begun anew, without its header.
        with self.path.open("r+", newline="") as file:
            file.seek(0, os.SEEK_END)
            csv.writer(file).writerow([_plain(row.get(c)) for c in self.columns])

    def rows(self) -> list[dict[str, float]]:
        """Return what was written, numbers alone; a line that a crash cut short is left out."""
        with self.path.open(newline="") as file:
            lines = [line for line in csv.reader(file) if len(line) == len(self.columns)][1:]
        return [{c: float(v) for c, v in zip(self.columns, line, strict=True) if v != ""} for line in lines]

    def forget_after(self, stage: int, step: int) -> None:
        """Remove what a run wrote after the checkpoint from which it goes on."""
        kept = [row for row in self.rows() if (row["stage"], row["step"]) <= (stage, step)]
        with atomic(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(self.columns)
            writer.writerows([[_plain(row.get(c)) for c in self.columns] for row in kept])


def _plain(value: Value) -> Value:
    if value is None:
        return ""
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < 1e15 else f"{value:.6g}"
    return value


def live_line(name: str, unit: str, total: int, shown: bool, initial: int = 0) -> Any:
    """Return the line that tells how far something is; a file or a batch system's log gets one now and then."""
    often = 0.5 if sys.stderr.isatty() else 30.0
    options = {"disable": not shown, "mininterval": often, "dynamic_ncols": True}
    return tqdm(total=total, initial=initial, desc=name, unit=unit, **options)


def duration(seconds: float) -> str:
    """Say a time in the unit that it is counted in."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.2g} seconds"


def clock(device: torch.device) -> float:
    """Return the time in seconds, when what a GPU was given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Logs:
    """The tables, TensorBoard's files and the live line of a run; of its first process alone.

    Args:
        folder: Of the run.
        begin: Stage, step and steps in all of where the run goes on.
        progress: Whether to show the live line.
    """

    def __init__(self, folder: Path, begin: tuple[int, int, int], progress: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter

        stage, step, overall = begin
        self.training = Table(folder / "training.csv", TRAINING)
        self.validation = Table(folder / "validation.csv", VALIDATION)
        for table in (self.training, self.validation):
            table.forget_after(stage, step)
        self.board: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=overall + 1)
        self._hook = threading.excepthook
        threading.excepthook = self._of_thread
        self.progress = progress
        self.bar: Any = None
        self._beat: threading.Thread | None = None
        self._ended = threading.Event()

    def begin_stage(self, name: str, steps: int, step: int) -> None:
        """Start the live line of a stage."""
        self.end_stage()
        self.bar = live_line(name, "step", steps, self.progress, initial=step)
        if self.progress:
            self._beat = threading.Thread(target=self._show_time, args=(self.bar, self._ended), daemon=True)
            self._beat.start()

    def _show_time(self, bar: Any, ended: threading.Event) -> None:
        """Show that a step of minutes is alive: its time goes on."""
        while not ended.wait(2.0 if sys.stderr.isatty() else 60.0):
            bar.refresh()

    def end_stage(self) -> None:
        """End it."""
        if self._beat is not None:
            self._ended.set()
            self._beat.join()
            self._beat, self._ended = None, threading.Event()
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def step(self, overall: int, row: Mapping[str, Value]) -> None:
        """Tell of a step."""
        self._add("training", self.training, overall, row)
        if self.bar is not None:
            shown = {"loss": f"{row['loss']:.2e}"} if "loss" in row else {}
            if "denoiser_calls" in row:
                shown["denoiser calls"] = f"{row['denoiser_calls']}"
                shown["residual"] = f"{row['residual']:.1e}"
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update()

    def validated(self, overall: int, row: Mapping[str, Value]) -> None:
        """Tell of a validation."""
        self._add("validation", self.validation, overall, row)

    def _add(self, what: str, table: Table, overall: int, row: Mapping[str, Value]) -> None:
        table.add(row)
        for name, value in row.items():
            if name not in ("stage", "step", "seconds") and isinstance(value, float | int):
                self.board.add_scalar(f"{what}/{name}", value, overall)

    def picture(self, overall: int, path: Path) -> None:
        """Show a picture in TensorBoard too."""
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self.board.add_image("validation", np.asarray(image.convert("RGB")), overall, dataformats="HWC")

    def say(self, text: str) -> None:
        """Tell a sentence, above the live line."""
        tqdm.write(f"oder-fast: {text}", file=sys.stderr)

    def close(self) -> None:
        """End everything.

        Raises:
            OSError: Where TensorBoard's files could not be written.
        """
        self.end_stage()
        try:
            self.board.close()
        finally:
            threading.excepthook = self._hook

    def _of_thread(self, failure: threading.ExceptHookArgs) -> None:
        """Leave what TensorBoard's writing thread could not write to the call that is told of it: no traceback."""
        if not (
            isinstance(failure.exc_value, OSError)
            and type(failure.thread).__module__.startswith("tensorboard")
        ):
            self._hook(failure)


class Silence(Logs):
    """What the other processes of a run tell: nothing."""

    def __init__(self) -> None:
        pass

    def begin_stage(self, name: str, steps: int, step: int) -> None:
        """Tell nothing."""

    def end_stage(self) -> None:
        """Tell nothing."""

    def step(self, overall: int, row: Mapping[str, Value]) -> None:
        """Tell nothing."""

    def validated(self, overall: int, row: Mapping[str, Value]) -> None:
        """Tell nothing."""

    def picture(self, overall: int, path: Path) -> None:
        """Show nothing."""

    def say(self, text: str) -> None:
        """Tell nothing."""

    def close(self) -> None:
        """Do nothing."""


def draw_images(path: Path, rows: Sequence[tuple[str, Tensor, Tensor, Tensor]]) -> None:
    """Draw truths, starts and reconstructions, and the errors of the last two on one scale.

    Args:
        path: PNG file.
        rows: Name, truth, start and reconstruction, real, ``(H, W)`` each.
    """
    figure = new_figure(12, 2.6 * len(rows))
    for line, (name, truth, start, image) in zip(
        figure.subplots(len(rows), 5, squeeze=False), rows, strict=True
    ):
        window, largest = window_of(truth), largest_of(start - truth)
        pictures = {"truth": truth, "start": start, "reconstruction": image}
        for axis, (title, picture) in zip(line[:3], pictures.items(), strict=True):
            show_image(axis, picture, window, title)
        show_error(line[3], start, truth, largest, "|start - truth|")
        show_error(line[4], image, truth, largest, "|reconstruction - truth|")
        line[0].set_ylabel(name[-24:], fontsize=7)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=80)
