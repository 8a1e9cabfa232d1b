"""Files through a checkpoint: what comes out, what is refused, and what survives."""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pydicom
import pytest
import tifffile
import torch
from PIL import Image
from pydicom.data import get_testdata_file

from oder_fast import Anderson, CartesianMRI, DnCNN, GradientStep, ParallelBeamCT
from oder_fast.cli import main
from oder_fast.data import birdcage_maps, brain_like, cell_like, random_ellipses, read_image, read_nifti
from oder_fast.fixed_point import DivergenceError
from oder_fast.reconstruction import InputError, reconstruct_files
from oder_fast.reconstruction import ledger as ledgers
from oder_fast.reconstruction import run as reconstruction
from oder_fast.training import (
    CheckpointError,
    ConfigurationError,
    RunError,
    Trainer,
    load_model,
    read_configuration,
)

SIZE = 24


def load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kspace_files = load("test_kspace")

COMMON = {
    # As it is drawn, it shrinks images: the map contracts.
    "denoiser": {"kind": "dncnn", "options": {"depth": 3, "width": 4, "predicts": "image", "bias": False}},
    "pretraining": {"steps": 2, "batch_size": 2, "ema": None, "learning_rate": 1e-6},
    "training": {"steps": 1, "ema": None, "learning_rate": 1e-6},
    "validation": {"every": 1, "samples": 1, "images": 0},
    "threads": 1,
}
RED = {"tau": 0.01, "tolerance": 1e-4, "adjoint_iterations": 5}
KINDS = {
    "ct": {
        "operator": {"kind": "ct", "angles": 16, "snr": None},
        "data": {"phantoms": {"kind": "ellipses", "n": 2, "size": SIZE}, "workers": 0},
        "red": RED,
    },
    "mri": {
        "operator": {"kind": "mri", "coils": 4, "acceleration": 2, "center_fraction": 0.5},
        "data": {"phantoms": {"kind": "brain", "n": 2, "size": 32}, "workers": 0},
        "red": RED,
    },
    "idt": {
        "operator": {
            "kind": "idt",
            "depths": [-4, 0, 4],
            "rings": [[8, 0.3]],
            "pixel_size": 0.4,
            "wavelength": 0.6,
            "numerical_aperture": 0.4,
            "medium_index": 1.33,
        },
        "data": {"phantoms": {"kind": "cells", "n": 2, "size": 16}, "workers": 0},
        "red": RED | {"tolerance": 1e-2},
    },
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A checkpoint of each kind, made when it is first asked for."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def get(kind):
        if kind not in made:
            configuration = read_configuration(COMMON | KINDS[kind] | {"output": str(folder / kind)})
            with pytest.MonkeyPatch.context() as patch:
                # Drawing its curves takes longer than the run.
                patch.setattr("oder_fast.training.report._curves", lambda *_: b"")
                made[kind] = Trainer(configuration, progress=False).fit().last
        return made[kind]

    return get


@pytest.fixture
def ct(checkpoints):
    return checkpoints("ct")


@pytest.fixture
def mri(checkpoints):
    return checkpoints("mri")


def reconstruct(checkpoint, inputs, output, **options):
    return reconstruct_files(checkpoint, inputs, output, progress=False, **options)


def ellipses(n, seed=0):
    return random_ellipses(n, SIZE, torch.Generator().manual_seed(seed))


def sinograms(n, seed=0):
    return ParallelBeamCT(SIZE, KINDS["ct"]["operator"]["angles"])(ellipses(n, seed))


def save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.asarray(values))
    return path


def tree(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def ledger(folder):
    lines = [json.loads(line) for line in (folder / "reconstructed.jsonl").read_text().splitlines()]
    return {line["file"]: line for line in lines[1:]}


def error(image, truth):
    return float(torch.linalg.vector_norm(torch.as_tensor(image) - truth) / torch.linalg.vector_norm(truth))


# ------------------------------------------------------------------ CT


def test_sinograms_of_a_folder(tmp_path, ct):
    y = sinograms(4)
    save(tmp_path / "in/one.npy", y[0])
    save(tmp_path / "in/a/b/three.npy", y[1:])
    (tmp_path / "in/notes.txt").write_text("no data")
    save(tmp_path / "in/.hidden.npy", y[0])
    # In another unit the same comes out in that unit.
    tifffile.imwrite(tmp_path / "in/scaled.tif", 50 * y[0].numpy())
    with h5py.File(tmp_path / "in/stored.h5", "w") as file:
        file["scan/sinogram"] = y[0].numpy()
    report = reconstruct(ct, tmp_path / "in", tmp_path / "out")
    assert sorted(report.done) == ["a/b/three.npy", "one.npy", "scaled.tif", "stored.h5"]
    assert (report.failed, report.skipped, report.not_converged) == ({}, [], [])
    assert tree(tmp_path / "out") == [
        "a/b/three.tif",
        "one.tif",
        "reconstructed.jsonl",
        "scaled.tif",
        "stored.tif",
    ]
    one, three = (tifffile.imread(tmp_path / "out" / name) for name in ("one.tif", "a/b/three.tif"))
    assert (one.shape, three.shape) == ((SIZE, SIZE), (3, SIZE, SIZE))
    truth = ellipses(4)
    operator = load_model(ct)[1].operator((SIZE, SIZE))
    assert error(one, truth[0]) < 0.7 * error(operator.initial(y[:1])[0], truth[0])
    assert error(three, truth[1:]) < 0.7 * error(operator.initial(y[1:]), truth[1:])
    np.testing.assert_allclose(tifffile.imread(tmp_path / "out/scaled.tif"), 50 * one, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out/stored.tif"), one)


def test_a_scan_of_a_beamline_brings_its_own_geometry(tmp_path, ct):
    angles, bins = torch.arange(20) * torch.pi / 20, 43
    operator = ParallelBeamCT(SIZE, angles, bins, bin_offset=3.0)
    p = operator(ellipses(3)).numpy() / 40
    (tmp_path / "in").mkdir()
    with h5py.File(tmp_path / "in/beam.h5", "w") as file:
        file["exchange/data"] = 1000 * np.exp(-p.swapaxes(0, 1))
        file["exchange/data_white"] = np.full((2, 3, bins), 1000.0)
        file["exchange/data_dark"] = np.zeros((2, 3, bins))
        file["exchange/theta"] = np.rad2deg(angles.numpy())
    save(tmp_path / "in/other.npy", sinograms(1)[0])
    report = reconstruct(ct, tmp_path / "in", tmp_path / "out", batch=2)
    assert (report.done, report.failed) == (["other.npy", "beam.h5"], {})
    assert report.notes["beam.h5"].startswith("3 rows with the axis of rotation at bin 1")
    volume = tifffile.imread(tmp_path / "out/beam.tif")
    assert volume.shape == (3, bins, bins)
    first = (bins - SIZE) // 2
    # The middle of an odd number of pixels is half a pixel from that of an even one.
    images = torch.as_tensor(40 * volume)[:, first : first + SIZE + 1, first : first + SIZE + 1]
    images = torch.nn.functional.avg_pool2d(images, 2, 1)
    assert error(images, ellipses(3)) < 0.4
    # Of another size where one is asked for.
    reconstruct(ct, tmp_path / "in/beam.h5", tmp_path / "small", image_size=(SIZE, SIZE))
    small = torch.as_tensor(tifffile.imread(tmp_path / "small/beam.tif"))
    assert error(40 * small, ellipses(3)) < 0.4
    with h5py.File(tmp_path / "in/beam.h5", "a") as file:
        file["exchange/data"][4, 1, 2] = 0
    report = reconstruct(ct, tmp_path / "in", tmp_path / "again")
    assert report.failed == {
        "beam.h5": "1 of the 43 bins of row 1 have no logarithm, 0 may be interpolated; the first is bin 2: its counts "
        "are not above its darks in 1 of 20 views"
    }


def test_what_is_solved_for_is_the_fixed_point(tmp_path, ct):
    y = sinograms(1)
    path = save(tmp_path / "y.npy", y[0])
    reconstruct(ct, path, tmp_path / "out", scale="none", format="npy", tolerance=1e-5, minibatch=0)
    model, scan, _, _ = load_model(ct)
    model.step, model.solver = GradientStep(), Anderson(1000, 1e-5)
    with torch.no_grad():
        expected = model(y, scan.operator((SIZE, SIZE)))[0]
    assert error(np.load(tmp_path / "out/y.npy"), expected) < 1e-5


def test_a_denoiser_of_ones_own(tmp_path):
    configuration = read_configuration(COMMON | KINDS["ct"] | {"output": str(tmp_path / "run")})
    torch.manual_seed(0)
    last = Trainer(configuration, denoiser=DnCNN(2, 4, predicts="image"), progress=False).fit().last
    path = save(tmp_path / "y.npy", sinograms(1)[0])
    with pytest.raises(ConfigurationError, match="its denoiser is a module that Trainer was given"):
        reconstruct(last, path, tmp_path / "out")
    assert reconstruct(last, path, tmp_path / "out", denoiser=DnCNN(2, 4, predicts="image")).done == ["y.npy"]


@pytest.mark.parametrize(
    "kind, options", [("ct", {}), ("ct", {"simulate": True}), ("mri", {"simulate": True})]
)
def test_batches_give_what_single_images_do(tmp_path, checkpoints, kind, options):
    checkpoint = checkpoints(kind)
    for k, values in enumerate(ellipses(5, 3) if options else sinograms(5, 3)):
        save(tmp_path / f"in/{k}.npy", values)
    options, found = options | {"tolerance": 1e-4}, {}
    for batch in (1, 2, 5):
        output = tmp_path / str(batch)
        report = reconstruct(checkpoint, tmp_path / "in", output, batch=batch, workers=batch, **options)
        assert (len(report.done), report.not_converged) == (5, [])
        found[batch] = np.stack([tifffile.imread(output / f"{k}.tif") for k in range(5)])
    for batch in (2, 5):
        np.testing.assert_allclose(found[batch], found[1], rtol=0, atol=2e-4)
    # Nor do noise and masks depend on what else is reconstructed.
    reconstruct(checkpoint, tmp_path / "in/3.npy", tmp_path / "alone", **options)
    np.testing.assert_allclose(tifffile.imread(tmp_path / "alone/3.tif"), found[1][3], rtol=0, atol=2e-4)


def test_the_live_line_tells_the_calls_of_an_image(tmp_path, ct, capsys):
    for k, values in enumerate(sinograms(3, 3)):
        save(tmp_path / f"in/{k}.npy", values)
    reconstruct_files(ct, tmp_path / "in", tmp_path / "out", progress=True)
    line = capsys.readouterr().err
    assert "3/3" in line
    assert re.search(r"denoiser calls=[1-9]", line)


def test_windows(tmp_path, ct):
    # Values from 2 to 6 are 0 to 1 for the model, sinograms included.
    image, operator = ellipses(1)[0], load_model(ct)[1].operator((SIZE, SIZE))
    shown = 2 + 4 * image / image.max()
    plain = save(tmp_path / "plain.npy", operator((image / image.max())[None])[0])
    moved = save(tmp_path / "moved.npy", operator(shown[None])[0])
    picture = save(tmp_path / "picture.npy", shown)
    reconstruct(ct, plain, tmp_path / "out", scale="none")
    expected = 2 + 4 * tifffile.imread(tmp_path / "out/plain.tif")
    for path, options in ((moved, {}), (picture, {"simulate": True})):
        reconstruct(ct, path, tmp_path / path.stem, scale=(2.0, 6.0), **options)
        result = tifffile.imread(tmp_path / path.stem / f"{path.stem}.tif")
        np.testing.assert_allclose(result, expected, rtol=0, atol=5e-3)


def test_images_are_measured_and_dicom_headers_carried_over(tmp_path, ct):
    (tmp_path / "in/patient").mkdir(parents=True)
    shutil.copy(get_testdata_file("CT_small.dcm"), tmp_path / "in/patient/IM0001")
    ramp = np.linspace(0, 200, SIZE * SIZE).reshape(SIZE, SIZE).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "in/ramp.png")
    # A folder's index of a medium is no image, and no failure.
    shutil.copy(get_testdata_file("DICOMDIR"), tmp_path / "in/DICOMDIR")
    options = {"simulate": True, "tolerance": 1e-2, "max_iterations": 30}
    report = reconstruct(ct, tmp_path / "in", tmp_path / "out", format="dicom", **options)
    assert sorted(report.done) == ["patient/IM0001", "ramp.png"]
    assert report.failed == {}
    source = pydicom.dcmread(tmp_path / "in/patient/IM0001")
    written = pydicom.dcmread(tmp_path / "out/patient/IM0001.dcm")
    for name in ("PatientID", "StudyInstanceUID", "ImagePositionPatient", "PixelSpacing", "Modality"):
        assert written[name].value == source[name].value
    assert written.SeriesInstanceUID != source.SeriesInstanceUID
    assert written.RescaleType == "HU"
    # In the unit of the file.
    image, truth = (read_image(f).image for f in (tmp_path / "out/patient/IM0001.dcm", source.filename))
    assert error(image, truth) < 0.5
    assert pydicom.dcmread(tmp_path / "out/ramp.dcm").Modality == "OT"

    # A slice that comes later belongs to the same series, whichever process writes it.
    shutil.copy(get_testdata_file("CT_small.dcm"), tmp_path / "in/patient/IM0002")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("oder_fast.data.writers.RUN", "another process")
        again = reconstruct(ct, tmp_path / "in", tmp_path / "out", format="dicom", **options)
    assert (again.done, len(again.skipped)) == (["patient/IM0002"], 2)
    later = pydicom.dcmread(tmp_path / "out/patient/IM0002.dcm")
    assert later.SeriesInstanceUID == written.SeriesInstanceUID
    assert later.SOPInstanceUID != written.SOPInstanceUID
    (tmp_path / "in/patient/IM0002").unlink()
    reconstruct(ct, tmp_path / "in", tmp_path / "out", format="dicom", **options)

    lines = (tmp_path / "out/quality.csv").read_text().splitlines()
    assert lines[0] == "file,images,psnr,ssim,psnr_start,ssim_start"
    assert [line.split(",")[0] for line in lines[1:]] == ["patient/IM0001", "ramp.png", "mean"]
    rows = np.array([[float(v) for v in line.split(",")[2:]] for line in lines[1:]])
    np.testing.assert_allclose(rows[2], rows[:2].mean(0), rtol=1e-4)
    assert report.quality["psnr"] == pytest.approx(rows[2, 0], rel=1e-4)
    # As an independent formula has it.
    expected = 20 * np.log10(np.ptp(truth.numpy()) / (image - truth).square().mean().sqrt().item())
    assert rows[0, 0] == pytest.approx(expected, abs=0.02)


def test_volumes_and_numbered_files(tmp_path, ct):
    y = sinograms(3)
    path = save(tmp_path / "y.npy", y)
    for kind, names in {
        "nifti": ["y.nii.gz"],
        "npz": ["y.npz"],
        "png": ["y-0000.png", "y-0001.png", "y-0002.png"],
        "dicom": ["y-0000.dcm", "y-0001.dcm", "y-0002.dcm"],
    }.items():
        assert reconstruct(ct, path, tmp_path / kind, format=kind, tolerance=1e-2).failed == {}
        assert tree(tmp_path / kind) == sorted([*names, "reconstructed.jsonl"])
        assert ledger(tmp_path / kind)["y.npy"]["outputs"] == names
    volume = read_nifti(tmp_path / "nifti/y.nii.gz")[0]
    np.testing.assert_array_equal(np.load(tmp_path / "npz/y.npz")["image"], volume)
    windows = {Image.open(p).text["Window"] for p in (tmp_path / "png").glob("*.png")}
    assert len(windows) == 1


# ------------------------------------------------------------------ MRI


def brain(n=1, size=32, coils=4, seed=0):
    """Images and their k-space; ESPIRiT's maps differ from these by a phase."""
    image = brain_like(n, size, torch.Generator().manual_seed(seed))
    maps = birdcage_maps(coils, (size, size))
    return image, CartesianMRI(maps, torch.ones(size, dtype=torch.bool))(image), maps


def lines(size=32, centre=14):
    mask = np.arange(size) % 2 == 0
    mask[size // 2 - centre // 2 : size // 2 + centre // 2] = True
    return mask


def test_kspace(tmp_path, mri):
    image, kspace, maps = brain(2)
    kspace, mask = 7 * kspace.numpy(), lines()
    zeroed = np.where(mask, kspace, 0)
    (tmp_path / "in").mkdir()
    # Of one with a mask what lies outside does not count.
    kspace_files.write_fastmri(tmp_path / "in/with.h5", kspace, mask=mask)
    kspace_files.write_fastmri(tmp_path / "in/without.h5", zeroed)
    kspace_files.write_fastmri(tmp_path / "in/full.h5", kspace)
    np.savez(tmp_path / "in/named.npz", kspace=kspace, mask=mask)
    xml = kspace_files.header((32, 32, 1), (320.0, 320.0, 5.0), center=16).replace(
        "<x>160.0</x>", "<x>320.0</x>"
    )
    steps = np.flatnonzero(mask)
    acquisitions = [one for s in (0, 1) for one in kspace_files.scan_lines(zeroed[s], steps, slice=s)]
    kspace_files.write_ismrmrd(tmp_path / "in/scan.mrd", acquisitions, xml)
    report = reconstruct(mri, tmp_path / "in", tmp_path / "out", tolerance=1e-5, max_iterations=500)
    assert report.failed == {}
    assert sorted(report.done) == ["full.h5", "named.npz", "scan.mrd", "with.h5", "without.h5"]
    found = {
        name: np.load(tmp_path / f"out/{name}.npy") for name in ("with", "without", "named", "scan", "full")
    }
    assert found["with"].shape == (2, 32, 32)
    assert found["with"].dtype == np.complex64
    for name in ("without", "named", "scan"):
        np.testing.assert_allclose(
            found[name], found["with"], rtol=0, atol=2e-3 * np.abs(found["with"]).max()
        )
    truth = 7 * image.abs()
    start = (
        maps.conj()
        * torch.from_numpy(
            np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(zeroed, (-2, -1)), norm="ortho"), (-2, -1))
        )
    ).sum(1)
    assert error(np.abs(found["with"]), truth) < 0.6 * error(start.abs(), truth)
    assert error(np.abs(found["full"]), truth) < 0.1


def test_coil_maps_of_a_file(tmp_path, mri):
    image, kspace, maps = brain()
    path = save(tmp_path / "few.npy", kspace[0] * torch.from_numpy(lines(centre=4)))
    report = reconstruct(mri, path, tmp_path / "none")
    assert "slice 0" in report.failed["few.npy"]
    assert "too few calibration lines" in report.failed["few.npy"]
    assert report.failed["few.npy"].endswith("or give coil maps (--maps)")
    # Coils three times as sensitive see as much of a third of the image.
    given = save(tmp_path / "maps.npy", 3 * maps)
    report = reconstruct(mri, path, tmp_path / "out", maps=given, part="magnitude")
    assert report.done == ["few.npy"]
    assert error(3 * tifffile.imread(tmp_path / "out/few.tif"), image[0].abs()) < 0.25
    for wrong, message in (
        (maps[:3], "it has 4 coils, and .* maps of 3"),
        (maps.abs(), "coil maps must be complex"),
        (maps[0], r"\(C, H, W\) or \(S, C, H, W\)"),
        (0 * maps, "zero everywhere"),
    ):
        save(given, wrong)
        with pytest.raises(InputError, match=message):
            reconstruct(mri, path, tmp_path / "new", maps=given)
    save(given, maps[..., :20])
    assert (
        "coil maps must have the shape"
        in reconstruct(mri, path, tmp_path / "new", maps=given).failed["few.npy"]
    )


def test_an_oversampled_readout_is_cut(tmp_path, mri):
    image, _, maps = brain()
    wide = torch.zeros(1, 64, 32, dtype=torch.complex64)
    wide[:, 16:48] = image
    coils = torch.zeros(4, 64, 32, dtype=torch.complex64)
    coils[:, 16:48] = maps
    coils[:, :16], coils[:, 48:] = maps[:, :1], maps[:, -1:]
    kspace = CartesianMRI(coils, torch.ones(32, dtype=torch.bool))(wide).numpy()
    header = kspace_files.header((64, 32, 1), (640.0, 320.0, 5.0))
    kspace_files.write_fastmri(tmp_path / "y.h5", kspace, ismrmrd_header=header)
    report = reconstruct(mri, tmp_path / "y.h5", tmp_path / "out", format="nifti", tolerance=1e-3)
    assert report.done == ["y.h5"]
    volume, voxel_size = read_nifti(tmp_path / "out/y.nii.gz")
    assert volume.shape == (1, 32, 32) or volume.shape == (32, 32)
    assert voxel_size == pytest.approx((5.0, 10.0, 10.0))
    assert error(volume.reshape(32, 32).abs(), image[0].abs()) < 0.15


def test_a_fully_sampled_scan_is_undersampled_to_simulate(tmp_path, mri):
    image, kspace, _ = brain(2)
    kspace_files.write_fastmri(tmp_path / "full.h5", 5 * kspace.numpy())
    kspace_files.write_fastmri(tmp_path / "few.h5", kspace.numpy() * lines())
    report = reconstruct(mri, [tmp_path / "full.h5", tmp_path / "few.h5"], tmp_path / "out", simulate=True)
    assert report.done == ["full.h5"], report.failed
    assert "samples are missing: it cannot be measured anew" in report.failed["few.h5"]
    assert report.quality["psnr"] > report.quality["psnr_start"]
    assert error(np.abs(np.load(tmp_path / "out/full.npy")), 5 * image.abs()) < 0.2


def test_complex_images_and_formats_that_hold_none(tmp_path, mri):
    path = save(tmp_path / "y.npy", brain()[1][0])
    for kind in ("tiff", "png", "dicom"):
        with pytest.raises(
            InputError, match=f"{kind} cannot hold the complex images of y.npy; say which part"
        ):
            reconstruct(mri, path, tmp_path / "out", format=kind)
    assert not (tmp_path / "out").exists()
    reconstruct(mri, path, tmp_path / "whole")
    image = np.load(tmp_path / "whole/y.npy")
    for part, function in (("magnitude", np.abs), ("phase", np.angle), ("imaginary", np.imag)):
        reconstruct(mri, path, tmp_path / part, part=part)
        np.testing.assert_allclose(
            tifffile.imread(tmp_path / part / "y.tif"), function(image), rtol=0, atol=1e-5
        )


# ------------------------------------------------------------------ diffraction tomography


def test_intensities(tmp_path, checkpoints):
    checkpoint = checkpoints("idt")
    _, scan, _, _ = load_model(checkpoint)
    operator = scan.operator((3, 16, 16))
    truth = cell_like(1, (3, 16, 16), torch.Generator().manual_seed(0))
    y = operator(truth / 0.01)
    path = save(tmp_path / "y.npy", y[0])
    assert reconstruct(checkpoint, path, tmp_path / "out").failed == {}
    found = np.load(tmp_path / "out/y.npy")
    assert found.shape == (3, 16, 16)
    assert error(operator(torch.from_numpy(found)[None] / 0.01), y) < 0.3
    save(tmp_path / "volume.npy", truth[0])
    report = reconstruct(checkpoint, tmp_path / "volume.npy", tmp_path / "simulated", simulate=True)
    assert np.isfinite(report.quality["psnr"])
    with pytest.raises(InputError, match=r"measurements must be \(L, H, W\) = \(8, 16, 16\)"):
        reconstruct(checkpoint, save(tmp_path / "few.npy", y[0, :5]), tmp_path / "new")
    several = save(tmp_path / "several.npy", torch.cat([y, y]))
    for kind, names in (("tiff", 2), ("png", 6)):
        reconstruct(checkpoint, several, tmp_path / kind, format=kind, part="real")
        assert len(ledger(tmp_path / kind)["several.npy"]["outputs"]) == names
    # As a camera has it.
    raw = save(tmp_path / "raw.npy", 300 * (1 + y[0]))
    assert reconstruct(checkpoint, raw, tmp_path / "raw", normalize=True).failed == {}


# ------------------------------------------------------------------ what fails


def test_what_is_damaged_is_listed_and_the_rest_done(tmp_path, ct, capsys):
    y = sinograms(3)
    for k in range(3):
        save(tmp_path / f"in/good{k}.npy", y[k])
    whole = (tmp_path / "in/good0.npy").read_bytes()
    (tmp_path / "in/short.npy").write_bytes(whole[:-100])
    (tmp_path / "in/header.npy").write_bytes(b"\x93NUMPY" + bytes(200))
    (tmp_path / "in/empty.tif").write_bytes(b"")
    bad = y[0].clone()
    bad[3, 4] = torch.nan
    save(tmp_path / "in/nan.npy", bad)
    save(tmp_path / "in/size.npy", y[0, :, :-1])
    status = main(
        ["reconstruct", str(ct), str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--batch", "2"]
    )
    assert status == 1
    failed = dict(line.split("\t") for line in (tmp_path / "out/failed.txt").read_text().splitlines())
    assert set(failed) == {"short.npy", "header.npy", "empty.tif", "nan.npy", "size.npy"}
    assert failed["empty.tif"] == "the file is empty"
    assert "value (3, 4) is nan" in failed["nan.npy"]
    assert "measurements must be (V, D)" in failed["size.npy"]
    assert {p.name for p in (tmp_path / "out").glob("*.tif")} == {f"good{k}.tif" for k in range(3)}
    captured = capsys.readouterr()
    assert "Reconstructed 3 of 8 files" in captured.out
    for name, reason in failed.items():
        assert f"oder-fast: failed: {name}: {reason}" in captured.err
    # Once mended, only the mended ones are done, and nothing is listed any more.
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.tif")}
    for name in failed:
        (tmp_path / "in" / name).unlink()
    save(tmp_path / "in/nan.npy", y[0])
    report = reconstruct(ct, tmp_path / "in", tmp_path / "out")
    assert (report.done, sorted(report.skipped)) == (["nan.npy"], [f"good{k}.npy" for k in range(3)])
    assert not (tmp_path / "out/failed.txt").exists()
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == at for name, at in before.items())


def test_an_image_that_diverges_takes_no_others_with_it(tmp_path, ct, monkeypatch):
    for k in range(4):
        save(tmp_path / f"in/{k}.npy", sinograms(4)[k])
    solve, seen = reconstruction._Run.solve, []

    def diverging(self, items):
        seen.append(len(items))
        if any(item.job.name == "2.npy" for item in items):
            raise DivergenceError("it diverged")
        return solve(self, items)

    monkeypatch.setattr(reconstruction._Run, "solve", diverging)
    report = reconstruct(ct, tmp_path / "in", tmp_path / "out", batch=3)
    assert seen == [3, 1, 1, 1, 1]
    assert report.failed == {"2.npy": "it diverged"}
    assert report.done == ["0.npy", "1.npy", "3.npy"]


def test_an_error_that_nobody_thought_of_is_that_of_one_file(tmp_path, ct, monkeypatch):
    for k in range(3):
        save(tmp_path / f"in/{k}.npy", sinograms(3)[k])
    read = reconstruction._Run.read

    def failing(self, job, chunk):
        if job.name == "1.npy":
            raise KeyError("tag")
        return read(self, job, chunk)

    monkeypatch.setattr(reconstruction._Run, "read", failing)
    report = reconstruct(ct, tmp_path / "in", tmp_path / "out")
    assert (report.done, report.failed) == (["0.npy", "2.npy"], {"1.npy": "KeyError: 'tag'"})


def test_data_that_no_solver_can_take(tmp_path, ct):
    y = sinograms(2)
    save(tmp_path / "in/huge.npy", 1e20 * y[0])
    save(tmp_path / "in/fine.npy", y[1])
    report = reconstruct(ct, tmp_path / "in", tmp_path / "out", scale="none")
    assert report.done == ["fine.npy"]
    assert "give it in another unit" in report.failed["huge.npy"]


def test_what_did_not_converge_is_told(tmp_path, ct, capsys):
    save(tmp_path / "y.npy", sinograms(1)[0])
    call = ["reconstruct", str(ct), str(tmp_path / "y.npy"), "--output", str(tmp_path / "out")]
    assert main([*call, "--max-iterations", "3", "--tolerance", "1e-6"]) == 0
    assert "1 did not converge (raise --max-iterations or --tolerance): y.npy" in capsys.readouterr().err
    assert ledger(tmp_path / "out")["y.npy"]["converged"] is False


@pytest.mark.parametrize("where", ["write_image", "add"])
def test_a_full_disk_ends_the_run(tmp_path, ct, monkeypatch, where, capsys):
    for k in range(4):
        save(tmp_path / f"in/{k}.npy", sinograms(4)[k])
    target = reconstruction if where == "write_image" else ledgers.Ledger
    real, calls = getattr(target, where), []

    def full(*args, **options):
        calls.append(1)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **options)

    call = ["reconstruct", str(ct), str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--batch", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(target, where, full)
        with pytest.raises(RunError, match="No space left on device; the same command goes on from here"):
            reconstruct(ct, tmp_path / "in", tmp_path / "other", batch=1)
        calls.clear()
        assert main(call) == 1
    assert "No space left" in capsys.readouterr().err
    assert list(ledger(tmp_path / "out")) == ["0.npy"]
    assert main(call) == 0
    assert "Reconstructed 3 of 4 files, 1 were done before" in capsys.readouterr().out


# ------------------------------------------------------------------ going on


KILLED_AFTER_THREE = """
import os, signal, sys
from oder_fast.cli import main
from oder_fast.reconstruction.ledger import Ledger
append = Ledger._append_text
lines = 0
def dying(self, text):
    global lines
    append(self, text)
    lines += 1
    if lines == 4:  # the first line is of the run
        os.kill(os.getpid(), signal.SIGKILL)
Ledger._append_text = dying
main(sys.argv[1:])
"""


@pytest.mark.exhaustive
def test_a_killed_run_goes_on_where_it_was(tmp_path, ct):
    y = sinograms(2)
    for k in range(12):
        save(tmp_path / f"in/{k:02d}.npy", y[k % 2])
    out = tmp_path / "out"
    options = ["--batch", "1"]
    call = [
        sys.executable,
        "-c",
        KILLED_AFTER_THREE,
        "reconstruct",
        ct,
        tmp_path / "in",
        "--output",
        out,
        *options,
    ]
    run = subprocess.run(
        [str(a) for a in call],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    # What was being written, and a line cut short.
    (out / ".07-0123456789abcdef.tif").write_bytes(b"half")
    with (out / "reconstructed.jsonl").open("a") as file:
        file.write('{"file": "11.n')
    killed = [line for line in (out / "reconstructed.jsonl").read_text().splitlines()[1:-1]]
    finished = [json.loads(line)["file"] for line in killed]
    assert len(finished) == 3
    at = {name: (out / name).with_suffix(".tif").stat().st_mtime_ns for name in finished}
    report = reconstruct(ct, tmp_path / "in", out, batch=1)
    assert sorted(report.skipped) == sorted(finished)
    assert sorted(report.done + report.skipped) == [f"{k:02d}.npy" for k in range(12)]
    assert tree(out) == sorted([*(f"{k:02d}.tif" for k in range(12)), "reconstructed.jsonl"])
    assert all((out / name).with_suffix(".tif").stat().st_mtime_ns == t for name, t in at.items())
    images = [tifffile.imread(out / f"{k:02d}.tif") for k in range(12)]
    for k, image in enumerate(images):
        np.testing.assert_array_equal(image, images[k % 2])
    again = reconstruct(ct, tmp_path / "in", out)
    assert (again.done, len(again.skipped)) == ([], 12)


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: bytes(len(b)), lambda b: b""])
def test_an_output_that_was_damaged_is_done_again(tmp_path, ct, damage):
    for k in range(2):
        save(tmp_path / f"in/{k}.npy", sinograms(2)[k])
    reconstruct(ct, tmp_path / "in", tmp_path / "out", batch=1)
    path = tmp_path / "out/1.tif"
    before = path.read_bytes()
    path.write_bytes(damage(before))
    report = reconstruct(ct, tmp_path / "in", tmp_path / "out", batch=1)
    assert (report.done, report.skipped) == (["1.npy"], ["0.npy"])
    np.testing.assert_array_equal(tifffile.imread(path), tifffile.imread(io.BytesIO(before)))


@pytest.mark.parametrize(
    "damage",
    [
        "[]",
        "3",
        '{"file": "0.npy"}',
        '{"file": "0.npy", "outputs": [], "digests": []}',
        "[" * 100_000,
        "1" * 5000,
        "\udcff\0",
    ],
)
def test_lines_of_a_ledger_that_are_damaged_are_done_again(tmp_path, ct, damage):
    for k in range(2):
        save(tmp_path / f"in/{k}.npy", sinograms(2)[k])
    reconstruct(ct, tmp_path / "in", tmp_path / "out", batch=1)
    path = tmp_path / "out/reconstructed.jsonl"
    head, _, second, _ = path.read_text().split("\n")
    path.write_bytes(os.fsencode("\n".join((head, damage, second))))
    report = reconstruct(ct, tmp_path / "in", tmp_path / "out", batch=1)
    assert (report.done, report.skipped) == (["0.npy"], ["1.npy"])


@pytest.mark.parametrize("damage", ["[]", "\udcff\0"])
def test_a_ledger_without_its_first_line_stays_as_it_is(tmp_path, ct, damage):
    file = save(tmp_path / "y.npy", sinograms(1)[0])
    reconstruct(ct, file, tmp_path / "out")
    path = tmp_path / "out/reconstructed.jsonl"
    head, first, _ = path.read_text().split("\n")
    path.write_bytes(os.fsencode("\n".join((damage, first, ""))))
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"jsonl: its first line, .* is damaged; choose another output"):
        reconstruct(ct, file, tmp_path / "out")
    assert path.read_bytes() == before
    assert reconstruct(ct, file, tmp_path / "out", overwrite=True).done == ["y.npy"]
    # What a crash left of the first line.
    path.write_text(head[:20])
    assert reconstruct(ct, file, tmp_path / "out").done == ["y.npy"]


def test_what_is_in_a_folder_of_something_else_stays(tmp_path, ct):
    path = save(tmp_path / "y.npy", sinograms(1)[0])
    (tmp_path / "out").mkdir()
    (tmp_path / "out/reconstructed.jsonl").write_text("of another program\n")
    (tmp_path / "out/.keys-0123456789abcdef.txt").write_text("mine")
    with pytest.raises(InputError, match="is damaged"):
        reconstruct(ct, path, tmp_path / "out")
    assert tree(tmp_path / "out") == [".keys-0123456789abcdef.txt", "reconstructed.jsonl"]


def test_an_output_folder_that_is_removed(tmp_path, ct, monkeypatch):
    for k in range(3):
        save(tmp_path / f"in/{k}.npy", sinograms(3)[k])
    solve, seen = reconstruction._Run.solve, []

    def removing(self, items):
        seen.append(1)
        if len(seen) == 2:
            shutil.rmtree(tmp_path / "out")
        return solve(self, items)

    with monkeypatch.context() as patch:
        patch.setattr(reconstruction._Run, "solve", removing)
        with pytest.raises(RunError, match="out: was removed while the run wrote to it"):
            reconstruct(ct, tmp_path / "in", tmp_path / "out", batch=1)
    assert len(reconstruct(ct, tmp_path / "in", tmp_path / "out").done) == 3


NAMES = [
    os.fsdecode(b"h\xe9las"),
    "two\nlines",
    "tab\there",
    "back\\slash",
    "\x1b[31mred",
    "\u2028",
    "漢字 é",
    '"',
]


def recovered(text):
    return text.encode("latin-1", "backslashreplace").decode("unicode_escape")


def test_names_of_any_bytes(tmp_path, ct, capsys):
    y = sinograms(1)[0]
    for name in NAMES:
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"bad {name}.npy").write_bytes(b"junk")
        np.save(tmp_path / "in" / f"good {name}.npy", y)
    call = ["reconstruct", str(ct), str(tmp_path / "in"), "--output", str(tmp_path / NAMES[0])]
    assert main(call) == 1
    assert all(line.isprintable() for line in capsys.readouterr().err.rpartition("\r")[2].splitlines())
    lines = (tmp_path / NAMES[0] / "failed.txt").read_text(encoding="utf-8").splitlines()
    assert sorted(recovered(line.split("\t")[0]) for line in lines) == sorted(f"bad {n}.npy" for n in NAMES)
    assert main(call) == 1
    assert (
        f"Reconstructed 0 of {2 * len(NAMES)} files, {len(NAMES)} were done before" in capsys.readouterr().out
    )
    assert {p.name for p in (tmp_path / NAMES[0]).glob("*.tif")} == {f"good {n}.tif" for n in NAMES}


def test_names_of_any_bytes_in_the_table_of_quality(tmp_path, ct):
    for name in NAMES[:2]:
        save(tmp_path / f"in/{name}.npy", ellipses(1)[0])
    reconstruct(ct, tmp_path / "in", tmp_path / "out", simulate=True)
    lines = (tmp_path / "out/quality.csv").read_text(encoding="utf-8").splitlines()
    assert {recovered(line.split(",")[0]) for line in lines[1:3]} == {f"{n}.npy" for n in NAMES[:2]}


def test_names_as_long_as_a_file_system_takes(tmp_path, ct):
    long = "é" * 100 + "n" * 51
    save(tmp_path / f"in/{long}.npy", sinograms(1)[0])
    save(tmp_path / "in/short.npy", sinograms(1)[0])
    assert len(os.fsencode(f"{long}.npy")) == 255
    assert reconstruct(ct, tmp_path / "in", tmp_path / "out").failed == {}
    report = reconstruct(ct, tmp_path / "in", tmp_path / "nifti", format="nifti")
    assert report.done == ["short.npy"]
    assert "File name too long" in report.failed[f"{long}.npy"]
    assert (tmp_path / "nifti/failed.txt").read_text(encoding="utf-8").startswith(f"{long}.npy\t")


def test_files_of_one_name_that_fail_are_both_listed(tmp_path, ct):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.npy").write_bytes(b"junk")
    good = save(tmp_path / "y.npy", sinograms(1)[0])
    report = reconstruct(ct, [tmp_path / "a", tmp_path / "b", good], tmp_path / "out")
    assert [*report.failed] == ["x.npy", str(tmp_path / "b/x.npy")]


def test_interrupted(tmp_path, ct, monkeypatch, capsys):
    for k in range(3):
        save(tmp_path / f"in/{k}.npy", sinograms(3)[k])
    solve, seen = reconstruction._Run.solve, []

    def interrupted(self, items):
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return solve(self, items)

    call = ["reconstruct", str(ct), str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--batch", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(reconstruction._Run, "solve", interrupted)
        assert main(call) == 130
    assert tree(tmp_path / "out") == ["0.tif", "reconstructed.jsonl"]
    assert main(call) == 0
    assert "Reconstructed 2 of 3 files, 1 were done before" in capsys.readouterr().out


def test_what_changed_is_done_again(tmp_path, ct):
    y = sinograms(3)
    for k in range(3):
        save(tmp_path / f"in/{k}.npy", y[k])
    reconstruct(ct, tmp_path / "in", tmp_path / "out")
    save(tmp_path / "in/0.npy", 2 * y[0])
    os.utime(tmp_path / "in/0.npy", ns=(1, 1))
    (tmp_path / "out/1.tif").unlink()
    report = reconstruct(ct, tmp_path / "in", tmp_path / "out", batch=1, workers=1)
    assert (report.done, report.skipped) == (["0.npy", "1.npy"], ["2.npy"])


def test_another_checkpoint_or_other_settings_are_refused(tmp_path, ct):
    path = save(tmp_path / "y.npy", sinograms(1)[0])
    other = tmp_path / "other.pt"
    state = torch.load(ct, weights_only=True)
    torch.save({**state, "position": {**state["position"], "seconds": 1e9}}, other)
    reconstruct(ct, path, tmp_path / "out")
    before = (tmp_path / "out/y.tif").read_bytes()
    with pytest.raises(
        InputError, match=r"holds reconstructions by another checkpoint; choose another .*--overwrite"
    ):
        reconstruct(other, path, tmp_path / "out")
    with pytest.raises(
        InputError, match=r"other settings: tolerance was 0\.0001 and is 0\.01; choose another"
    ):
        reconstruct(ct, path, tmp_path / "out", tolerance=1e-2)
    assert (tmp_path / "out/y.tif").read_bytes() == before
    assert reconstruct(ct, path, tmp_path / "out").skipped == ["y.npy"]
    assert reconstruct(other, path, tmp_path / "out", tolerance=1e-1, overwrite=True).done == ["y.npy"]
    assert (tmp_path / "out/y.tif").read_bytes() != before
    assert reconstruct(other, path, tmp_path / "out", tolerance=1e-1).skipped == ["y.npy"]


def test_two_runs_do_not_write_to_one_folder(tmp_path, ct):
    path = save(tmp_path / "y.npy", sinograms(1)[0])
    (tmp_path / "out").mkdir()
    with (tmp_path / "out/reconstructed.jsonl").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another run is writing to it"):
            reconstruct(ct, path, tmp_path / "out")
    assert reconstruct(ct, path, tmp_path / "out").done == ["y.npy"]


# ------------------------------------------------------------------ before anything long starts


def damaged(path, folder):
    content = bytearray(path.read_bytes())
    middle = slice(len(content) // 2, len(content) // 2 + 400)
    content[middle] = bytes(b ^ 0xFF for b in content[middle])
    (folder / "damaged.pt").write_bytes(content)
    return folder / "damaged.pt"


def of_another_architecture(path, folder):
    state = torch.load(path, weights_only=True)
    state["configuration"]["denoiser"]["options"]["width"] = 8
    torch.save(state, folder / "other.pt")
    return folder / "other.pt"


def test_bad_checkpoints(tmp_path, ct, capsys):
    path = save(tmp_path / "y.npy", sinograms(1)[0])
    for checkpoint, kind, message in (
        (damaged(ct, tmp_path), CheckpointError, "damaged"),
        (of_another_architecture(ct, tmp_path), ConfigurationError, "its weights do not fit"),
        (path, CheckpointError, "not a checkpoint"),
        (tmp_path / "missing.pt", FileNotFoundError, "missing.pt"),
    ):
        with pytest.raises(kind, match=message):
            reconstruct(checkpoint, path, tmp_path / "out")
        assert main(["reconstruct", str(checkpoint), str(path), "--output", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--output=", "--maps="])
def test_empty_names_are_refused(tmp_path, ct, capsys, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path / "y.npy", sinograms(1)[0])
    with pytest.raises(SystemExit) as stop:
        main(["reconstruct", str(ct), "y.npy", "--output", "out", option])
    assert stop.value.code == 2
    assert "must not be empty" in capsys.readouterr().err
    for inputs, output in ((path, ""), ("", tmp_path / "out"), ([""], tmp_path / "out")):
        with pytest.raises(InputError, match="must be names of files and folders, got ''"):
            reconstruct(ct, inputs, output)
    assert [p.name for p in tmp_path.iterdir()] == ["y.npy"]


def test_bad_inputs(tmp_path, ct, mri):
    y = sinograms(1)[0]
    good = save(tmp_path / "y.npy", y)
    image = save(tmp_path / "image.npy", ellipses(1)[0])
    dicom = Path(get_testdata_file("CT_small.dcm"))
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing/notes.txt").write_text("no data")
    for inputs, options, message in (
        ([good, tmp_path / "a.npy", tmp_path / "b.npy"], {}, r"no such file or folder: .*a\.npy, .*b\.npy"),
        ([tmp_path / "nothing"], {}, "no file of a known kind in"),
        ([], {}, "no file of a known kind in nothing"),
        (dicom, {}, r"it holds images; give --simulate"),
        (
            image,
            {},
            r"must be \(V, D\) = \(16, 35\) .* got \(24, 24\); .*\(or it holds images; give --simulate",
        ),
        (
            good,
            {"image_size": (30, 30)},
            r"\(16, 43\) .* for images of 30 by 30, got \(16, 35\); the run.s geometry is fixed",
        ),
        (good, {"image_size": (0, 30)}, "image_size: must be rows and columns"),
        (good, {"format": "jpg"}, "format: must be one of dicom, tiff, png, npy, npz, nifti, got 'jpg'"),
        (good, {"part": "phase"}, r"the images of y\.npy are real, they have no phase part"),
        (good, {"scale": (1.0, 1.0)}, "a window must be"),
        (good, {"scale": "all"}, "scale: must be slice, none or a window"),
        (good, {"batch": 0}, "batch: must be at least 1"),
        (good, {"minibatch": 99}, "minibatch: must be at most the 16 blocks, got 99"),
        (good, {"normalize": True}, "normalize: is for intensities"),
        (good, {"maps": good}, "coil maps must be complex|maps: is for k-space"),
    ):
        with pytest.raises(InputError, match=message):
            reconstruct(ct, inputs, tmp_path / "out", **options)
    with pytest.raises(InputError, match="its k-space is float32, not complex"):
        reconstruct(mri, good, tmp_path / "out")
    with pytest.raises(InputError, match="its images are complex, and this model's are real"):
        reconstruct(ct, save(tmp_path / "z.npy", torch.ones(8, 8) * 1j), tmp_path / "out", simulate=True)
    with pytest.raises(ConfigurationError, match="tolerance"):
        reconstruct(ct, good, tmp_path / "out", tolerance=-1.0)
    with pytest.raises(ValueError, match="nowhere"):
        reconstruct(ct, good, tmp_path / "out", device="nowhere")
    assert not (tmp_path / "out").exists()


def test_output_that_cannot_be_written(tmp_path, ct):
    good = save(tmp_path / "in/y.tif.npy", sinograms(1)[0])
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        reconstruct(ct, good, tmp_path / "file")
    assert main(["reconstruct", str(ct), str(good), "--output", str(tmp_path / "file")]) == 2
    with pytest.raises(OSError, match="proc"):
        reconstruct(ct, good, "/proc/out")
    with pytest.raises(InputError, match="is an input too"):
        reconstruct(ct, tmp_path / "in", tmp_path / "in")
    tifffile.imwrite(tmp_path / "in/z.tif", sinograms(1)[0].numpy())
    with pytest.raises(InputError, match="would overwrite the input"):
        reconstruct(ct, tmp_path / "in/z.tif", tmp_path / "in")
    # In a folder below it is left alone.
    assert len(reconstruct(ct, tmp_path / "in", tmp_path / "in/out").done) == 2
    assert len(reconstruct(ct, tmp_path / "in", tmp_path / "in/out").skipped) == 2


def test_names_do_not_meet(tmp_path, ct):
    y = sinograms(1)[0]
    save(tmp_path / "in/a.npy", y)
    tifffile.imwrite(tmp_path / "in/a.tif", y.numpy())
    reconstruct(ct, tmp_path / "in", tmp_path / "out")
    assert tree(tmp_path / "out") == ["a.npy.tif", "a.tif.tif", "reconstructed.jsonl"]
    save(tmp_path / "other/a.npy", y)
    with pytest.raises(InputError, match="would be written to the same name"):
        reconstruct(ct, [tmp_path / "in/a.npy", tmp_path / "other/a.npy"], tmp_path / "two")
    save(tmp_path / "slices/a.npy", torch.stack([y, y]))
    save(tmp_path / "slices/a-0001.npy", y)
    assert len(reconstruct(ct, tmp_path / "slices", tmp_path / "volumes").done) == 2
    with pytest.raises(InputError, match=r"would be written to the same name, a-0001\.png"):
        reconstruct(ct, tmp_path / "slices", tmp_path / "pages", format="png")


def test_command(tmp_path, ct, capsys):
    save(tmp_path / "image.npy", ellipses(1)[0])
    call = [
        "reconstruct",
        str(ct),
        str(tmp_path / "image.npy"),
        "--output",
        str(tmp_path / "out"),
        "--simulate",
    ]
    options = ["--format", "npz", "--scale", "0:1", "--minibatch", "0", "--threads", "1", "--workers", "1"]
    assert main([*call, *options, "--device", "cpu"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"Reconstructed 1 of 1 files. Wrote {tmp_path / 'out'}"
    assert said[1].startswith("PSNR ")
    head = json.loads((tmp_path / "out/reconstructed.jsonl").read_text().splitlines()[0])
    assert head["settings"] | {"scale": [0.0, 1.0], "minibatch": None, "format": "npz"} == head["settings"]
    with pytest.raises(SystemExit) as stopped:
        main([*call, "--scale", "half"])
    assert stopped.value.code == 2
    assert "must be slice, none or LOW:HIGH, got 'half'" in capsys.readouterr().err


def test_empty_slices_become_zeros_and_are_not_compared(tmp_path, ct, mri):
    truths = ellipses(3)
    truths[1] = 0
    save(tmp_path / "volume.npy", truths)
    report = reconstruct(ct, tmp_path / "volume.npy", tmp_path / "study", simulate=True)
    assert report.failed == {}
    images = tifffile.imread(tmp_path / "study/volume.tif")
    assert not images[1].any()
    assert images[0].any()
    name, count, quality, *_ = (tmp_path / "study/quality.csv").read_text().splitlines()[1].split(",")
    assert (name, count) == ("volume.npy", "2")
    assert float(quality) > 0

    _, kspace, _ = brain(2)
    kspace = torch.as_tensor(kspace).clone()
    kspace[0] = 0
    save(tmp_path / "scan.npy", kspace)
    report = reconstruct(mri, tmp_path / "scan.npy", tmp_path / "mr", part="magnitude")
    assert report.failed == {}
    found = tifffile.imread(tmp_path / "mr/scan.tif")
    assert not found[0].any()
    assert found[1].any()
    assert report.notes == {"scan.npy": "1 of 2 images without signal, which became 0"}
    # With a mask in the file, too.
    np.savez(tmp_path / "masked.npz", kspace=kspace, mask=np.ones(32))
    report = reconstruct(mri, tmp_path / "masked.npz", tmp_path / "mr", part="magnitude")
    assert report.notes == {"masked.npz": "1 of 2 images without signal, which became 0"}


def test_echoes_are_reconstructed_or_selected(tmp_path, mri, capsys):
    _, kspace, _ = brain(2)
    values = kspace[0].numpy()
    xml = kspace_files.header((32, 32, 1), (320.0, 320.0, 5.0), center=16).replace(
        "<x>160.0</x>", "<x>320.0</x>"
    )
    acquisitions = [
        one
        for k in range(2)
        for one in kspace_files.scan_lines((k + 1) * values, range(32), contrast=k, average=k)
    ]
    kspace_files.write_ismrmrd(tmp_path / "scan.h5", [*acquisitions, acquisitions[0]], xml)
    # One at a time: on some processors torch's convolutions of a batch have other bits.
    report = reconstruct(mri, tmp_path / "scan.h5", tmp_path / "all", batch=1)
    assert report.done == ["scan.h5[contrast=0]", "scan.h5[contrast=1]"]
    assert report.notes == {"scan.h5[contrast=0]": "2 measurements of a line averaged, at most"}
    first, second = (np.load(tmp_path / f"all/scan-contrast{k}.npy") for k in range(2))
    np.testing.assert_allclose(second, 2 * first, rtol=0, atol=0.02 * np.abs(second).max())
    assert reconstruct(mri, tmp_path / "scan.h5", tmp_path / "all", batch=1).skipped == report.done
    arguments = ["reconstruct", mri, tmp_path / "scan.h5", "--batch", "1", "--output", tmp_path / "one"]
    assert main([*map(str, arguments), "--select", "contrast=1"]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "one/scan.npy"), second)
    assert main([*map(str, arguments[:-1]), str(tmp_path / "two"), "--select", "contrast=2"]) == 2
    assert "scan.h5: it has no contrast 2, only: 0, 1" in capsys.readouterr().err


def test_a_folder_of_images_of_leds_is_one_file(tmp_path, checkpoints):
    checkpoint = checkpoints("idt")
    operator = load_model(checkpoint)[1].operator((3, 16, 16))
    y = operator(cell_like(1, (3, 16, 16), generator=torch.Generator().manual_seed(1)))[0]
    save(tmp_path / "stack.npy", y)
    for folder in ("in/leds", "in/fewer"):
        (tmp_path / folder).mkdir(parents=True)
        for k, image in enumerate(y.numpy() if folder == "in/leds" else y[:7].numpy()):
            tifffile.imwrite(tmp_path / folder / f"ring0_led{k:02}.tif", image)
    # All images of a scan in one file, whatever its name.
    tifffile.imwrite(tmp_path / "in/day1_scan2.tif", y.numpy())
    report = reconstruct(checkpoint, tmp_path / "in", tmp_path / "out")
    assert sorted(report.done) == ["day1_scan2.tif", "leds"]
    assert report.failed["fewer"].startswith("measurements must be images (L, H, W) = (8, 16, 16) of LEDs")
    assert report.notes["leds"].startswith("8 images of LEDs")
    reconstruct(checkpoint, tmp_path / "stack.npy", tmp_path / "out2")
    expected = np.load(tmp_path / "out2/stack.npy")
    for name in ("leds", "day1_scan2"):
        np.testing.assert_allclose(np.load(tmp_path / f"out/{name}.npy"), expected, rtol=1e-4, atol=1e-6)
    reconstruct(checkpoint, tmp_path / "in/leds", tmp_path / "out3")
    assert (tmp_path / "out3/leds.npy").exists()


def test_the_magnitude_of_real_images_keeps_their_sign(tmp_path, ct):
    y = sinograms(1)[0]
    save(tmp_path / "y.npy", y)
    reconstruct(ct, tmp_path / "y.npy", tmp_path / "plain", scale=(-1.0, 1.0))
    reconstruct(ct, tmp_path / "y.npy", tmp_path / "part", scale=(-1.0, 1.0), part="magnitude")
    one, other = (tifffile.imread(tmp_path / f"{name}/y.tif") for name in ("plain", "part"))
    assert one.min() < 0
    np.testing.assert_array_equal(one, other)
