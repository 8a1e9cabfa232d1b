"""Damaged files of measurements: each is read right, or refused in one sentence, in bounded time and memory."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
import torch

from oder_fast import data

MEMORY, SECONDS = 2 * 2**30, 20
"""What a file of some kilobytes may take besides what Python and torch have, and seconds of the processor for all; besides
one a file."""


def load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


files = load("test_kspace")
VALUES = files.noise(3, 2, files.H, files.W)
MASK = np.arange(files.W) % 2 == 0


def fastmri(path, values=VALUES):
    files.write_fastmri(path, values, mask=MASK, ismrmrd_header=files.header())


def packed(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("kspace", data=VALUES, chunks=(1, 2, 4, 12), compression="gzip", shuffle=True)


def ismrmrd(path):
    lines = [one for s in range(3) for one in files.scan_lines(VALUES[s], range(files.W), slice=s)]
    files.write_ismrmrd(path, [files.line(files.noise(2, 9), flags=[19]), *lines])


def matlab(path):
    pairs = np.empty(VALUES.T.shape, [("real", "<f4"), ("imag", "<f4")])
    pairs["real"], pairs["imag"] = VALUES.T.real, VALUES.T.imag
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, stored in (("kspace", pairs), ("mask", MASK[:, None].astype(np.uint8))):
            file[name] = stored
            file[name].attrs["MATLAB_class"] = np.bytes_("single" if name == "kspace" else "logical")


WRITERS = {
    "fastmri.h5": fastmri,
    "packed.h5": packed,
    "ismrmrd.h5": ismrmrd,
    "new.mat": matlab,
    "old.mat": lambda path: scipy.io.savemat(path, {"kspace": VALUES, "mask": MASK}, do_compression=True),
    "plain.mat": lambda path: scipy.io.savemat(path, {"kspace": VALUES, "mask": MASK}),
    "a.npy": lambda path: np.save(path, VALUES),
    "a.npz": lambda path: np.savez(path, kspace=VALUES, mask=MASK),
    "packed.npz": lambda path: np.savez_compressed(path, kspace=VALUES, mask=MASK),
}


def damaged(content: bytes, random: np.random.Generator) -> bytes:
    """Return a file cut short, with bits turned, or with a range of zeros."""
    kind, n = random.integers(3), len(content)
    if kind == 0:
        return content[: random.integers(n)]
    found = bytearray(content)
    # Headers stand at the beginning.
    reach = n if random.random() < 0.5 else min(n, 2048)
    if kind == 1:
        for place in random.integers(reach, size=random.integers(1, 9)):
            found[place] ^= 1 << random.integers(8)
    else:
        start = random.integers(reach)
        stop = start + min(int(random.integers(1, 200)), n - start)
        found[start:stop] = bytes(stop - start)
    return bytes(found)


def outcome(path: Path) -> str:
    """Return what is wrong with how a file is read: nothing, mostly."""
    try:
        header = data.kspace.read_kspace_header(path)
    except ValueError:
        header = None
    try:
        found = data.read_kspace(path)
    except ValueError as error:
        said = str(error)
        plain = said.startswith(f"{path}: ") and len(said) > len(f"{path}: ") and len(said) < 2000
        return "" if plain else f"said {said!r}"
    if header is None or header.shape != tuple(found.kspace.shape):
        return f"header {header}, k-space {tuple(found.kspace.shape)}"
    if not bool(torch.view_as_real(found.kspace).isfinite().all()):
        return "not finite"
    return ""


def main(folder: Path, name: str, count: int, first: int) -> None:
    """Read damaged files, and say before each which it is."""
    warnings.simplefilter("ignore")
    WRITERS[name](folder / name)
    content = (folder / name).read_bytes()
    path = folder / f"damaged-{name}"
    outcome(folder / name)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS + count, SECONDS + count))
    for number in range(first, count):
        print(json.dumps([number, "began"]), flush=True)
        path.write_bytes(damaged(content, np.random.default_rng([number, len(name)])))
        try:
            problem = outcome(path)
        except BaseException as error:
            problem = repr(error)
        if problem:
            print(json.dumps([number, problem]), flush=True)
    print(json.dumps([count, "ended"]), flush=True)


def problems(folder: Path, name: str, count: int) -> list[list]:
    """Read damaged files in another process; return what went wrong with which."""
    first, found = 0, []
    while first < count:
        arguments = [sys.executable, __file__, str(folder), name, str(count), str(first)]
        child = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            # For what waits without working; other work on the machine must not end it.
            said, errors = child.communicate(timeout=10 * (SECONDS + count))
        except subprocess.TimeoutExpired:
            child.kill()
            said, errors = child.communicate()
        lines = [json.loads(line) for line in said.splitlines()]
        found += [line for line in lines if line[1] not in ("began", "ended")]
        if not lines:
            return [*found, [first, errors]]
        first, last = lines[-1]
        if last != "ended":
            found.append([first, f"the process ended ({child.returncode})"])
            first += 1
    return found


@pytest.mark.parametrize("name", WRITERS)
def test_damaged_files(tmp_path, name):
    WRITERS[name](tmp_path / name)
    content = (tmp_path / name).read_bytes()
    for number in range(10):
        path = tmp_path / f"damaged-{name}"
        path.write_bytes(damaged(content, np.random.default_rng([number, len(name)])))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert outcome(path) == "", number


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", WRITERS)
def test_many_damaged_files(tmp_path, name):
    assert problems(tmp_path, name, 300) == []


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
