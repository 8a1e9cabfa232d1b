"""Runs: equal to uninterrupted ones, over several processes, through what goes wrong."""

from __future__ import annotations

import copy
import errno
import multiprocessing.synchronize
import os
import random
import signal
import subprocess
import sys
import time
import warnings
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from oder_fast import Anderson, DnCNN, GradientStep, Implicit, JacobianFree, Nesterov, Picard, ProximalStep
from oder_fast.cli import main
from oder_fast.data import Phantoms, psnr
from oder_fast.data.samples import Batch, Sample
from oder_fast.fixed_point import DivergenceError
from oder_fast.training import (
    CheckpointError,
    ConfigurationError,
    RunError,
    Trainer,
    load_checkpoint,
    load_model,
    make_model,
    read_configuration,
)
from oder_fast.training.checkpoints import list_checkpoints, locked, newest_checkpoint
from oder_fast.training.configuration import RED
from oder_fast.training.logs import TRAINING, VALIDATION, Table
from oder_fast.training.model import solve
from oder_fast.training.scans import make_scan
from oder_fast.training.sets import make_sets
from oder_fast.training.trainer import HALVINGS

# On a machine of one processor.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

SMALL = {
    "operator": {"kind": "ct", "angles": 12, "snr": 40},
    "data": {"phantoms": {"kind": "ellipses", "n": 12, "size": 16}, "workers": 0},
    "denoiser": {"kind": "dncnn", "options": {"depth": 3, "width": 8}},
    "red": {
        "tau": 0.02,
        "step": "gradient",
        "minibatch_size": 4,
        "max_iterations": 30,
        "tolerance": 1e-3,
        "adjoint_iterations": 20,
    },
    "pretraining": {"steps": 8, "learning_rate": 1e-3, "batch_size": 4, "ema": 0.9, "sigma": [0.0, 0.1]},
    "training": {"steps": 4, "batch_size": 2, "ema": 0.9},
    "validation": {"every": 5, "samples": 1, "images": 0},
    "checkpoints": {"every": 2, "keep": 3},
    "threads": 1,
}


def small(folder, *overrides):
    return read_configuration(SMALL, [f"output={str(folder)!r}", *overrides])


def train(folder, *overrides, resume=False, **options):
    return Trainer(small(folder, *overrides), progress=False, **options).fit(resume=resume)


def weights(path):
    state = load_checkpoint(path)
    return {**state["model"], **{f"ema.{k}": v for k, v in (state["ema"] or {}).items()}}


def assert_same(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def without_times(path):
    return [(line.split(",")[:2], line.split(",")[3:]) for line in path.read_text().splitlines()]


@pytest.fixture
def curves():
    """Have the report drawn, as in `whole`."""


@pytest.fixture(autouse=True)
def _no_curves(request, monkeypatch):
    """Drawing the report's curves takes longer than these runs."""
    if "curves" not in request.fixturenames:
        monkeypatch.setattr("oder_fast.training.report._curves", lambda *_: b"")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    return train(folder)


def test_a_run_leaves_what_it_should(whole):
    folder = whole.last.parent
    assert whole.reason == "finished"
    assert whole.last.name == "checkpoint-1-00000004.pt"
    assert [p.name for p in list_checkpoints(folder)] == [
        "checkpoint-1-00000004.pt",
        "checkpoint-1-00000002.pt",
        "checkpoint-0-00000008.pt",
    ]
    rows = Table(folder / "training.csv", TRAINING).rows()
    assert [(r["stage"], r["step"]) for r in rows] == [(0, k + 1) for k in range(8)] + [
        (1, k + 1) for k in range(4)
    ]
    assert all(r["loss"] > 0 and r["gradient_norm"] > 0 for r in rows)
    assert all(r["iterations"] <= 30 and r["adjoint_iterations"] <= 20 for r in rows[8:])
    for kind in ("", "adjoint_"):
        # A third of the views a step, and all of them in some.
        assert all(r[f"{kind}denoiser_calls"] > r[f"{kind}operator_calls"] > 0 for r in rows[8:])
    report = (folder / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 2
    assert "finished, after 12 steps" in report
    assert any((folder / "tensorboard").iterdir())
    assert whole.best is not None
    seen = Table(folder / "validation.csv", VALIDATION).rows()
    assert [(r["stage"], r["step"]) for r in seen] == [(0, 5), (0, 8), (1, 4)]
    assert whole.psnr == pytest.approx(seen[-1]["psnr"], abs=1e-3)


def test_the_same_seed_gives_the_same_run_and_another_one_another(whole, tmp_path):
    # Nothing depends on whether, or in how many processes, the data are loaded.
    assert_same(whole.last, train(tmp_path / "same", "data.workers=1").last)
    other = weights(train(tmp_path / "other", "seed=1").last)
    assert not torch.equal(other["denoiser.layers.0.weight"], weights(whole.last)["denoiser.layers.0.weight"])


def test_training_reaches_its_aim(tmp_path):
    """Stage 1 lowers the loss, stage 2 raises the quality of reconstructions."""
    more = ["pretraining.steps=80", "training.steps=20", "training.learning_rate=2e-3", "validation.every=10"]
    outcome = train(tmp_path, *more, "validation.samples=3", "pretraining.ema=null", "training.ema=null")
    rows = Table(tmp_path / "validation.csv", VALIDATION).rows()
    noise, seen = ([r for r in rows if r["stage"] == stage] for stage in (0, 1))
    assert noise[-1]["loss"] < 0.8 * noise[0]["loss"]
    assert seen[-1]["psnr"] > seen[-1]["psnr_start"] + 1
    assert seen[-1]["psnr"] > seen[0]["psnr"]
    assert outcome.psnr == pytest.approx(max(r["psnr"] for r in seen), abs=1e-3)


# ------------------------------------------------------------------ broken off and resumed

KILLED = """
import json, os, signal, sys
from oder_fast.training import Trainer, read_configuration
from oder_fast.training import checkpoints, report, trainer
report._curves = lambda *_: b""
configuration, kind, at = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
count = 0
def die():
    os.kill(os.getpid(), signal.SIGKILL)
if kind == "step":
    step = Trainer._step
    def dying(self, *arguments):
        global count
        count += 1
        return die() if count > at else step(self, *arguments)
    Trainer._step = dying
elif kind == "save":
    save = checkpoints.torch.save
    def dying(state, file):
        global count
        count += 1
        if count > at:
            file.write(b"half of a checkpoint"), file.flush()
            die()
        save(state, file)
    checkpoints.torch.save = dying
elif kind == "rename":
    replace = os.replace
    def dying(source, target):
        global count
        count += str(target).endswith(".pt")
        return die() if count > at and str(target).endswith(".pt") else replace(source, target)
    os.replace = dying
print(Trainer(read_configuration(configuration), progress=False).fit(resume=True).reason)
"""


def run_killed(folder, kind, at):
    import json

    configuration = json.dumps(SMALL | {"output": str(folder)})
    return subprocess.run(
        [sys.executable, "-c", KILLED, configuration, kind, str(at)],
        capture_output=True,
        text=True,
        timeout=600,
    )


MOMENTS = (("step", 1), ("save", 0), ("step", 3), ("rename", 1), ("save", 2), ("step", 2))


@pytest.mark.exhaustive
@pytest.mark.parametrize("moments", [(("save", 1),), MOMENTS], ids=["one", "many"])
def test_killed_at_any_moment_it_ends_as_if_it_had_not_been(whole, tmp_path, moments):
    for kind, at in moments:
        killed = run_killed(tmp_path, kind, at)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        for path in list_checkpoints(tmp_path):
            load_checkpoint(path)  # none is half there
    last = run_killed(tmp_path, "never", 0)
    assert last.stdout == "finished\n", last.stderr
    assert_same(whole.last, tmp_path / "checkpoint-1-00000004.pt")
    assert_same(whole.best, tmp_path / "best.pt")
    for name in ("training.csv", "validation.csv"):
        assert without_times(tmp_path / name) == without_times(whole.last.parent / name)
    assert left_over(tmp_path) == []


def left_over(folder):
    return [p.name for p in folder.iterdir() if p.name.startswith(".") and p.name != ".lock"]


class Asks(Trainer):
    """Sends itself and those that load a signal in the middle of a step, as one to the whole group does."""

    signal, at = signal.SIGTERM, 3

    def _step(self, *arguments):
        if self._overall() == self.at:
            for child in multiprocessing.active_children():
                os.kill(child.pid, self.signal)
            os.kill(os.getpid(), self.signal)
        return super()._step(*arguments)


@pytest.mark.parametrize(
    ("number", "at", "workers"),
    [
        (signal.SIGTERM, 3, 2),
        (signal.SIGINT, 10, 0),
        pytest.param(signal.SIGTERM, 3, 0, marks=pytest.mark.exhaustive),
        pytest.param(signal.SIGINT, 10, 2, marks=pytest.mark.exhaustive),
    ],
)
def test_signals_end_a_run_with_a_checkpoint(whole, tmp_path, number, at, workers, monkeypatch):
    monkeypatch.setattr(Asks, "signal", number)
    monkeypatch.setattr(Asks, "at", at)
    before = signal.getsignal(number)
    outcome = Asks(small(tmp_path, f"data.workers={workers}"), progress=False).fit()
    assert not multiprocessing.active_children()
    assert outcome.reason == signal.Signals(number).name
    assert signal.getsignal(number) is before
    state = load_checkpoint(outcome.last)
    assert state["position"]["step"] + 8 * state["position"]["stage"] == at + 1
    assert_same(whole.last, train(tmp_path, resume=True).last)


def test_a_process_that_loads_and_is_killed(whole, tmp_path, monkeypatch):
    looks = multiprocessing.synchronize.Event.is_set

    def holds(event):
        # What a process that looks at an event holds for a moment, it keeps when it is killed in it.
        with event._cond:
            time.sleep(0.5)
        return looks(event)

    monkeypatch.setattr(multiprocessing.synchronize.Event, "is_set", holds)

    class Kills(Trainer):
        def _step(self, *arguments):
            if self._overall() == 5:
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
                time.sleep(600)  # until the signal of its end comes
            return super()._step(*arguments)

    with pytest.raises(RunError, match=r"loads data ended .*Killed.* checkpoint is .*0-00000004.pt; mend it"):
        Kills(small(tmp_path, "data.workers=1"), progress=False).fit()
    assert_same(whole.last, train(tmp_path, resume=True).last)


def test_a_folder_in_which_another_run_is_at_work(tmp_path):
    train(tmp_path, "training.steps=0")
    # What a run does first, in a process that imports nothing.
    script = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(tmp_path / ".lock")]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(CheckpointError, match="another run is at work in it"):
            train(tmp_path, resume=True)
        other.stdin.close()
    with locked(tmp_path), subprocess.Popen(command, **pipes) as other:
        assert b"BlockingIOError" in other.communicate()[1]
    assert train(tmp_path, "training.steps=0", resume=True).reason == "finished"


class Draws(torch.utils.data.Dataset):
    """Draws from the generators of Python and NumPy."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, k):
        image = torch.full((16, 16), random.random()) * torch.linspace(0, 1, 16)
        return Sample(f"{k}", image + float(np.random.rand()))  # noqa: NPY002


def test_the_seed_is_that_of_python_and_numpy_too(tmp_path):
    def run(folder, *overrides, **options):
        return train(tmp_path / folder, *overrides, train_set=Draws(6), validation_set=Draws(2), **options)

    one = run("one")
    assert_same(one.last, run("other", "data.workers=1").last)
    assert without_times(tmp_path / "one/validation.csv") == without_times(tmp_path / "other/validation.csv")
    run("broken", "training.steps=1")
    assert_same(one.last, run("broken", resume=True).last)


def test_a_damaged_checkpoint_is_passed_over(whole, tmp_path, capsys):
    stopped = train(tmp_path, "training.steps=2")
    content = bytearray(stopped.last.read_bytes())
    middle = slice(len(content) // 2, len(content) // 2 + 400)
    content[middle] = bytes(b ^ 0xFF for b in content[middle])
    stopped.last.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checkpoint-1-00000002.pt: damaged"):
        load_checkpoint(stopped.last)
    path, _, problems = newest_checkpoint(tmp_path)
    assert path.name == "checkpoint-0-00000008.pt"
    assert len(problems) == 1
    assert_same(whole.last, train(tmp_path, resume=True).last)
    assert "damaged" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"not a zip", None])
def test_what_is_no_checkpoint(tmp_path, content):
    path = tmp_path / "x.pt"
    if content is None:
        torch.save({"state_dict": {}}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged|not a checkpoint"):
        load_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "missing.pt")
    with pytest.raises(CheckpointError, match="is a folder"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("missing", [1, 200, 10_000])
def test_a_checkpoint_that_is_truncated_is_passed_over(whole, tmp_path, missing):
    whole_one = tmp_path / "checkpoint-0-00000008.pt"
    whole_one.write_bytes((whole.last.parent / whole_one.name).read_bytes())
    path = tmp_path / whole.last.name
    path.write_bytes(whole.last.read_bytes()[:-missing])
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(path)
    assert newest_checkpoint(tmp_path)[0] == whole_one


def test_checkpoints_run_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"format": 1, "configuration": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "made").exists()


def without(state, *keys):
    return {name: value for name, value in state.items() if name not in keys}


def with_configuration(state, *keys, value):
    state = copy.deepcopy(state)
    *sections, last = keys
    tree = state["configuration"]
    for section in sections:
        tree = tree[section]
    tree[last] = value
    return state


def itself():
    value = []
    value.append(value)
    return value


def multiplied():
    value = ["x"] * 9
    for _ in range(12):
        value = [value] * 9
    return value


FIRST = "denoiser.layers.0.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: [s], "not a checkpoint of oder-fast train"),
        (lambda s: without(s, "model"), "missing key model"),
        (lambda s: without(s, "ema"), "missing key ema"),
        (lambda s: without(s, "position"), "missing key position"),
        (lambda s: without(s, "image_shape"), "missing key image_shape"),
        (lambda s: s | {"format": "x"}, "its format is no number"),
        (lambda s: s | {"format": 3}, "of format 3, and this version of oder_fast reads up to 2"),
        (lambda s: s | {"format": 1, "configuration": []}, "configuration: must hold settings by name"),
        (lambda s: s | {"ema": [1]}, "ema: must hold settings by name"),
        (lambda s: s | {"model": {1: torch.ones(1)}}, "model.1.*valid string"),
        (lambda s: s | {"model": {"a": 1}}, "model.a: .*Tensor"),
        (lambda s: s | {"position": [1]}, "position: must hold settings by name"),
        (lambda s: s | {"position": s["position"] | {"halvings": 40}}, "position.halvings: .* 4, got 40"),
        (lambda s: s | {"position": s["position"] | {"halvings": -1}}, "position.halvings: .* 0, got -1"),
        (lambda s: s | {"position": s["position"] | {"step": 10**30}}, "position.step: .* got 1000"),
        (lambda s: s | {"position": s["position"] | {"stage": True}}, "position.stage: .* integer"),
        (lambda s: s | {"image_shape": [16]}, "image_shape: .* at least 2 items"),
        (lambda s: s | {"image_shape": [16, -16]}, "image_shape.1: .* greater"),
        (lambda s: s | {"image_shape": [2**14, 2**14]}, "image_shape must have at most 67108864 pixels"),
        (lambda s: with_configuration(s, "denoiser", value=itself()), "at most 32 deep"),
        (lambda s: with_configuration(s, "denoiser", value=multiplied()), "at most 100000 values"),
        (lambda s: with_configuration(s, "seed", value=10**30), "whole number of more than 64 bits"),
        (lambda s: with_configuration(s, "red", "max_iterations", value=10**12), "red.max_iterations: .* 100000"),
        (lambda s: with_configuration(s, "operator", "angles", value=10**7), "operator.angles: .* 65536"),
        (lambda s: with_configuration(s, "operator", "bin_spacing", value=1e-300), "operator.bin_spacing: "),
        (lambda s: with_configuration(s, "denoiser", "options", value={"depth": 10**8}), "depth .* at most 256"),
        (lambda s: with_configuration(s, "denoiser", "options", value={"width": 1e3}), "width must be whole"),
    ],
)  # fmt: skip
def test_crafted_checkpoints_are_refused_in_a_sentence(whole, tmp_path, change, message):
    torch.save(change(torch.load(whole.last, weights_only=True)), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(tmp_path / "x.pt")
    assert str(caught.value).startswith(f"{tmp_path / 'x.pt'}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: with_configuration(s, "denoiser", "kind", value=".x:y"), "name the class to import it"),
        (lambda s: with_configuration(s, "denoiser", "options", value={"width": 4096}), r"MiB, which it does not"),
        (lambda s: s | {"image_shape": [3, 16, 16]}, r"image_shape: CT takes real images \(H, W\)"),
        (lambda s: s | {"model": s["model"] | {FIRST: s["model"][FIRST].to_sparse()}, "ema": None}, "no dense tensor"),
        (lambda s: s | {"model": s["model"] | {FIRST: s["model"][FIRST].to("meta")}, "ema": None}, "no dense tensor"),
        (lambda s: s | {"model": s["model"] | {FIRST: s["model"][FIRST] + 0j}, "ema": None}, "is complex"),
        (lambda s: s | {"model": {}, "ema": None}, "weights missing"),
    ],
)  # fmt: skip
def test_crafted_checkpoints_build_nothing(whole, tmp_path, change, message):
    torch.save(change(torch.load(whole.last, weights_only=True)), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message) as caught:
        load_model(tmp_path / "x.pt")
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_unpacks_to_more_than_it_stores(whole, tmp_path):
    with (
        zipfile.ZipFile(whole.last) as plain,
        zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
        packed.writestr("archive/data/99", bytes(10**7))
    with pytest.raises(CheckpointError, match="unpacks to more than it stores"):
        load_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"ema": None}, "moving average does not fit"),
        (lambda s: s | {"random": {}}, "its random numbers are not of this run: 'python'"),
        (lambda s: s | {"optimizer": {}}, "its optimizer .* 'state'"),
        (lambda s: s | {"optimizer": {"state": {99: {}}}}, "its optimizer or "),
        (lambda s: s | {"optimizer": {"state": {0: {"step": torch.ones(()), "exp_avg": torch.ones(3)}}}}, "missing"),
    ],
)  # fmt: skip
def test_crafted_checkpoints_are_not_resumed(whole, tmp_path, change, message):
    torch.save(change(torch.load(whole.last, weights_only=True)), tmp_path / whole.last.name)
    with pytest.raises(CheckpointError, match=message):
        train(tmp_path, resume=True)


def test_a_checkpoint_imports_nothing(whole, tmp_path, monkeypatch):
    (tmp_path / "own_net.py").write_text(
        "from pathlib import Path\nfrom oder_fast import DnCNN\nPath(__file__).with_name('ran').touch()\n"
        "class Net(DnCNN):\n    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    last = tmp_path / "best.pt"
    torch.save(with_configuration(load_checkpoint(whole.last), "denoiser", "kind", value="own_net:Net"), last)
    np.save(tmp_path / "y.npy", np.ones((12, 23), np.float32))
    call = ["reconstruct", str(last), str(tmp_path / "y.npy"), "--output", str(tmp_path / "out")]
    with pytest.raises(ConfigurationError, match=r"imports nothing; .* \(--denoiser own_net:Net\)"):
        load_model(last)
    assert main(call) == 2
    with pytest.raises(ConfigurationError, match="its denoiser is 'own_net:Net', not 'os:Net'"):
        load_model(last, "os:Net")
    assert not (tmp_path / "ran").exists()
    assert main([*call, "--denoiser", "own_net:Net"]) == 0
    assert (tmp_path / "ran").exists()


OLD = {
    "tau": 0.02,
    "train_tau": False,
    "minibatch_size": None,
    "variance_reduction": True,
    "solver": "nesterov",
    "max_iterations": 180,
    "tolerance": 1e-4,
    "adjoint_iterations": 100,
    "adjoint_tolerance": 1e-3,
    "differentiation": "implicit",
    "nonnegative": None,
    "cuda_graph": False,
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, RED(tau=0.02)),
        ({"nonnegative": False}, RED(tau=0.02, nonnegative=False)),
        (
            {"minibatch_size": 4, "variance_reduction": False},
            RED(tau=0.02, step="gradient", minibatch_size=4, variance_reduction=False),
        ),
    ],
)
def test_checkpoints_of_the_first_version_reconstruct_and_are_not_resumed(whole, tmp_path, changes, expected):
    old = torch.load(whole.last, weights_only=True) | {"format": 1}
    torch.save(with_configuration(old, "red", value=OLD | changes), tmp_path / whole.last.name)
    model, _, configuration, _ = load_model(tmp_path / whole.last.name)
    assert configuration.red == expected
    torch.testing.assert_close(model.denoiser.layers[0].weight, weights(whole.last)["ema." + FIRST])
    with pytest.raises(
        ConfigurationError, match=r"of version 0\.1, .*: begin another run, .* \(denoiser.weights="
    ):
        train(tmp_path, resume=True)
    another = train(
        tmp_path / "b",
        f"denoiser.weights={tmp_path / whole.last.name}",
        "pretraining.steps=1",
        "training.steps=0",
    )
    assert load_checkpoint(another.last)["format"] == 2
    torch.save(with_configuration(old, "red", value=OLD | {"tau": 0.0}), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"red\.tau: input should be greater than 0, got 0"):
        load_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("section", "step", "solver", "differentiation"),
    [
        ({}, ProximalStep(), Anderson(), Implicit()),
        ({"tolerance": 1e-4}, ProximalStep(), Anderson(tolerance=1e-4), Implicit()),
        ({"minibatch_size": 3}, ProximalStep(3), Anderson(), Implicit()),
        ({"step": "gradient", "step_size": 0.5}, GradientStep(0.5), Anderson(), Implicit()),
        (
            {"step": "gradient", "minibatch_size": 3, "variance_reduction": False, "adjoint_iterations": 7},
            GradientStep(None, 3, False),
            Picard(1000),
            Implicit(Picard(7)),
        ),
        (
            {"solver": "nesterov", "max_iterations": 9, "adjoint_tolerance": 0.1},
            ProximalStep(),
            Nesterov(9),
            Implicit(Anderson(100, 0.1, memory=8)),
        ),
        ({"differentiation": "jacobian_free"}, ProximalStep(), Anderson(), JacobianFree()),
    ],
)
def test_the_fixed_point_of_a_configuration(section, step, solver, differentiation):
    for trained in (False, True):
        model = make_model(DnCNN(2, 2), RED(tau=0.3, train_tau=trained, **section), True)
        assert (model.step, model.solver, model.differentiation) == (step, solver, differentiation)
        assert (model.nonnegative, model.normalize) == (True, False)
        assert torch.as_tensor(model.tau).item() == pytest.approx(0.3)
        assert ("log_tau" in model.state_dict()) == trained


def test_a_folder_that_holds_a_run(whole, tmp_path):
    folder = whole.last.parent
    with pytest.raises(ConfigurationError, match=r"holds a run already; resume it \(--resume\)"):
        train(folder)
    with pytest.raises(ConfigurationError, match=r"another configuration: red.tau was 0.02 and is 0.03"):
        train(folder, "red.tau=0.03", resume=True)
    with pytest.raises(
        ConfigurationError, match=r"does not fit|another configuration: denoiser.options.width"
    ):
        train(folder, "denoiser.options.width=4", resume=True)


def test_a_finished_run_can_be_made_longer(whole, tmp_path):
    train(tmp_path, "training.steps=2")
    assert_same(whole.last, train(tmp_path, resume=True).last)


def test_a_schedule_that_ends_with_the_run_keeps_its_end(tmp_path):
    train(tmp_path, "training.schedule=cosine", "training.steps=2")
    with pytest.raises(ConfigurationError, match=r"another configuration: training.steps was 2 and is 4"):
        train(tmp_path, "training.schedule=cosine", resume=True)


def test_an_output_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"output .*file: cannot be made a folder: File exists"):
        train(tmp_path / "file")
    full = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: full)
    with pytest.raises(OSError, match="0 MiB are free, and the run's checkpoints need"):
        train(tmp_path / "full")


def test_a_disk_that_fills_up(whole, tmp_path, monkeypatch):
    def save(state, file, real=torch.save):
        if state["position"]["stage"] == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(state, file)

    with monkeypatch.context() as patch:
        patch.setattr("oder_fast.training.checkpoints.torch.save", save)
        message = (
            r"cannot be written any more: No space left on device; .* is .*checkpoint-0-00000008.pt; mend it"
        )
        with pytest.raises(RunError, match=message):
            train(tmp_path)
    assert left_over(tmp_path) == []
    assert_same(whole.last, train(tmp_path, resume=True).last)


# ------------------------------------------------------------------ what goes wrong in a run


@pytest.mark.parametrize("enough", [2, HALVINGS + 1])
def test_a_batch_without_a_gradient_is_left_out_and_the_rate_halved(
    tmp_path, monkeypatch, capsys, enough, curves
):
    def compute(self, batch, seeds):
        if self.position.stage == 1 and self.position.halvings < enough:
            raise DivergenceError("Anderson: the residual grew")
        return real(self, batch, seeds)

    real = Trainer._compute
    monkeypatch.setattr(Trainer, "_compute", compute)
    if enough > HALVINGS:
        message = r"training, step 4: Anderson: the residual grew\. Before, 4 batches were left out and the learning rate"
        with pytest.raises(RunError, match=message):
            train(tmp_path, "training.steps=6")
        return
    outcome = train(tmp_path)
    assert outcome.reason == "finished"
    assert load_checkpoint(outcome.last)["position"]["halvings"] == 2
    told = "backs off: the batch is left out, and the learning rate is halved (2 of 4 times)"
    assert told in capsys.readouterr().err
    assert (
        "2 batches were left out; the learning rate is 4 times lower"
        in (tmp_path / "report.html").read_text()
    )
    rows = [r for r in Table(tmp_path / "training.csv", TRAINING).rows() if r["stage"] == 1]
    assert ["loss" in r for r in rows] == [False, False, True, True]
    assert [r.get("learning_rate") for r in rows] == [None, None, 2.5e-5, 2.5e-5]


@pytest.mark.parametrize(
    "form", ["red.tau=3", "red={tau: 3, solver: picard}", "red={tau: 3, step: gradient, solver: picard}"]
)
def test_a_denoiser_that_expands_ends_with_advice(tmp_path, form):
    class Expands(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(50.0))

        def forward(self, image):
            return self.gain * image

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RunError, match=r"the denoiser does not contract\. Pre-train it longer"):
            train(tmp_path, "pretraining.steps=0", "training.steps=5", form, denoiser=Expands())


class Own(torch.utils.data.Dataset):
    """Samples as they are given."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def images(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [Sample(f"image {k}", torch.rand(16, 16, generator=g)) for k in range(n)]


@pytest.mark.parametrize("kind", ["ct", pytest.param("mri", marks=pytest.mark.exhaustive)])
def test_empty_images_are_drawn_again_and_uniform_ones_not_compared(tmp_path, capsys, kind):
    nothing = Sample("nothing", torch.zeros(16, 16))
    operator = {"ct": SMALL["operator"], "mri": {"kind": "mri", "coils": 2}}[kind]
    tree = SMALL | {"operator": operator, "output": str(tmp_path)}
    tree["red"] = SMALL["red"] | {"minibatch_size": None}
    tree["validation"] = {"every": 5, "samples": 3, "images": 3, "patience": 2}
    sets = {
        "train_set": Own([nothing, *images(2), nothing]),
        "validation_set": Own([images(1)[0], nothing, nothing]),
    }
    outcome = Trainer(read_configuration(tree), progress=False, **sets).fit()
    assert outcome.best is not None
    assert outcome.psnr > 0
    assert "2 of 3 validation images are uniform and left out" in capsys.readouterr().err
    rows = Table(tmp_path / "validation.csv", VALIDATION).rows()
    assert all(0 < r["psnr"] < 100 for r in rows)
    only = {"train_set": Own([nothing] * 3), "validation_set": Own(images(1))}
    with pytest.raises(
        ConfigurationError, match=r"data: nothing: of 100 images or patches drawn after it all are 0"
    ):
        Trainer(read_configuration(tree), progress=False, **only)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (torch.zeros(16, 16), r"must return oder_fast.data.Sample\(name, image\).*got Tensor"),
        (Sample("a", torch.zeros(16, 16).numpy()), "with a torch.Tensor as image, got ndarray"),
        (
            Sample("a", torch.zeros(16, 16).double()),
            "a: its image must be float32 or complex64, got torch.float64",
        ),
        (Sample("a", torch.full((16, 16), torch.nan)), r"a: its image must be finite, got nan at \(0, 0\)"),
        (Sample("a", torch.ones(5, 5)), "at least 7 rows and columns"),
    ],
)
def test_datasets_that_give_something_else(tmp_path, sample, message):
    with pytest.raises(ConfigurationError, match=message):
        train(tmp_path, train_set=Own(images(2)), validation_set=Own([sample]))
    with pytest.raises(TypeError, match="must be a Configuration"):
        Trainer("ct.yaml")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_breaks_a_run_leaves_a_checkpoint(tmp_path, workers):
    bad = Sample("the bad one", torch.full((16, 16), torch.nan))
    sets = {"train_set": Own([*images(9), bad]), "validation_set": Own(images(1))}
    with pytest.raises(
        RunError, match=r"step \d+: the bad one: its image must be finite.*mend it, and go on"
    ):
        train(tmp_path, f"data.workers={workers}", "pretraining.batch_size=2", **sets)
    assert list_checkpoints(tmp_path)


@pytest.mark.exhaustive
def test_the_best_of_stage_1_stays_where_stage_2_was_not_validated(tmp_path, curves):
    outcome = train(tmp_path, "training.steps=0")
    rows = Table(tmp_path / "validation.csv", VALIDATION).rows()
    assert outcome.psnr == pytest.approx(max(r["psnr"] for r in rows), abs=1e-3)
    assert "(pre-training), best.pt" in (tmp_path / "report.html").read_text()


def test_a_run_goes_on_with_as_many_processes(tmp_path, monkeypatch):
    train(tmp_path, "training.steps=2")
    monkeypatch.setattr("oder_fast.training.trainer.world_size", lambda: 2)
    with pytest.raises(ConfigurationError, match="a run of 1 processes, and here are 2"):
        Trainer(small(tmp_path), progress=False)._restore(*newest_checkpoint(tmp_path)[:2])


def test_checkpoints_that_are_all_damaged_stop_a_run(tmp_path):
    train(tmp_path, "training.steps=0")
    for path in list_checkpoints(tmp_path):
        path.write_bytes(b"nothing")
    with pytest.raises(ConfigurationError, match="none of its checkpoints is whole"):
        train(tmp_path, resume=True)


def test_losses_that_are_not_finite_in_pretraining(tmp_path):
    class Nan(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, image):
            return image + self.weight * torch.nan if self.training else image

    with pytest.raises(
        RunError, match=r"pre-training, step 0: the loss is nan; lower pretraining.learning_rate"
    ):
        train(tmp_path, denoiser=Nan())


def test_early_stopping(tmp_path, monkeypatch):
    monkeypatch.setattr("oder_fast.training.trainer.psnr", lambda *_: 10.0)
    outcome = train(
        tmp_path, "training.steps=50", "validation.every=1", "validation.patience=3", "pretraining.steps=0"
    )
    assert outcome.reason == "no better for long"
    assert load_checkpoint(outcome.last)["position"]["step"] == 4
    # Again it ends where it was.
    again = train(
        tmp_path,
        "training.steps=50",
        "validation.every=1",
        "validation.patience=3",
        "pretraining.steps=0",
        resume=True,
    )
    assert (again.reason, again.last) == (outcome.reason, outcome.last)


# ------------------------------------------------------------------ what is trained


def test_the_moving_average(tmp_path):
    outcome = train(
        tmp_path,
        "pretraining.steps=3",
        "training.steps=0",
        "checkpoints={every: 1, keep: 9}",
        "pretraining.ema=0.5",
    )
    begin = Trainer(small(tmp_path / "x"), progress=False).model.state_dict()["denoiser.layers.0.weight"]
    states = [load_checkpoint(tmp_path / f"checkpoint-0-{k:08d}.pt") for k in (1, 2, 3)]
    expected = begin
    # The first steps weigh more.
    for decay, state in zip((1 / 10, 2 / 11, 3 / 12), states, strict=True):
        expected = decay * expected + (1 - decay) * state["model"]["denoiser.layers.0.weight"]
    torch.testing.assert_close(states[-1]["ema"]["denoiser.layers.0.weight"], expected)
    model, *_ = load_model(tmp_path / "checkpoint-0-00000003.pt")
    torch.testing.assert_close(model.denoiser.layers[0].weight, expected)
    assert outcome.last.name == "checkpoint-1-00000000.pt"


def test_a_model_loads_and_reconstructs_what_validation_saw(whole):
    model, scan, configuration, state = load_model(whole.best)
    assert state["image_shape"] == [16, 16]
    from oder_fast.training.draws import seed_of
    from oder_fast.training.sets import make_sets

    _, validation = make_sets(configuration, make_scan(configuration.operator))
    g = torch.Generator().manual_seed(seed_of(configuration.seed, "validation", 0))
    image = validation[0].image[None]
    measured = scan.measure(Batch(["x"], image), [g])
    minibatches = torch.Generator().manual_seed(seed_of(configuration.seed, "validation minibatches", 0))
    with torch.no_grad():
        found = solve(model, measured, minibatches).value
    assert psnr(found[0], image[0]) == pytest.approx(whole.psnr, abs=1e-3)


def test_spectral_norms_settle_on_averaged_weights(tmp_path):
    options = "denoiser.options={depth: 3, width: 8, spectral_norm: true}"
    outcome = train(
        tmp_path, options, "pretraining.learning_rate=3e-2", "pretraining.ema=0.5", "training.steps=0"
    )
    model, *_ = load_model(outcome.last)
    for layer in model.denoiser.layers[::2]:
        weight = layer.weight.detach().flatten(1)
        assert torch.linalg.matrix_norm(weight, 2) == pytest.approx(1, rel=2e-2)


@pytest.mark.parametrize("sigma", [0.0, 0.2])
def test_the_noise_of_stage_1_has_the_level_asked_for(sigma):
    trainer = Trainer(small("unused", f"pretraining.sigma=[{sigma}, {sigma or 1e-9}]"), progress=False)
    generators = [torch.Generator().manual_seed(k) for k in range(8)]
    noisy, denoised = trainer._denoise(torch.zeros(8, 32, 32), generators)
    assert noisy.std().item() == pytest.approx(sigma, rel=0.05, abs=1e-6)
    assert not torch.equal(noisy[0], noisy[1])
    torch.testing.assert_close(denoised[:, None], trainer.model.denoiser(noisy[:, None]))


def test_gradients_are_clipped(tmp_path, monkeypatch):
    def step(self, *args, **kwargs):
        norms.append(torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"]]).norm())
        return real(self, *args, **kwargs)

    norms, real = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", step)
    train(tmp_path, "pretraining.clip_norm=1e-6", "training.steps=0")
    assert [float(n) for n in norms] == pytest.approx([1e-6] * 8, rel=0.1)


def test_tau_is_trained_with_the_denoiser(tmp_path):
    outcome = train(tmp_path, "red.train_tau=true", "training.learning_rate=1e-2")
    rows = Table(tmp_path / "training.csv", TRAINING).rows()
    assert rows[7]["tau"] == pytest.approx(0.02)
    assert rows[-1]["tau"] != pytest.approx(0.02, rel=1e-3)
    model, *_ = load_model(outcome.last)
    assert float(model.tau.detach()) == pytest.approx(0.02, rel=0.2)


def test_mixed_precision_keeps_to_the_denoiser():
    """Gradients in bfloat16 point where those in float32 do; all that is not the denoiser stays in float32."""
    trainer = Trainer(small("unused", "red.minibatch_size=null", "training.steps=1"), progress=False)
    trainer.position.stage = 1
    seen = []
    trainer.model.denoiser.layers[0].register_forward_hook(lambda *a: seen.append(a[2].dtype))
    gradients = {}
    for precision in ("float32", "bfloat16"):
        section = trainer.configuration.training.model_copy(update={"precision": precision})
        trainer.stages = (trainer.stages[0], section)
        failed = trainer._try_gradient(*next(trainer._loader()))
        assert isinstance(failed, dict)
        gradients[precision] = torch.cat([p.grad.flatten() for p in trainer.parameters])
        assert all(p.grad.dtype == torch.float32 for p in trainer.parameters)
        assert {*seen} == {getattr(torch, precision)}
        seen.clear()
    exact, rough = gradients["float32"], gradients["bfloat16"]
    cosine = torch.nn.functional.cosine_similarity(exact, rough, dim=0)
    assert cosine > 0.98
    assert float(rough.norm()) == pytest.approx(float(exact.norm()), rel=0.15)
    assert not torch.equal(exact, rough)


@pytest.mark.parametrize(
    ("operator", "phantoms", "options"),
    [
        ({"kind": "mri", "coils": 3}, {"kind": "brain"}, {"depth": 3, "width": 6}),
        ({"kind": "mri", "coils": 3, "mask": "poisson_disc"}, {"kind": "ellipses"}, {"depth": 3, "width": 6}),
        (
            {
                "kind": "idt",
                "depths": [-2.0, 0.0],
                "rings": [[5, 0.4]],
                "pixel_size": 0.25,
                "wavelength": 0.5,
                "numerical_aperture": 0.5,
                "medium_index": 1.33,
            },
            {"kind": "cells"},
            {"depth": 3, "width": 6},
        ),
    ],
)
@pytest.mark.parametrize("size", [None, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_every_operator_trains(tmp_path, operator, phantoms, options, size):
    tree = SMALL | {
        "operator": operator,
        "data": {"phantoms": {**phantoms, "n": 4, "size": 24}, "workers": 0},
        "denoiser": {"kind": "dncnn", "options": options},
        "red": {"tau": 0.05, "max_iterations": 10, "tolerance": 1e-2, "adjoint_iterations": 10}
        | ({"step": "gradient", "minibatch_size": size} if size else {}),
        "pretraining": {"steps": 2, "batch_size": 2, "loss": "l1"},
        "training": {"steps": 2, "batch_size": 2, "loss": {"mse": 1, "ssim": 0.1}, "schedule": "cosine"},
        "output": str(tmp_path),
    }
    outcome = Trainer(read_configuration(tree), progress=False).fit()
    assert outcome.reason == "finished"
    rows = Table(tmp_path / "training.csv", TRAINING).rows()
    assert [r["learning_rate"] for r in rows] == pytest.approx([1e-4, 1e-4, 1e-4, 5e-5])
    model, *_ = load_model(outcome.last)
    assert model.denoiser.in_channels == (4 if operator["kind"] == "idt" else 2)


def test_a_module_and_datasets_of_ones_own(tmp_path):
    sets = {
        "train_set": Phantoms("shepp-logan-random", 6, 16),
        "validation_set": Phantoms("shepp-logan", 1, 16),
    }
    own = DnCNN(3, 4)
    outcome = train(tmp_path, denoiser=own, **sets)
    with pytest.raises(ConfigurationError, match="give load_model one of the same architecture"):
        load_model(outcome.last)
    with pytest.raises(ConfigurationError, match="do not fit the denoiser: 2 weights missing"):
        load_model(outcome.last, DnCNN(4, 4))
    model, *_ = load_model(outcome.last, DnCNN(3, 4))
    assert model.denoiser.layers[0].weight.shape == (4, 1, 3, 3)


# ------------------------------------------------------------------ the command


@pytest.fixture
def file(tmp_path):
    import yaml

    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL | {"output": str(tmp_path / "unused")}))
    return str(path)


def test_the_command(tmp_path, file, monkeypatch, capsys):
    (tmp_path / "tiny_denoiser.py").write_text(
        "import torch\nclass Tiny(torch.nn.Module):\n    def __init__(self, gain=0.9):\n        super().__init__()\n"
        "        self.gain = torch.nn.Parameter(torch.tensor(gain))\n    def forward(self, x):\n        return self.gain * x\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    own = ["denoiser={kind: 'tiny_denoiser:Tiny', options: {gain: 0.8}}", "pretraining.steps=2"]
    # The working folder is no place to import from, unless the user says so.
    assert main(["train", file, *own, "--output", "run=1"]) == 2
    assert "No module named 'tiny_denoiser'; a module in the working folder is found with PYTHONPATH=." in (
        capsys.readouterr().err
    )
    assert sys.path == before
    monkeypatch.syspath_prepend(tmp_path)
    # Settings stand before and after options.
    assert main(["train", file, own[0], "--output", "run=1", "training.steps=1", own[1]]) == 0
    out = capsys.readouterr().out
    assert "Ended: finished. Wrote run=1/checkpoint-1-00000001.pt; the best (" in out
    assert main(["train", "--resume", "--output", "run=1", file, *own, "training.steps=2"]) == 0
    assert "checkpoint-1-00000002.pt" in capsys.readouterr().out
    assert not (tmp_path / "unused").exists()
    for arguments, status, message in (
        ([file, *own, "--output", "run=1"], 2, "holds a run already"),
        ([file, "trainin.steps=1"], 2, "unknown key trainin; did you mean training?"),
        (["missing.yaml"], 2, "missing.yaml"),
        ([file, "denoiser.options.width=0"], 2, "width at least 1"),
        (
            [file, "pretraining.learning_rate=1e30", "pretraining.clip_norm=null", "--output", "b"],
            1,
            "the loss is",
        ),
    ):
        assert main(["train", *arguments]) == status
        assert message in capsys.readouterr().err


# ------------------------------------------------------------------ refused before anything starts


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["red.minibatch_size=13"], "red.minibatch_size: must be at most the 12 blocks, got 13"),
        (["red.solver=anderson"], "red: solver: anderson takes no minibatches of gradient steps"),
        (["denoiser.kind=unett"], "denoiser.kind: must be one of unet, dncnn, drunet.*did you mean unet"),
        (["denoiser.kind=nowhere:Net"], "denoiser.kind: cannot import 'nowhere:Net'"),
        (["denoiser.kind=math:pi"], "is no class of torch.nn.Module"),
        (["denoiser.options.widht=3"], "DnCNN has no option widht; did you mean width"),
        (
            ["denoiser.options.width=0"],
            "denoiser.options: DnCNN: depth must be at least 2 and width at least 1",
        ),
        (["denoiser.options.in_channels=3"], "denoiser: does not take images of shape"),
        (["denoiser.weights=nowhere.pt"], "denoiser.weights: cannot read nowhere.pt"),
        (["data.phantoms.kind=brain"], "operator: CT takes real images"),
        (["data.phantoms.kind=cells"], "data: Phantoms: size must be three numbers"),
        (["data.patch=17"], "Patches: size .* must fit into the images"),
        (["operator={kind: mri, center_fraction: 0.5}"], "operator: random_lines: "),
        (["training.loss=ssim", "data.phantoms.size=8"], "loss: ssim_loss: images must have at least 11"),
        (
            ["operator={kind: mri}", "red.minibatch_size=9"],
            "red.minibatch_size: must be at most the 8 blocks",
        ),
    ],
)
def test_settings_that_do_not_go_together(tmp_path, overrides, message):
    with pytest.raises((ConfigurationError, ValueError), match=message):
        train(tmp_path / "run", *overrides)
    assert not (tmp_path / "run").exists()


def test_a_denoiser_without_weights():
    with pytest.raises(ConfigurationError, match="nothing to train"):
        Trainer(small("unused"), denoiser=nn.Identity())
    with pytest.raises(ConfigurationError, match="give both"):
        Trainer(small("unused"), train_set=Phantoms("ellipses", 3, 16))
    with pytest.raises(ValueError, match="is not here"):
        Trainer(small("unused", "device=nowhere"))


def test_coils_that_fit_in_no_batch(tmp_path):
    for number, coils in enumerate((2, 3)):
        kspace = torch.ones(1, coils, 16, 16, dtype=torch.complex64)
        np.savez(tmp_path / f"{number}.npz", kspace=kspace, maps=kspace[0])
    source = {
        "operator": {"kind": "mri"},
        "data": {"train": str(tmp_path), "kspace": True, "workers": 0},
        "output": str(tmp_path / "run"),
    }
    several = read_configuration({**source, "training": {"steps": 1, "batch_size": 2}})
    with pytest.raises(
        ConfigurationError, match=r"0.npz\[0\] has 2 coils and 1.npz\[0\] 3, which fit in no batch"
    ):
        Trainer(several)
    configuration = read_configuration({**source, "training": {"steps": 1}})
    train_set, _ = make_sets(configuration, make_scan(configuration.operator))
    assert len(train_set) == 1


def test_images_that_the_projection_keeps_from_being_reached(tmp_path):
    for number in range(4):
        np.save(tmp_path / f"{number}.npy", np.linspace(-1, 1, 256, dtype=np.float32).reshape(16, 16))
    negative = [f"data={{'train': {str(tmp_path)!r}, 'scale': 'none', 'workers': 0}}"]
    with pytest.warns(UserWarning, match="images go down to -1, and red.nonnegative"):
        Trainer(small(tmp_path / "run", *negative))
    Trainer(small(tmp_path / "run", *negative, "red.nonnegative=false"))


# ------------------------------------------------------------------ several processes

RANKS = """
import json, os, signal, sys
from oder_fast.training import Trainer, read_configuration, report
report._curves = lambda *_: b""
configuration, dies = json.loads(sys.argv[1]), sys.argv[2] == "dies"
if dies and os.environ["RANK"] == "1":
    step = Trainer._step
    def dying(self, *arguments):
        if self.position.step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *arguments)
    Trainer._step = dying
if sys.argv[2] == "diverges" and os.environ["RANK"] == "1":
    from oder_fast.fixed_point import DivergenceError
    compute = Trainer._compute
    def diverging(self, *arguments):
        if self.position.stage == 1 and self.position.halvings == 0:
            raise DivergenceError("grew")
        return compute(self, *arguments)
    Trainer._compute = diverging
print(Trainer(read_configuration(configuration), progress=False).fit().reason)
"""


def run_ranks(folder, port, mode, **changes):
    import json

    tree = SMALL | {"output": str(folder), "timeout": 300} | changes
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS, json.dumps(tree), mode],
            env=os.environ
            | {"RANK": str(k), "WORLD_SIZE": "2", "LOCAL_RANK": str(k), "MASTER_ADDR": "127.0.0.1"}
            | {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for k in range(2)
    ]
    try:
        return [(*p.communicate(timeout=600), p.returncode) for p in processes]
    finally:
        for p in processes:
            p.kill()


@pytest.fixture
def port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.exhaustive
def test_two_processes_give_the_gradients_of_one_with_twice_the_batch(tmp_path, port):
    # As many iterations in both, of the solver that amplifies no rounding: so small a network hardly contracts.
    red = {"solver": "picard", "tau": 0.02, "max_iterations": 8, "adjoint_iterations": 8, "tolerance": 1e-9}
    half = {
        "red": red,
        "pretraining": SMALL["pretraining"] | {"batch_size": 2},
        "training": SMALL["training"] | {"batch_size": 1},
    }
    for out, err, status in run_ranks(tmp_path / "two", port, "", **half):
        assert (out, status) == ("finished\n", 0), err
    one = read_configuration(SMALL | {"red": red, "output": str(tmp_path / "one")})
    alone = Trainer(one, progress=False).fit()
    first, second = weights(alone.last), weights(tmp_path / "two" / alone.last.name)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=2e-5 * float(value.abs().max()))
    rows = [Table(tmp_path / k / "training.csv", TRAINING).rows() for k in ("one", "two")]
    for a, b in zip(*rows, strict=True):
        assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-3)
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)


@pytest.mark.exhaustive
def test_a_process_that_dies_ends_the_others_with_a_reason(tmp_path, port):
    # The ranks would wait for hours: that the other ends at all is since it knows.
    (_, err, status), (_, _, dead) = run_ranks(tmp_path, port, "dies", timeout=36000)
    assert dead == -signal.SIGKILL
    assert status == 1
    cause, _, message = err.rpartition("direct cause of the following exception")
    assert "Error: " in cause
    assert "LostProcessError: rank 0 lost contact with another of the 2 ranks: look in" in message
    assert "mend it, and go on with --resume (resume=True)\n" in message


@pytest.mark.exhaustive
def test_a_process_that_diverges_has_all_leave_the_batch_out(tmp_path, port):
    for out, err, status in run_ranks(tmp_path, port, "diverges"):
        assert (out, status) == ("finished\n", 0), err
    rows = Table(tmp_path / "training.csv", TRAINING).rows()
    assert {r["halvings"] for r in rows if r["stage"] == 1} == {1}
    assert ["loss" in r for r in rows if r["stage"] == 1] == [False, True, True, True]
