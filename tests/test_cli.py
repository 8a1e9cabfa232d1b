import functools
import io
import os
import re
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom.examples
import pytest
import torch
from PIL import Image

from oder_fast import DnCNN, __version__, model_card, pretrained
from oder_fast._demo import common, ct, idt, mri
from oder_fast.cli import main
from oder_fast.data import write_nifti

FILES = {"figure.png", "arrays.npz", "denoiser.pt"}
TINY = ["--train", "--steps", "2", "--fixed-point-steps", "1", "--views", "9"]
METHODS = [
    "FBP, ramp",
    "FBP, shepp-logan",
    "FBP, cosine",
    "FBP, hann",
    "Total variation, weight",
    "RED, all 9",
    "ODER, 3 of 9",
]


def command(*arguments):
    return [sys.executable, "-m", "oder_fast.cli", *map(str, arguments)]


def call(*arguments):
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=600)


class Ran(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run_demo(*arguments):
    """Run a demonstration here, its solves cut short: networks that have not learned do not contract."""
    out, err, threads = io.StringIO(), io.StringIO(), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(common, "RED_ITERATIONS", 6)
        patch.setattr(common, "ODER_ITERATIONS", 9)
        patch.setattr(common, "SMOOTH_SOLVES", 3)
        patch.setattr(common, "TAU_SOLVES", 3)
        patch.setattr(common, "SMOOTH_ITERATIONS", 6)
        patch.setattr(idt, "TRAINING_VOLUMES", 6)
        # The training's own report goes with its folder, and takes longer than the demonstration to draw.
        patch.setattr("oder_fast.training.trainer.write_report", lambda *_, **__: None)
        status = main(["demo", *map(str, arguments)])
    torch.set_num_threads(threads)
    return Ran(status, out.getvalue(), err.getvalue())


def disc(folder, height=20, width=24):
    y, x = np.mgrid[:height, :width]
    path = folder / "disc.npy"
    np.save(path, 3.0 * ((y - height / 2) ** 2 + (x - width / 2) ** 2 < 64) + 0.5 * (x > 10))
    return path


def demonstrations(folder, arguments, extras):
    """Return a function that runs one of several demonstrations when it is first asked for."""

    @functools.cache
    def demonstrate(which):
        output = folder / "a" / which
        return output, run_demo(*arguments, "--output", output, *extras[which])

    return demonstrate


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Two runs of the same demonstration on a tiny image, in the same seed."""
    folder = tmp_path_factory.mktemp("demo")
    return demonstrations(folder, ["--input", disc(folder), *TINY], {"first": [], "second": []})


def test_demo_prints_the_table(demo):
    _, run = demo("first")
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0].split() == [
        "method",
        "PSNR",
        "(dB)",
        "SSIM",
        "seconds",
        *["denoiser", "calls", "operator", "calls"],
    ]
    for line, method in zip(lines[1:8], METHODS, strict=True):
        assert line.startswith(method)
        quality, similarity, seconds, *calls = line.split()[-5:]
        assert 5 < float(quality) < 60
        assert -1 <= float(similarity) <= 1
        assert float(seconds) >= 0
        assert calls == ["-", "-"] if method.startswith("FBP") else min(map(int, calls)) > 0
    assert re.fullmatch(
        r"RED is \S+ dB from FBP, \S+; \S+ dB from Total variation, weight \S+; \S+ dB from ODER, 3 of 9 views a step.",
        lines[8],
    )
    assert lines[9].startswith("Within the largest circle")
    assert lines[-1].startswith("Wrote ")
    for line, name in zip(lines[6:8], ("RED", "ODER"), strict=True):
        calls = line.split()[-2]
        cut_short = any(
            f"{name} ended after {calls} denoiser calls, its largest" in later for later in lines[10:]
        )
        assert cut_short == (calls == {"RED": "6", "ODER": "9"}[name])


def test_demo_shows_its_progress(demo):
    _, run = demo("first")
    for text in (
        "20 x 24 pixels, 9 views, 50 dB; 3 views a step",
        "pre-training",
        "training through the fixed point",
        "2/2",
        "step/s",
        "loss=",
    ):
        assert text in run.stderr
    assert "Warning" not in run.stderr


def test_demo_writes_whole_files_and_nothing_else(demo):
    folder, _ = demo("first")
    assert {path.name for path in folder.iterdir()} == FILES
    with Image.open(folder / "figure.png") as figure:
        figure.load()
        assert min(figure.size) > 1000
        assert len(set(figure.convert("L").resize((64, 64)).tobytes())) > 20
    with np.load(folder / "arrays.npz") as arrays:
        shapes = {name: arrays[name].shape for name in arrays.files}
        assert all(np.isfinite(arrays[name]).all() for name in arrays.files)
        assert arrays["truth"].min() == 0
        assert arrays["truth"].max() == 1
        assert arrays["red"].min() >= 0
    images = dict.fromkeys(("truth", "fbp", "total_variation", "red", "oder"), (20, 24))
    assert shapes == {**images, "sinogram": (9, 33)}
    saved = torch.load(folder / "denoiser.pt", weights_only=True)
    DnCNN(**saved["arguments"]).load_state_dict(saved["state_dict"])


@pytest.mark.exhaustive
def test_the_same_seed_gives_the_same_numbers(demo):
    (first, one), (second, other) = demo("first"), demo("second")
    assert {path.name for path in second.iterdir()} == FILES

    def numbers(run):
        return [line.split()[:-3] + line.split()[-2:] for line in run.stdout.splitlines()[:7]]

    assert numbers(one) == numbers(other)
    with np.load(first / "arrays.npz") as a, np.load(second / "arrays.npz") as b:
        assert all(np.array_equal(a[name], b[name]) for name in a.files)


SMALL = {
    "ct": ["--views", "20"],
    "mri": ["--phantom", "--size", "40"],
    "idt": ["--size", "24", "--slices", "3", "--illuminations", "9"],
}


@pytest.mark.parametrize("name", SMALL)
def test_without_training_a_demo_takes_the_denoiser_of_the_package(tmp_path, name):
    scan = [*SMALL[name], *(["--input", disc(tmp_path, 40, 40)] if name == "ct" else [])]
    run = run_demo(name, *scan, "--output", tmp_path / "out")
    assert run.returncode == 0, run.stderr
    assert "step/s" not in run.stderr
    assert f"oder_fast.pretrained('{name}'); --train trains one here" in run.stderr
    assert "The data choose tau/|A|^2 = " in run.stderr
    saved = torch.load(tmp_path / "out/denoiser.pt", weights_only=True)
    assert saved["arguments"] == model_card(name)["denoiser"]["options"]
    for key, value in pretrained(name).denoiser.state_dict().items():
        assert torch.equal(saved["state_dict"][key], value)


@pytest.mark.exhaustive
@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupt_leaves_nothing_broken(tmp_path, existing):
    output = tmp_path / "out"
    if existing:
        output.mkdir()
        (output / "figure.png").write_text("old")
    arguments = ["--input", disc(tmp_path), "--output", output, *TINY, "--steps", 1_000_000]
    with subprocess.Popen(
        command("demo", *arguments),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # A shell that runs the tests in the background has them ignore interrupts, and all they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        seen = b""
        while b"pre-training" not in seen:
            seen += process.stderr.read1()
            assert process.poll() is None, seen
        process.send_signal(signal.SIGINT)
        out, rest = process.communicate(timeout=600)
    assert process.returncode == 130
    assert b"interrupted" in rest
    assert b"Traceback" not in seen + rest
    assert out == b""
    if existing:
        assert [path.name for path in output.iterdir()] == ["figure.png"]
        assert (output / "figure.png").read_text() == "old"
    else:
        assert not output.exists()


def test_an_interrupt_while_writing_leaves_no_temporary_file(tmp_path, monkeypatch, capsys):
    image = torch.rand(16, 16)
    row = common.Row("FBP, ramp", image, image, 20.0, 0.5, 0.0)
    solved = common.Row("RED", image, image, 20.0, 0.5, 0.0, 1, 3.0, (20.0,), (0.1,))
    rows = [row] * 4 + [solved] * 3
    result = ct._result("", rows, torch.rand(16, 16), torch.rand(3, 23), common.Prior(DnCNN(2, 2), 0.1, {}))
    monkeypatch.setattr(ct, "_compute", lambda *_: result)

    def interrupted(network, path):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    assert main(["demo", "--input", str(disc(tmp_path)), "--output", str(tmp_path / "out")]) == 130
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES - {"denoiser.pt"}
    assert "interrupted" in capsys.readouterr().err


@pytest.fixture
def never_computed(monkeypatch):
    def fail(*_):
        raise AssertionError("the input should have been refused")

    for module in (ct, mri, idt):
        monkeypatch.setattr(module, "_compute", fail)


def spoiled(folder, kind):
    path = folder / f"{kind}.npy"
    arrays = {
        "nan": np.full((20, 20), np.nan),
        "constant": np.ones((20, 20)),
        "small": np.eye(15),
        "volume": np.zeros((4, 20, 20)),
    }
    if kind in arrays:
        np.save(path, arrays[kind])
    elif kind == "truncated":
        path.write_bytes(disc(folder).read_bytes()[:1000])
    elif kind == "text":
        path.write_text("not an image")
    return path


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("missing", r"No such file or directory"),
        ("truncated", ""),
        ("text", "not a DICOM, TIFF, PNG, NPY or NPZ file"),
        ("nan", "pixel (0, 0) is nan"),
        ("constant", "all pixels have the same value"),
        ("small", "at least 16 rows and columns, got (15, 15)"),
        ("volume", "not a two-dimensional image"),
    ],
)
def test_bad_images_are_refused_before_anything_starts(tmp_path, capsys, never_computed, kind, reason):
    path = spoiled(tmp_path, kind)
    assert main(["demo", "--input", str(path), "--output", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("oder-fast: ")
    assert err.count("\n") == 1
    assert path.name in err
    assert reason in err
    assert not (tmp_path / "out").exists()


def test_an_array_of_an_npz_file(tmp_path, capsys, never_computed):
    path = tmp_path / "two.npz"
    np.savez(path, a=np.eye(20), b=np.eye(30))
    assert main(["demo", "--input", str(path)]) == 2
    assert "it holds 2 arrays, name one of: a, b" in capsys.readouterr().err
    with pytest.raises(AssertionError, match="refused"):
        main(["demo", "--input", str(path), "--array", "b", "--output", str(tmp_path / "out")])


def test_unwritable_folders_are_refused(tmp_path, capsys, never_computed):
    image = disc(tmp_path)
    (tmp_path / "busy" / "figure.png").mkdir(parents=True)
    for output in (image, image / "below", tmp_path / "busy", Path("/proc/oder-fast")):
        assert main(["demo", "--input", str(image), "--output", str(output)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"oder-fast: cannot write to the folder {output}: ")
        assert err.count("\n") == 1
        assert "None" not in err
    assert {path.name for path in tmp_path.iterdir()} == {"disc.npy", "busy"}


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--views", "1"], "--views: must be at least 2, got 1"),
        (["--views", "100000000"], "--views: must be at most 65536"),
        (["--seed", "9" * 30], "--seed: must be at most 4294967296"),
        (["--snr", "-500"], "--snr: must lie in -100..300, got -500"),
        (["--views", "many"], "--views: must be a whole number, got 'many'"),
        (["--minibatch", "-1"], "--minibatch: must be at least 1, got -1"),
        (["--steps", "0"], "--steps: must be at least 1"),
        (["--steps", "9"], "--steps is for --train"),
        (["ct", "--fixed-point-steps", "9"], "--fixed-point-steps is for --train"),
        (["mri", "--steps", "9"], "--steps is for --train"),
        (["--snr", "nan"], "--snr: must be a finite number, got 'nan'"),
        (["--snr", "loud"], "--snr: must be a finite number, got 'loud'"),
        (["--threads", "0"], "--threads: must be at least 1"),
        (["--seed", "-1"], "--seed: must be at least 0"),
        (["--frames", "3"], "unrecognized arguments: --frames 3"),
        (["--views", "8", "--minibatch", "9"], "--minibatch must be at most the number of views, 8, got 9"),
        (["mri", "--acceleration", "0.5"], "--acceleration: must lie in 1..16, got 0.5"),
        (["mri", "--acceleration", "nan"], "--acceleration: must be a finite number"),
        (["mri", "--minibatch", "9"], "--minibatch must be at most the number of coils, 8, got 9"),
        (["mri", "--size", "15"], "--size: must be at least 16"),
        (["mri", "--phantom", "--input", "a.png"], "--phantom and --input exclude each other"),
        (["mri", "--slice", "0"], "--slice is for NIfTI volumes"),
        (["mri", "--input", "missing.nii"], "cannot read missing.nii: No such file or directory"),
        (["mri", "--views", "9"], "unrecognized arguments: --views 9"),
        (
            ["mri", "--phantom", "--size", "32", "--acceleration", "8", "--estimate-maps"],
            "too few calibration lines",
        ),
        (["idt", "--minibatch", "65"], "--minibatch must be at most the number of illuminations, 64, got 65"),
        (["idt", "--size", "15"], "--size: must be at least 16"),
        (["idt", "--slices", "1"], "--slices: must be at least 2"),
        (["idt", "--illuminations", "0"], "--illuminations: must be at least 1"),
        (["idt", "--snr", "nan"], "--snr: must be a finite number"),
        (["idt", "--input", "cell.tif"], "unrecognized arguments: --input cell.tif"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, capsys, monkeypatch, never_computed, arguments, reason):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(["demo", *arguments])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert reason in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.exhaustive
def test_bad_input_in_a_process_of_its_own(tmp_path):
    run = call("demo", "--input", tmp_path / "missing.png", "--output", tmp_path / "out")
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr == f"oder-fast: cannot read {tmp_path / 'missing.png'}: {os.strerror(2)}\n"


def test_a_default_minibatch_is_a_third(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(ct, "_compute", lambda *arguments: seen.append(arguments[3]))
    monkeypatch.setattr(common, "report", lambda *_: None)
    for views, expected in ((60, 20), (31, 10), (2, 1)):
        assert main(["demo", "--views", str(views), "--output", str(tmp_path)]) == 0
        assert seen.pop() == expected


def test_the_truth_is_never_trained_on(monkeypatch):
    import skimage.data

    images = common.training_images(torch.zeros(8, 8))
    camera = torch.from_numpy(skimage.data.camera().astype("float32")) / 255
    without = common.training_images(camera)
    assert len(without) == len(images) - 2
    assert not any(image.shape == camera.shape and torch.equal(image, camera) for image in without)


# ------------------------------------------------------------------ MRI

MRI_METHODS = ["Zero-filled", "Total variation", "RED, all 8 coils", "ODER, 3 of 8 coils"]


@pytest.fixture(scope="module")
def mri_demo(tmp_path_factory):
    """Two runs of the demonstration in the same seed, one that trains, and one whose coil maps are estimated."""
    tiny = ["--minibatch", "3", "--phantom", "--size", "64"]
    trained = ["--train", "--steps", "2", "--fixed-point-steps", "1"]
    extras = {
        "first": [],
        "second": [],
        "trained": trained,
        "estimated": [*trained, "--estimate-maps", "--acceleration", "2"],
    }
    return demonstrations(tmp_path_factory.mktemp("mri"), ["mri", *tiny], extras)


@pytest.mark.parametrize(
    ("which", "setting", "maps"),
    [
        ("first", "16 of 64 lines (R = 4)", "known"),
        ("trained", "16 of 64 lines (R = 4)", "known"),
        pytest.param(
            "estimated", "32 of 64 lines (R = 2)", "estimated by ESPIRiT", marks=pytest.mark.exhaustive
        ),
    ],
)
def test_mri_prints_the_table_and_writes_whole_files(mri_demo, which, setting, maps):
    folder, run = mri_demo(which)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    for line, method in zip(lines[1:5], MRI_METHODS, strict=True):
        assert line.startswith(method)
        quality, similarity, _, *calls = line.split()[-5:]
        assert 5 < float(quality) < 60
        assert -1 <= float(similarity) <= 1
        assert calls == ["-", "-"] if method == "Zero-filled" else min(map(int, calls)) > 0
    assert re.match(r"RED is \S+ dB from Zero-filled; \S+ dB from Total variation", lines[5])
    assert setting in lines[5]
    assert f"64 x 64 pixels, 8 coils, {setting}, 30 dB; 3 coils a step" in run.stderr
    assert "Warning" not in run.stderr
    assert f"coil maps {maps}" in run.stderr
    assert {path.name for path in folder.iterdir()} == FILES
    with np.load(folder / "arrays.npz") as arrays:
        values = {name: arrays[name] for name in arrays.files}
    assert {name: value.shape for name, value in values.items()} == {
        **dict.fromkeys(("truth", "zero_filled", "total_variation", "red", "oder"), (64, 64)),
        **dict.fromkeys(("kspace", "coil_maps"), (8, 64, 64)),
        "mask": (64,),
    }
    assert all(np.isfinite(value).all() for value in values.values())
    assert np.abs(values["truth"]).max() == pytest.approx(1)
    assert not values["kspace"][..., ~values["mask"]].any()
    power = (np.abs(values["coil_maps"]) ** 2).sum(0)
    assert ((np.abs(power - 1) < 1e-4) | (power == 0)).all()
    saved = torch.load(folder / "denoiser.pt", weights_only=True)
    assert saved["arguments"]["in_channels"] == 2
    DnCNN(**saved["arguments"]).load_state_dict(saved["state_dict"])


@pytest.mark.exhaustive
def test_mri_by_the_same_seed_gives_the_same_numbers(mri_demo):
    (first, one), (second, other) = mri_demo("first"), mri_demo("second")
    assert one.returncode == other.returncode == 0
    with np.load(first / "arrays.npz") as a, np.load(second / "arrays.npz") as b:
        assert all(np.array_equal(a[name], b[name]) for name in a.files)


def mri_settings(**changes):
    settings = {
        "input": None, "array": None, "output": Path("unused"), "minibatch": 2, "snr": 30.0, "steps": 1,
        "fixed_point_steps": 0, "seed": 0, "threads": 1, "slice": None, "phantom": False, "size": 64,
        "acceleration": 4.0, "estimate_maps": False,
        "train": False,
    }  # fmt: skip
    return mri.Settings(**{**settings, **changes})


def test_the_default_slice_of_mri_is_reduced():
    truth = mri._read_truth(mri_settings())
    assert truth.image.shape == (64, 64)
    assert truth.image.is_complex()
    assert truth.image.abs().max() == pytest.approx(1)


def test_a_slice_of_mri_is_reduced_and_not_trained_on():
    truth = mri._read_truth(mri_settings(input=Path(pydicom.examples.get_path("overlay"))))
    assert truth.image.shape == (40, 64)
    assert truth.image.is_complex()
    assert truth.image.abs().max() == pytest.approx(1)
    assert len(common.training_images(truth.stored)) == len(common.training_images(torch.zeros(8, 8))) - 2


def test_a_slice_of_a_volume(tmp_path):
    volume = torch.rand(5, 20, 24, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "volume.nii.gz"
    write_nifti(path, volume)
    for number, expected in ((None, 2), (0, 0), (4, 4)):
        image = mri._read_truth(mri_settings(input=path, slice=number)).image
        assert torch.equal(image, volume[expected] / volume[expected].abs().max())
    with pytest.raises(common.BadInputError, match="--slice must be below the number of slices, 5, got 5"):
        mri._read_truth(mri_settings(input=path, slice=5))
    write_nifti(path, volume[0])
    assert mri._read_truth(mri_settings(input=path)).image.shape == (20, 24)
    with pytest.raises(common.BadInputError, match="holds one image"):
        mri._read_truth(mri_settings(input=path, slice=0))


@pytest.mark.parametrize("acceleration", [1.0, 1.5, 4.0, 8.0, 16.0])
@pytest.mark.parametrize("width", [16, 17, 64, 256])
def test_the_mask_has_the_lines_asked_for(width, acceleration):
    mask = mri._mask(width, acceleration, torch.Generator().manual_seed(0))
    assert mask.sum() == max(1, round(width / acceleration))
    center = round(width * min(0.32 / acceleration, 1))
    assert mask[width // 2 - center // 2 :][:center].all()


def test_the_noise_of_kspace_has_its_ratio():
    image = torch.rand(32, 32, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    everything = torch.ones(32, dtype=torch.bool)
    clean, _ = mri._measure(mri_settings(snr=200.0), image, everything)
    noisy, sigma = mri._measure(mri_settings(snr=20.0), image, everything)
    assert clean.norm() / (noisy - clean).norm() == pytest.approx(10, rel=0.05)
    assert (noisy - clean).abs().square().mean().sqrt() == pytest.approx(sigma, rel=0.05)


# ------------------------------------------------------------------ diffraction tomography


@pytest.fixture(scope="module")
def idt_demo(tmp_path_factory):
    """Two runs of the demonstration in the same seed, and one of data from beam propagation."""
    tiny = [
        "--train",
        "--steps",
        "2",
        "--fixed-point-steps",
        "1",
        "--size",
        "24",
        "--slices",
        "3",
        "--illuminations",
        "9",
    ]
    extras = {"first": [], "second": [], "propagated": ["--beam-propagation"]}
    return demonstrations(tmp_path_factory.mktemp("idt"), ["idt", *tiny], extras)


def idt_values(folder):
    with np.load(folder / "arrays.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


@pytest.mark.parametrize("which", ["first", pytest.param("propagated", marks=pytest.mark.exhaustive)])
def test_idt_prints_the_table_and_writes_whole_files(idt_demo, which):
    folder, run = idt_demo(which)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert [line.split(",")[0] for line in lines[1:9]] == ["Tikhonov"] * 5 + [
        "Total variation",
        "RED",
        "ODER",
    ]
    assert lines[8].startswith("ODER, 1 of 9 illuminations")
    for line in lines[1:9]:
        quality, similarity, _, *calls = line.split()[-5:]
        assert -20 < float(quality) < 60
        assert -1 <= float(similarity) <= 1
        assert calls == ["-", "-"] if line.startswith("Tikhonov") else min(map(int, calls)) > 0
    assert re.match(r"RED is \S+ dB from Tikhonov, \S+; \S+ dB from Total variation", lines[9])
    assert "The absorption is at" in lines[10]
    assert "A gradient of the data fidelity takes" in lines[11]
    assert "24 x 24 pixels, 3 slices, 9 illuminations, 10 dB; 1 illuminations a step" in run.stderr
    assert "Warning" not in run.stderr
    if which == "propagated":
        assert "measured by beam propagation" in run.stderr
        assert "of what beam propagation says" in run.stdout
    else:
        assert "measured by the linear model" in run.stderr
    assert {path.name for path in folder.iterdir()} == FILES
    values = idt_values(folder)
    assert {name: value.shape for name, value in values.items()} == {
        **dict.fromkeys(("truth", "tikhonov", "total_variation", "red", "oder"), (3, 24, 24)),
        "intensities": (9, 24, 24),
    }
    assert all(np.isfinite(value).all() for value in values.values())


@pytest.mark.exhaustive
def test_idt_by_the_same_seed_gives_the_same_numbers(idt_demo):
    values = [idt_values(idt_demo(which)[0]) for which in ("first", "second", "propagated")]
    assert all(np.array_equal(values[0][name], values[1][name]) for name in values[0])
    assert np.array_equal(values[0]["truth"], values[2]["truth"])
    assert not np.array_equal(values[0]["intensities"], values[2]["intensities"])


def test_the_background_of_a_slice_does_not_matter_to_its_denoiser():
    torch.manual_seed(0)
    denoiser = idt.AboveBackground(depth=3, width=4, in_channels=4, predicts="image", bias=False)
    volume = torch.zeros(1, 4, 20, 20)
    volume[:, :, :7] = torch.rand(1, 4, 7, 20)
    # Cells over a third of a slice leave its background where it is.
    torch.testing.assert_close(denoiser.network(volume), super(idt.AboveBackground, denoiser).network(volume))
    torch.testing.assert_close(denoiser(volume + 0.7), denoiser(volume), rtol=0, atol=1e-6)
    # The smallest slice has a background too.
    assert torch.equal(denoiser(torch.ones(1, 4, 1, 1)), denoiser(torch.zeros(1, 4, 1, 1)))


@pytest.mark.parametrize("number", [1, 2, 7, 64, 89])
def test_illuminations_are_spread_over_the_aperture(number):
    sines = idt._illuminations(number)
    assert sines.shape == (number, 2)
    assert sines.norm(dim=1).max() == pytest.approx(0.9)
    assert len(torch.unique(sines.round(decimals=6), dim=0)) == number


@pytest.mark.parametrize("arguments", [["demo"], ["demo", "ct"]])
def test_the_demo_without_a_name_is_that_of_ct(monkeypatch, arguments):
    seen = []
    monkeypatch.setattr(ct, "run", seen.append)
    assert main([*arguments, "--views", "7"] if len(arguments) > 1 else arguments) == 0
    assert seen[0].views == (7 if len(arguments) > 1 else 45)
    assert seen[0].output == Path("oder-fast-demo")


def test_the_summary_tells_of_solves_cut_short_and_of_peaks():
    image = torch.zeros(16, 16)
    good = common.Row(
        "RED, all", image, image, 30.0, 0.5, 0.0, 9, 40.0, (20.0, 30.05), (0.2, 1e-4), True, 5e-4
    )
    assert common._caveats([good]) == []
    bad = common.Row(
        "ODER, 1", image, image, 28.0, 0.5, 0.0, 9, 3.0, (20.0, 29.0, 28.0), (0.2, 0.1), False, 2e-3
    )
    cut_short, peak = common._caveats([good, bad])
    assert (
        "ODER ended after 9 denoiser calls, its largest number, at an estimated relative distance of 2.0e-03 (wanted: "
        "1e-03)" in cut_short
    )
    assert "On its way ODER had 29.00 dB (after 1 denoiser calls); it ends at 28.00 dB" in peak


def test_info_and_version(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert f"version: {__version__}" in printed
    assert "  reference: available" in printed
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"oder-fast {__version__}\n"


def test_no_command_says_what_is_missing(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "command" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [("train", "nowhere.yaml"), ("reconstruct", "nowhere.yaml", "scans", "--output", "out")]
)
def test_a_file_that_is_not_there_is_named(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert capsys.readouterr().err == "oder-fast: nowhere.yaml: No such file or directory\n"
    assert not list(tmp_path.iterdir())
