"""Checkpoints that are whole or not there."""

from __future__ import annotations

import errno
import fcntl
import io
import math
import os
import random
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from ..data import atomic
from .configuration import (
    MOST_PIXELS,
    Configuration,
    ConfigurationError,
    CountFrom0,
    Side,
    as_configuration,
    explain,
)
from .processes import rank

NAME = re.compile(r"checkpoint-(\d+)-(\d+)\.pt")
FORMAT = 2
"""Of the checkpoints that are written; 1 is that of version 0.1."""

KEPT = ("tau", "train_tau", "differentiation", "nonnegative")
"""Settings of the fixed point in format 1 that mean the same here."""

HALVINGS = 4
"""How many batches are left out, and the learning rate halved after each, before a run ends."""


class CheckpointError(ValueError):
    """A checkpoint that is damaged, of another kind, or does not fit."""


class Position(BaseModel):
    """Where a run is."""

    model_config = ConfigDict(strict=True, extra="forbid")

    stage: Annotated[int, Field(ge=0, le=1)] = 0
    step: CountFrom0 = 0
    halvings: Annotated[int, Field(ge=0, le=HALVINGS)] = 0
    best: float = -math.inf
    best_stage: Annotated[int, Field(ge=-1, le=1)] = -1
    waiting: CountFrom0 = 0
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    reason: str | None = None


class _Content(BaseModel):
    """What a checkpoint holds; the optimizer's state and that of random numbers are checked where they are restored."""

    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True)

    position: Position
    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    optimizer: dict[str, Any]
    random: dict[str, Any]
    image_shape: Annotated[list[Side], Field(min_length=2, max_length=3)]
    processes: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _bounded(self) -> _Content:
        if math.prod(self.image_shape) > MOST_PIXELS:
            raise ValueError(f"image_shape must have at most {MOST_PIXELS} pixels, got {self.image_shape}")
        return self


def checkpoint_path(folder: Path, stage: int, step: int) -> Path:
    """Return the name of the checkpoint after so many steps of a stage."""
    return folder / f"checkpoint-{stage}-{step:08d}.pt"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, the newest first."""
    found = [(NAME.fullmatch(path.name), path) for path in folder.glob("checkpoint-*.pt")]
    return [path for _, path in sorted(((int(m[1]), int(m[2])), p) for m, p in found if m)][::-1]


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint under a temporary name, bring it to the disk, and rename it.

    Raises:
        OSError: Where it cannot be written; an older file of that name stays as it was.
    """
    # Into memory first: of a disk that is full torch tells with an error of its own.
    content = io.BytesIO()
    torch.save({"format": FORMAT, **state}, content)
    with atomic(path) as temporary, temporary.open("wb") as file:
        file.write(content.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    # The renaming too is to outlive a crash of the machine.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, and check all of it; no code in it is run (``weights_only=True``).

    The fixed point's settings of version 0.1 are brought to those of this one. Numbers have the bounds of
    `Configuration`, so a file from elsewhere cannot ask for work without end.

    Raises:
        OSError: Where the file is missing or unreadable.
        CheckpointError: For a file that is damaged, or not a checkpoint of this package, or a number out of range.
    """
    path = Path(path)
    state = read_tensors(path)
    if not isinstance(state, dict) or "format" not in state or "configuration" not in state:
        raise CheckpointError(f"{path}: not a checkpoint of oder-fast train")
    number = state["format"]
    if not isinstance(number, int) or number < 1:
        raise CheckpointError(f"{path}: not a checkpoint of oder-fast train: its format is no number")
    if number > FORMAT:
        raise CheckpointError(
            f"{path}: of format {number}, and this version of oder_fast reads up to {FORMAT}"
        )
    content: dict[str, Any] = _of_this_format(state) if number == 1 else state
    try:
        _Content.model_validate(content)
        configuration_of(content, path)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {explain(error).splitlines()[0]}") from error
    except ConfigurationError as error:
        raise CheckpointError(str(error).splitlines()[0]) from error
    return content


def _of_this_format(state: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint of format 1 with the fixed point's settings of this one.

    The fixed points are the same. Solvers, iterations and tolerances were those of gradient steps, and are left out.
    """
    tree = state["configuration"]
    red = tree.get("red") if isinstance(tree, Mapping) else None
    if not isinstance(red, Mapping):
        return state  # refused like any other
    kept = {name: red[name] for name in KEPT if name in red}
    if red.get("minibatch_size") is not None:
        names = ("minibatch_size", "variance_reduction")
        kept |= {"step": "gradient"} | {name: red[name] for name in names if name in red}
    return state | {"configuration": {**tree, "red": kept}}


def configuration_of(state: Mapping[str, Any], path: Path) -> Configuration:
    """Return the configuration in a checkpoint.

    Raises:
        ConfigurationError: For one that is none.
    """
    return as_configuration(state["configuration"], f"{path}: configuration")


def read_tensors(path: Path) -> Any:
    """Read what `torch.save` wrote, and check every byte of it; no code in it is run.

    Raises:
        OSError: Where the file is missing or unreadable.
        CheckpointError: For a file that is damaged, or asks for more memory than it stores.
    """
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; name a checkpoint in it, as best.pt")
    with path.open("rb"):
        pass
    try:
        # Formats before torch 1.6 are no archives.
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if sum(part.file_size for part in archive.infolist()) > path.stat().st_size:
                    raise CheckpointError(f"{path}: unpacks to more than it stores")
                damaged = archive.testzip()
            if damaged is not None:
                raise CheckpointError(f"{path}: damaged at {damaged}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path}: damaged, or not a checkpoint ({type(error).__name__})") from error


def newest_checkpoint(folder: Path) -> tuple[Path | None, dict[str, Any] | None, list[str]]:
    """Return the newest whole checkpoint of a run and what it holds, and what was wrong with newer ones."""
    problems: list[str] = []
    for path in list_checkpoints(folder):
        try:
            return path, load_checkpoint(path), problems
        except CheckpointError as error:
            problems.append(str(error))
    return None, None, problems


def remove_old(folder: Path, keep: int) -> None:
    """Remove all but the newest checkpoints."""
    for path in list_checkpoints(folder)[keep:]:
        path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[Callable[[], None]]:
    """Keep other runs out of a folder, which is made; the lock ends with the process at the latest.

    Yields:
        Raises an OSError where the folder was removed since, and another run may be at work in one of its name.

    Raises:
        OSError: Where the folder cannot be made.
        CheckpointError: Where another run is at work in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"output {folder}: cannot be made a folder: {error.strerror}") from error
    if rank() != 0:
        yield lambda: None
        return
    try:
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise OSError(f"output {folder}: cannot be written: {error.strerror}") from error
    with file:
        try:
            # Of this process alone: those that load do not inherit it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise CheckpointError(f"output {folder}: another run is at work in it") from error
        except OSError:
            pass  # some network file systems know no locks

        def require_folder() -> None:
            if os.fstat(file.fileno()).st_nlink == 0:
                raise OSError(errno.ENOENT, "it was removed while the run was at work in it")

        yield require_folder


def require_room(folder: Path, size: int) -> None:
    """Make the folder, and check that so many bytes can be written to it.

    Raises:
        OSError: Where they cannot, with the reason.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"0" * 4096)
        file.flush()
        os.fsync(file.fileno())
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(
            f"{folder}: {free / 2**20:.0f} MiB are free, and the run's checkpoints need {size / 2**20:.0f} MiB"
        )


def random_states() -> dict[str, Any]:
    """Return the states of all random number generators, of plain types."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 (others draw from it)
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Put the random number generators back."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
