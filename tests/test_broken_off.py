"""Runs that are killed, whose disk fills up, whose folder is removed or whose clock is set back."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from oder_fast.training import RunError, Trainer, load_checkpoint, read_configuration
from oder_fast.training.checkpoints import list_checkpoints

COMMON = {
    "denoiser": {"kind": "dncnn", "options": {"depth": 3, "width": 4}},
    "pretraining": {"steps": 8, "learning_rate": 1e-3, "batch_size": 2, "ema": 0.9, "sigma": [0.0, 0.1]},
    "training": {"steps": 4, "batch_size": 2, "ema": 0.9},
    "validation": {"every": 5, "samples": 1, "images": 0},
    "checkpoints": {"every": 2, "keep": 3},
    "threads": 1,
}
RUNS = {
    "ct": {
        "operator": {"kind": "ct", "angles": 12, "snr": 40},
        "data": {"phantoms": {"kind": "ellipses", "n": 12, "size": 16}},
        "red": {
            "tau": 0.02,
            "step": "gradient",
            "minibatch_size": 4,
            "max_iterations": 20,
            "adjoint_iterations": 10,
        },
    },
    "mri": {
        "operator": {"kind": "mri", "coils": 2, "acceleration": 2, "center_fraction": 0.3},
        "data": {"phantoms": {"kind": "brain", "n": 6, "size": 16}},
        "red": {"tau": 0.02, "max_iterations": 10, "adjoint_iterations": 5},
    },
}


def configuration(kind, folder, workers=0):
    run = COMMON | RUNS[kind] | {"output": str(folder)}
    return run | {"data": run["data"] | {"workers": workers}}


def trainer(folder, kind="ct", of=Trainer):
    return of(read_configuration(configuration(kind, folder)), progress=False)


def assert_same(one, other):
    one, other = load_checkpoint(one), load_checkpoint(other)
    for part in ("model", "ema"):
        assert one[part].keys() == other[part].keys()
        for name, value in one[part].items():
            assert torch.equal(value, other[part][name]), name


def assert_same_runs(one, other):
    last, *_ = list_checkpoints(one)
    assert_same(last, other / last.name)
    assert_same(one / "best.pt", other / "best.pt")
    for name in ("training.csv", "validation.csv"):
        rows = [[line.split(",") for line in (f / name).read_text().splitlines()] for f in (one, other)]
        without_times = [[row[:2] + row[3:] for row in table] for table in rows]
        assert without_times[0] == without_times[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the folder of a run that nothing interrupted."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = trainer(tmp_path_factory.mktemp(kind), kind).fit().last.parent
        return made[kind]

    return get


@pytest.fixture(autouse=True)
def _no_report(monkeypatch):
    """Drawing the report takes longer than these runs."""
    monkeypatch.setattr("oder_fast.training.trainer.write_report", lambda *_, **__: None)


# One process imports, and each run is a fork of it: it is killed some time after it opened or renamed so many files.
RUNS_IN_FORKS = """
import json, os, signal, sys, threading, time
import torch.utils.tensorboard
from oder_fast.training import Trainer, read_configuration, trainer
trainer.write_report = lambda *_, **__: None
for line in sys.stdin:
    configuration, at, delay = json.loads(line)
    child = os.fork()
    if child == 0:
        run, count = os.getpid(), 0
        def die():
            time.sleep(delay)
            os.kill(run, signal.SIGKILL)
        def watch(event, arguments):
            global count
            if event in ("open", "os.rename") and os.getpid() == run:
                if str(arguments[0]).startswith(configuration["output"]):
                    count += 1
                    if count == at:
                        threading.Thread(target=die).start()
        sys.addaudithook(watch)
        assert Trainer(read_configuration(configuration), progress=False).fit(resume=True).reason == "finished"
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize(("kind", "kills"), [("ct", 30), ("mri", 10)])
def test_killed_again_and_again_it_ends_as_if_it_had_not_been(whole, tmp_path, kind, kills):
    draw = random.Random(0)
    expected, folder = whole(kind), tmp_path / "run"
    with (
        (tmp_path / "said").open("w+") as said,
        subprocess.Popen(
            [sys.executable, "-c", RUNS_IN_FORKS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        ) as forks,
    ):

        def run(at, delay):
            call = json.dumps([configuration(kind, folder, workers=1), at, delay])
            print(call, file=forks.stdin, flush=True)
            status = int(forks.stdout.readline())
            assert status in (0, -signal.SIGKILL), (tmp_path / "said").read_text()
            return status

        while kills:
            if run(draw.randint(1, 40), draw.choice([0.0, draw.uniform(0, 0.05)])) == 0:
                assert_same_runs(expected, folder)
                shutil.rmtree(folder)
                continue
            kills -= 1
            for path in list_checkpoints(folder):
                load_checkpoint(path)  # none is half there
        assert run(0, 0.0) == 0
        forks.stdin.close()
    assert_same_runs(expected, folder)
    assert [p.name for p in folder.glob(".*")] == [".lock"]


FILLS_UP = """
import json, resource, sys
from oder_fast import cli
from oder_fast.training import Trainer
step, at = Trainer._step, int(sys.argv[2])
def filling(self, *arguments):
    if self._overall() == at:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
    return step(self, *arguments)
Trainer._step = filling
sys.exit(cli.main(["train", sys.argv[1]]))
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize(("at", "size"), [(5, 4096), (9, 4096), (3, 0)])
def test_a_disk_that_takes_no_more(whole, tmp_path, at, size):
    if resource.getrlimit(resource.RLIMIT_FSIZE)[1] != resource.RLIM_INFINITY:
        pytest.skip("the size of files is limited here")
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(configuration("ct", tmp_path / "run")))
    command = [sys.executable, "-c", FILLS_UP, str(file), str(at), str(size)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    *_, last = ended.stderr.splitlines()
    assert f"cannot be written any more: {os.strerror(errno.EFBIG)}; the newest checkpoint is " in last
    trainer(tmp_path / "run").fit(resume=True)
    assert_same_runs(whole("ct"), tmp_path / "run")


@pytest.mark.exhaustive
def test_what_the_thread_of_tensorboard_could_not_write(tmp_path, capfd):
    folder = tmp_path / "run"

    class Fails(Trainer):
        def _step(self, *arguments):
            if self._overall() == 3:
                writer = self.logs.board.file_writer.event_writer
                writer._async_writer._writer._writer.write = self.refuse
            return super()._step(*arguments)

        def refuse(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(
        RunError, match="run: cannot be written any more: No space left on device; the newest"
    ):
        trainer(folder, of=Fails).fit()
    assert "Traceback" not in capfd.readouterr().err


def test_what_a_kill_left_half_written_is_removed(tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def kill(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", kill)  # `atomic` has written then, and renamed nothing
        patch.setattr("pathlib.Path.unlink", kill)  # a killed process does not clean up
        with pytest.raises(Killed):
            trainer(tmp_path).fit()
    assert [p for p in tmp_path.glob(".*") if p.name != ".lock"]
    (tmp_path / ".mine-1.csv").touch()
    trainer(tmp_path).fit(resume=True)
    assert {p.name for p in tmp_path.rglob(".*")} == {".lock", ".mine-1.csv"}


@pytest.mark.parametrize("what", ["the folder", "its files", "another run"])
def test_a_folder_that_is_removed(tmp_path, what):
    folder = tmp_path / "run"

    class Removes(Trainer):
        def _step(self, *arguments):
            if self._overall() == 5:
                shutil.rmtree(folder)
                if what != "the folder":
                    folder.mkdir()
                if what == "another run":
                    (folder / "training.csv").write_text("of another run\n")
            return super()._step(*arguments)

    message = (
        r"run: cannot be written any more: it was removed while .*; the newest checkpoint is none; mend it"
    )
    with pytest.raises(RunError, match=message):
        trainer(folder, of=Removes).fit()
    left = {p.name for p in folder.rglob("*")} if folder.exists() else set()
    assert left == ({"training.csv"} if what == "another run" else set())


def test_a_table_that_is_removed(tmp_path):
    class Removes(Trainer):
        def _step(self, *arguments):
            if self._overall() == 3:
                (tmp_path / "training.csv").unlink()
            return super()._step(*arguments)

    with pytest.raises(RunError, match="cannot be written any more: No such file or directory"):
        trainer(tmp_path, of=Removes).fit()


def test_a_clock_that_is_set_back(whole, tmp_path, monkeypatch):
    class Stops(Trainer):
        def _step(self, *arguments):
            if self._overall() == 5:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super()._step(*arguments)

    now = iter(range(2_000_000_000, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    with pytest.raises(RunError, match=r"is .*checkpoint-0-00000004\.pt; mend it"):
        trainer(tmp_path, of=Stops).fit()
    for age, path in enumerate(list_checkpoints(tmp_path), 1):
        os.utime(path, (age * 1e8, age * 1e8))  # the oldest seems the newest
    trainer(tmp_path).fit(resume=True)
    assert_same_runs(whole("ct"), tmp_path)
