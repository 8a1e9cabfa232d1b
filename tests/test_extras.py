"""Packages that only parts need: what the extras install, and the sentence where one is missing."""

from __future__ import annotations

import importlib
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import setuptools
import torch

from oder_fast import BM3D, cli
from oder_fast._extras import APART, EXTRAS, NAMES, MissingPackageError, needs
from oder_fast.data import (
    Cached,
    ImageFolder,
    KSpaceFolder,
    Phantoms,
    nifti,
    read_array,
    read_image,
    read_kspace,
    read_nifti,
    ssim,
    write_image,
    write_nifti,
)

ROOT = Path(__file__).resolve().parents[1]
MODULES = list(dict.fromkeys(module for modules in EXTRAS.values() for module in modules))


@pytest.fixture
def hide(monkeypatch):
    """Make imports of a module fail as those of one that is not installed."""
    nifti._kinds.cache_clear()
    return lambda name: monkeypatch.setitem(sys.modules, name, None)


def sentence(text: str) -> str:
    return f"^{re.escape(text)}$"


# ------------------------------------------------------------------ what is installed


def requirements(text: str, name: str) -> set[str]:
    """Names in a list of pyproject.toml, which Python 3.10 cannot parse by itself."""
    listed = re.search(rf"^{name} = \[(.*?)\]$", text, re.M | re.S)[1]
    return {re.match(r"[\w-]+(\[[\w,]+\])?", entry)[0] for entry in re.findall(r'"(.*?)"', listed)}


def test_the_extras_install_what_is_asked_for():
    text = (ROOT / "pyproject.toml").read_text()
    assert requirements(text, "dependencies") == {"torch", "numpy", "scipy"}
    for extra, modules in EXTRAS.items():
        assert requirements(text, extra) - {"tomli"} == {NAMES.get(module, module) for module in modules}
    for extra, modules in APART.items():
        assert requirements(text, extra) == set(modules)
    assert requirements(text, "all") == {f"oder-fast[{','.join(EXTRAS)}]"}
    for extra in ("test", "bench", "dev"):
        assert requirements(text, extra) & {"oder-fast[all]", "oder-fast[test]"}


# ------------------------------------------------------------------ the sentence


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        (["pydicom"], "this needs pydicom: pip install 'oder-fast[io]'"),
        (["yaml"], "this needs pyyaml: pip install 'oder-fast[train]'"),
        (["PIL", "skimage"], "this needs pillow, scikit-image: pip install 'oder-fast[io]'"),
        (["PIL", "tqdm"], "this needs pillow, tqdm: pip install 'oder-fast[train]'"),
        (["h5py", "tqdm"], "this needs h5py, tqdm: pip install 'oder-fast[all]'"),
        (["deepinv"], "this needs deepinv: pip install 'oder-fast[interop]'"),
        (["no_such_module"], "this needs no_such_module: pip install no_such_module"),
    ],
)
def test_one_command_installs_all_that_is_missing(hide, missing, said):
    for name in missing:
        hide(name)
    with pytest.raises(ImportError, match=sentence(said)):
        needs("this", "numpy", *missing)


def dicom(folder: Path) -> Path:
    path = folder / "slice.dcm"
    path.write_bytes(bytes(128) + b"DICM" + bytes(200))
    return path


def png(folder: Path) -> Path:
    path = folder / "slice.png"
    write_image(path, torch.rand(4, 4))
    return path


def tiff(folder: Path) -> Path:
    path = folder / "slice.tif"
    write_image(path, torch.rand(4, 4))
    return path


def volume(folder: Path) -> Path:
    path = folder / "volume.nii.gz"
    write_nifti(path, torch.rand(2, 4, 4), (1.0, 1.0, 1.0))
    return path


def hdf5(folder: Path) -> Path:
    import h5py

    path = folder / "scan.h5"
    with h5py.File(path, "w") as file:
        file["kspace"] = np.ones((1, 2, 4, 4), np.complex64)
    return path


@pytest.mark.parametrize(
    ("module", "make", "read", "what"),
    [
        ("pydicom", dicom, read_image, "reading DICOM"),
        ("pydicom", dicom, ImageFolder, "reading DICOM"),
        ("PIL", png, read_image, "reading PNG"),
        ("PIL", png, ImageFolder, "reading PNG"),
        ("tifffile", tiff, read_image, "reading TIFF"),
        ("tifffile", tiff, read_array, "reading TIFF"),
        ("tifffile", tiff, ImageFolder, "reading TIFF"),
        ("nibabel", volume, read_nifti, "reading NIfTI"),
        ("nibabel", volume, ImageFolder, "reading NIfTI"),
        ("h5py", hdf5, read_kspace, "reading HDF5"),
        ("h5py", hdf5, read_array, "reading HDF5"),
        ("h5py", hdf5, KSpaceFolder, "reading HDF5"),
    ],
)
def test_every_reader_says_what_it_needs(hide, tmp_path, module, make, read, what):
    path = make(tmp_path)
    hide(module)
    nifti._kinds.cache_clear()
    with pytest.raises(
        MissingPackageError,
        match=sentence(f"{what} needs {NAMES.get(module, module)}: pip install 'oder-fast[io]'"),
    ):
        read(path)


@pytest.mark.parametrize(
    ("module", "suffix", "what"),
    [
        ("pydicom", ".dcm", "writing DICOM"),
        ("tifffile", ".tif", "writing TIFF"),
        ("PIL", ".png", "writing PNG"),
        ("nibabel", ".nii.gz", "writing NIfTI"),
    ],
)
def test_every_writer_says_what_it_needs_and_leaves_nothing(hide, tmp_path, module, suffix, what):
    hide(module)
    with pytest.raises(
        MissingPackageError,
        match=sentence(f"{what} needs {NAMES.get(module, module)}: pip install 'oder-fast[io]'"),
    ):
        write_image(tmp_path / f"image{suffix}", torch.rand(4, 4))
    assert not list(tmp_path.iterdir())


def test_measures_caches_and_denoisers_say_what_they_need(hide):
    for name in ("skimage", "tqdm", "bm3d"):
        hide(name)
    with pytest.raises(ImportError, match=sentence("ssim needs scikit-image: pip install 'oder-fast[io]'")):
        ssim(torch.rand(8, 8), torch.rand(8, 8))
    with pytest.raises(ImportError, match=sentence("Cached.fill needs tqdm: pip install 'oder-fast[train]'")):
        Cached(Phantoms("ellipses", 2, 16)).fill()
    with pytest.raises(ImportError, match=r"BM3D \(noncommercial use only\) needs bm3d: pip install bm3d$"):
        BM3D(0.1)


@pytest.mark.parametrize("layer", ["training", "reconstruction"])
@pytest.mark.parametrize("module", EXTRAS["train"])
def test_layers_say_what_they_need(hide, monkeypatch, module, layer):
    monkeypatch.delitem(sys.modules, f"oder_fast.{layer}", raising=False)
    hide(module)
    with pytest.raises(
        ImportError, match=rf"^oder_fast\.{layer} needs {NAMES.get(module, module)}: pip install "
    ):
        importlib.import_module(f"oder_fast.{layer}")


def test_the_physics_for_deepinv_say_what_they_need(hide, monkeypatch):
    monkeypatch.delitem(sys.modules, "oder_fast.deepinv", raising=False)
    hide("deepinv")
    with pytest.raises(
        MissingPackageError,
        match=sentence("oder_fast.deepinv needs deepinv: pip install 'oder-fast[interop]'"),
    ):
        importlib.import_module("oder_fast.deepinv")


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(
    "command", ["demo", "demo mri", "demo idt", "train ct.yaml", "reconstruct best.pt scans --output out"]
)
def test_every_command_says_what_it_needs(hide, capsys, command, module):
    name = command.split()[0]
    if name == "train" and module not in EXTRAS["train"]:
        return
    hide(module)
    assert cli.main(command.split()) == 2
    out, err = capsys.readouterr()
    extra = next(extra for extra, modules in EXTRAS.items() if module in modules)
    assert (out, err) == (
        "",
        f"oder-fast: {name} needs {NAMES.get(module, module)}: pip install 'oder-fast[{extra}]'\n",
    )


@pytest.mark.parametrize(
    "what, module", [("theory", "matplotlib"), ("cost", "matplotlib"), ("cost", "pydicom")]
)
def test_experiments_say_what_they_need(hide, capsys, tmp_path, what, module):
    hide(module)
    assert cli.main(["reproduce", what, "--output", str(tmp_path / "out")]) == 2
    extra = "io" if module == "pydicom" else "train"
    assert (
        capsys.readouterr().err == f"oder-fast: reproduce needs {module}: pip install 'oder-fast[{extra}]'\n"
    )
    assert not (tmp_path / "out").exists()


CORE = """
import sys

for name in {modules}:
    sys.modules[name] = None
import torch
import oder_fast.data
from oder_fast import DEQRED, ParallelBeamCT, TotalVariation, cli

for command in (["info"], ["train", "ct.yaml"]):
    print(cli.main(command))
image = oder_fast.data.shepp_logan(32)[None]
ct = ParallelBeamCT(32, 12)
found = DEQRED(TotalVariation(0.01), tau=0.003)(ct(image).numpy(), ct)
print(oder_fast.data.psnr(found, image) > oder_fast.data.psnr(ct.fbp(ct(image)), image))
"""


@pytest.mark.exhaustive
def test_the_core_works_without_any_of_them():
    run = subprocess.run(
        [sys.executable, "-c", CORE.format(modules=[*MODULES, "bm3d", "deepinv"])],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("version: ")
    assert run.stdout.endswith("\n0\n2\nTrue\n")
    assert len(run.stderr.splitlines()) == 1
    assert "pip install 'oder-fast[train]'" in run.stderr


# ------------------------------------------------------------------ whether CUDA is compiled


@pytest.mark.parametrize(
    ("wanted", "nvcc", "driver", "compiles", "reason"),
    [
        ("auto", True, True, True, "nvcc and an NVIDIA driver (libcuda.so.1) are here"),
        (
            "auto",
            True,
            False,
            False,
            "nvcc is here, but no NVIDIA driver (libcuda.so.1); ODER_FAST_CUDA=1 insists",
        ),
        ("auto", False, True, False, "nvcc is neither on the PATH nor under CUDA_HOME"),
        ("1", True, False, True, "ODER_FAST_CUDA=1"),
        ("0", True, True, False, "ODER_FAST_CUDA=0"),
    ],
)
def test_cuda_is_compiled_where_it_can_run(monkeypatch, tmp_path, wanted, nvcc, driver, compiles, reason):
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    build = runpy.run_path(str(ROOT / "setup.py"))

    def load(name):
        assert name == "libcuda.so.1"
        if not driver:
            raise OSError("no such file")

    monkeypatch.setattr("ctypes.CDLL", load)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("ODER_FAST_CUDA", wanted)
    if nvcc:
        (tmp_path / "nvcc").touch(0o755)
    assert build["find_nvcc"]() == (str(tmp_path / "nvcc") if compiles else None, reason)


def test_cuda_that_is_insisted_on_and_cannot_be_compiled_ends_the_build(monkeypatch, tmp_path):
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    build = runpy.run_path(str(ROOT / "setup.py"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    for wanted, said in (("1", "nvcc is neither on the PATH"), ("yes", "must be auto, 1 or 0, got 'yes'")):
        monkeypatch.setenv("ODER_FAST_CUDA", wanted)
        with pytest.raises(SystemExit, match=said):
            build["find_nvcc"]()
