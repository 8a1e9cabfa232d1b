import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from oder_fast import DnCNN, __version__, _demo
from oder_fast.cli import main

FILES = {"figure.png", "arrays.npz", "denoiser.pt"}
TINY = ["--steps", "2", "--fixed-point-steps", "1", "--views", "9"]
METHODS = ["FBP, ramp", "FBP, shepp-logan", "FBP, cosine", "FBP, hann", "RED, all 9", "ODER, 3 of 9"]


def command(*arguments):
    return [sys.executable, "-m", "oder_fast.cli", *map(str, arguments)]


def call(*arguments):
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=300)


def disc(folder, height=20, width=24):
    y, x = np.mgrid[:height, :width]
    path = folder / "disc.npy"
    np.save(path, 3.0 * ((y - height / 2) ** 2 + (x - width / 2) ** 2 < 64) + 0.5 * (x > 10))
    return path


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Two runs of the same demonstration on a tiny image, in the same seed."""
    folder = tmp_path_factory.mktemp("demo")
    image = disc(folder)
    outputs = [folder / "first", folder / "a" / "second"]
    return outputs, [call("demo", "--input", image, "--output", output, *TINY) for output in outputs]


def test_demo_prints_the_table(demo):
    _, (run, _) = demo
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0].split() == ["method", "PSNR", "(dB)", "SSIM", "seconds", "iterations"]
    for line, method in zip(lines[1:7], METHODS, strict=True):
        assert line.startswith(method)
        quality, similarity, seconds, iterations = line.split()[-4:]
        assert 5 < float(quality) < 60
        assert -1 <= float(similarity) <= 1
        assert float(seconds) >= 0
        assert iterations == "-" if method.startswith("FBP") else int(iterations) > 0
    assert "dB from the best FBP" in lines[7]
    assert "Within the largest circle" in lines[8]


def test_demo_shows_its_progress(demo):
    _, (run, _) = demo
    for text in (
        "20 x 24 pixels, 9 views, 50 dB; 3 views a step",
        "train_denoiser",
        "2/2",
        "step/s",
        "loss=",
    ):
        assert text in run.stderr
    assert "Warning" not in run.stderr


def test_demo_writes_whole_files_and_nothing_else(demo):
    for folder in demo[0]:
        assert {path.name for path in folder.iterdir()} == FILES
    folder = demo[0][0]
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
    images = dict.fromkeys(("truth", "fbp", "red", "oder"), (20, 24))
    assert shapes == {**images, "sinogram": (9, 33)}
    saved = torch.load(folder / "denoiser.pt", weights_only=True)
    DnCNN(**saved["arguments"]).load_state_dict(saved["state_dict"])


def test_the_same_seed_gives_the_same_numbers(demo):
    (first, second), runs = demo

    def numbers(run):
        return [line.split()[:-2] + line.split()[-1:] for line in run.stdout.splitlines()[:7]]

    assert numbers(runs[0]) == numbers(runs[1])
    with np.load(first / "arrays.npz") as a, np.load(second / "arrays.npz") as b:
        assert all(np.array_equal(a[name], b[name]) for name in a.files)


@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupt_leaves_nothing_broken(tmp_path, existing):
    output = tmp_path / "out"
    if existing:
        output.mkdir()
        (output / "figure.png").write_text("old")
    arguments = ["--input", disc(tmp_path), "--output", output, *TINY, "--steps", 1_000_000]
    with subprocess.Popen(
        command("demo", *arguments), stderr=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        seen = b""
        while b"loss=" not in seen:
            seen += process.stderr.read1()
            assert process.poll() is None, seen
        process.send_signal(signal.SIGINT)
        out, rest = process.communicate(timeout=60)
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
    row = _demo.Row("FBP, ramp", torch.rand(16, 16), 20.0, 20.0, 0.5, 0.0)
    solved = _demo.Row("RED", torch.rand(16, 16), 20.0, 20.0, 0.5, 0.0, 1, [20.0], ([1], [0.1]))
    results = "", [row] * 4 + [solved] * 2, torch.rand(16, 16), torch.rand(3, 23), DnCNN(2, 2)
    monkeypatch.setattr(_demo, "_compute", lambda *_: results)

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

    monkeypatch.setattr(_demo, "_compute", fail)


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
        (["--views", "0"], "--views: must be at least 1, got 0"),
        (["--views", "many"], "--views: must be a whole number, got 'many'"),
        (["--minibatch", "-1"], "--minibatch: must be at least 1, got -1"),
        (["--steps", "0"], "--steps: must be at least 1"),
        (["--snr", "nan"], "--snr: must be a finite number, got 'nan'"),
        (["--snr", "loud"], "--snr: must be a finite number, got 'loud'"),
        (["--threads", "0"], "--threads: must be at least 1"),
        (["--seed", "-1"], "--seed: must be at least 0"),
        (["--frames", "3"], "unrecognized arguments: --frames 3"),
        (["--views", "8", "--minibatch", "9"], "--minibatch must be at most the number of views, 8, got 9"),
    ],
)
def test_bad_numbers_are_refused(tmp_path, capsys, monkeypatch, never_computed, arguments, reason):
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


def test_bad_input_in_a_process_of_its_own(tmp_path):
    run = call("demo", "--input", tmp_path / "missing.png", "--output", tmp_path / "out")
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr == f"oder-fast: cannot read {tmp_path / 'missing.png'}: {os.strerror(2)}\n"


def test_a_default_minibatch_is_a_third(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(_demo, "_compute", lambda *arguments: seen.append(arguments[3]) or ())
    monkeypatch.setattr(_demo, "_write", lambda *_: None)
    for views, expected in ((60, 20), (31, 10), (1, 1)):
        assert main(["demo", "--views", str(views), "--output", str(tmp_path)]) == 0
        assert seen.pop() == expected


def test_the_truth_is_never_trained_on(monkeypatch):
    import skimage.data

    images = _demo._training_images(torch.zeros(8, 8))
    camera = torch.from_numpy(skimage.data.camera().astype("float32")) / 255
    without = _demo._training_images(camera)
    assert len(without) == len(images) - 2
    assert not any(image.shape == camera.shape and torch.equal(image, camera) for image in without)


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
