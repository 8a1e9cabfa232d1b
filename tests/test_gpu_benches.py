"""The benches for GPUs as far as they run without one: floors, the order of timing, the script around them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from cases import angles_over

import bench_diffraction
import bench_fourier
import bench_radon
import bench_red_update
import gpu
import launch_kernels
from gpu import H200, Machine, Work

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benches" / "run_gpu.sh"


# ------------------------------------------------------------------ floors


def test_rates_of_an_h200_follow_from_its_clock():
    assert H200.arithmetic == pytest.approx(67e12, rel=0.01)
    assert H200.shared == pytest.approx(33.5e12, rel=0.01)
    assert H200.instructions == H200.arithmetic / 2


def test_a_floor_is_what_binds_of_one_launch_and_the_sum_of_several():
    machine = Machine(
        "of round numbers", 1e12, 100, 1e9, 2**20
    )  # 12.8e12 instructions and bytes of shared memory
    copy, multiply = Work(2e6, 1e6), Work(1e6, 1e6, shared=128e6, instructions=64e6)
    assert gpu.floor([copy], machine) == (pytest.approx(2e-6), "memory")
    assert gpu.floor([multiply], machine) == (pytest.approx(10e-6), "shared memory")
    assert gpu.floor([copy, multiply], machine) == (pytest.approx(12e-6), "shared memory")


def microseconds(work):
    seconds, binds = gpu.floor(work, H200)
    return pytest.approx(1e6 * seconds, rel=0.01), binds


def test_floors_are_those_that_the_benches_state():
    small, large = (angles_over(n) for n in (90, 360))
    assert microseconds(bench_radon.forward_work(1, 512, 725, small)) == (7.05, "instructions")
    assert microseconds(bench_radon.forward_work(8, 1024, 1449, large))[0] == 650
    assert microseconds(bench_radon.adjoint_work(1, 512, 725, small)) == (7.93, "instructions")
    assert microseconds(bench_radon.adjoint_work(8, 1024, 1449, large)) == (722, "shared memory")
    assert microseconds(bench_radon.gradient_work(1, 512, 725, small[::3]))[0] == 4.99
    assert microseconds(bench_radon.gradient_work(8, 1024, 1449, large[::3]))[0] == 457
    assert microseconds(bench_fourier.lines_work(1, 16, 320, 320, 80)) == (4.9, "shared memory")
    assert microseconds(bench_fourier.lines_work(8, 16, 368, 640, 92)) == (119, "shared memory")
    points = bench_fourier.points_work
    assert microseconds(points(1, 16, 320, 320, 0.25, H200.l2)) == (11.7, "shared memory")
    assert microseconds(points(8, 16, 640, 368, 0.25, H200.l2)) == (289, "memory")
    assert microseconds(bench_red_update.update_work(512 * 512, True)) == (1.46, "memory")
    assert microseconds(bench_red_update.update_work(8 * 512 * 512, True)) == (11.7, "memory")
    assert microseconds(bench_red_update.update_work(2**26, True)) == (375, "memory")
    assert microseconds(bench_diffraction.gradient_work(256, 8, 0.286e6)) == (2.48, "memory")
    assert microseconds(bench_diffraction.gradient_work(512, 8, 3.18e6)) == (17.2, "instructions")
    assert microseconds(bench_diffraction.gram_work(256, 8, 0.520, 0.1277)) == (3.52, "memory")
    assert microseconds(bench_diffraction.gram_work(512, 8, 0.523, 0.1341)) == (14.2, "memory")


def test_bytes_and_crossings_are_counted_right():
    # Of a view along the rows each of 4 x 4 pixels is crossed once; at 45 degrees 4 / sqrt(2) rays cross a line.
    assert bench_radon.crossings(4, torch.tensor([0.0])) == 16
    assert bench_radon.crossings(4, angles_over(4)) == pytest.approx(16 * (2 + 2 / 2**0.5))
    # 16 coils of maps, 80 of 320 lines of each, the image twice: complex64.
    (lines,) = bench_fourier.lines_work(1, 16, 320, 320, 80)
    assert lines.bytes == 8 * (16 * 320 * 320 + 16 * 80 * 320 + 2 * 320 * 320)
    (update,) = bench_red_update.update_work(10, True)
    assert update.bytes == 10 * 6 * 4


@pytest.mark.parametrize(
    ("n", "plan"),
    [
        (1, [1]),
        (2, [2]),
        (8, [8]),
        (16, [4, 4]),
        (128, [4, 4, 8]),
        (320, [8, 8, 5]),
        (368, [4, 4, 23]),
        (45, [3, 3, 5]),
    ],
)
def test_radices_are_those_of_the_kernels(n, plan):
    assert bench_fourier.radices(n) == plan


# ------------------------------------------------------------------ timing


class Fake:
    """A stopwatch by which each call takes the time it is named after, and the order is kept."""

    def __init__(self):
        self.now, self.timed, self.graphs = 0.0, [], []

    def prepare(self, calls, graph):
        self.graphs.append(graph)
        return calls

    def time(self, run, twice):
        if twice:
            run()
        begin = self.now
        run()
        self.timed.append(self.now - begin)
        return self.timed[-1]


def test_candidates_are_timed_in_turn_over_all_copies():
    watch, seen = Fake(), {"fast": [], "slow": []}

    def candidate(name, seconds):
        def call(k):
            seen[name].append(k)
            watch.now += seconds

        return call

    candidates = {"fast": candidate("fast", 1e-4), "slow": candidate("slow", 0.1)}
    times = gpu.time_in_turn(candidates, 7, eager=["slow"], seconds=0, rounds=4, stopwatch=watch)
    assert times == {"fast": pytest.approx(1e-4), "slow": pytest.approx(0.1)}
    assert watch.graphs == [True, False]
    assert set(seen["fast"]) == set(range(7))
    # Long calls take one copy, and none before it; then rounds of both.
    assert set(seen["slow"]) == {0}
    assert watch.timed[2:] == pytest.approx([7e-4, 0.1] * 4)
    assert len(seen["slow"]) == 2 + 4


def test_copies_exceed_the_cache_twice():
    for size, l2 in ((1, 10), (3, 10), (7, 10), (25, 10)):
        n = gpu.copies(size, l2)
        assert n * size > 2 * l2
        assert n == 2 or (n - 1) * size <= 2 * l2


def test_a_row_tells_peers_and_the_share_of_the_floor(monkeypatch):
    monkeypatch.setattr(gpu, "machine", lambda: H200)
    rows = []

    class Report:
        def add(self, *args, **options):
            rows.append((args, options))

    times = {"cuda": 2e-6, "triton": 4e-6, "torch": 8e-6, "call by call": 3e-5}
    gpu.add_row(Report(), "copy", "shape", times, [Work(4.3e6, 0)], 1e-7)
    ((args, options),) = rows
    assert args == ("copy", "cuda", "shape", 2e-6)
    assert options["peers"] == {"triton": 4e-6, "torch": 8e-6}
    assert options["note"] == "50 % of its floor, 1.0 us by memory; 30 us called without a graph"


# ------------------------------------------------------------------ the script


def test_kernels_are_launched_at_all_shapes_of_the_operator_tests():
    assert launch_kernels.small("cpu", "cpu", large=False) > 100
    assert set(launch_kernels.tiled_shapes()) == {"radon", "fourier", "diffraction", "red"}


def stub(folder, name, text):
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def run(tmp_path, **environment):
    return subprocess.run(
        ["bash", SCRIPT],
        env={"PATH": f"{tmp_path / 'bin'}:{os.defpath}", "OUT": str(tmp_path / "out"), "HOME": str(tmp_path)}
        | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


needs_bash = pytest.mark.skipif(
    shutil.which("bash") is None or shutil.which("flock") is None, reason="the script needs bash and flock"
)


@needs_bash
@pytest.mark.parametrize(
    ("smi", "python", "message"),
    [
        (None, None, "no NVIDIA GPU here: nvidia-smi is not on the PATH"),
        ("echo No devices were found; exit 6", None, "nvidia-smi says: No devices were found"),
        ("echo NVIDIA H200", "echo no module named torch >&2; exit 1", "has no torch: no module named torch"),
        ("echo NVIDIA H200", "echo 2.11.0+cpu False", r"torch 2.11.0+cpu of .* sees no CUDA device"),
    ],
)
def test_script_stops_at_once_where_there_is_nothing_to_run_on(smi, python, message, tmp_path):
    (tmp_path / "bin").mkdir()
    if smi is not None:
        stub(tmp_path / "bin", "nvidia-smi", smi)
    if python is not None:
        stub(tmp_path / "bin", "python3", python)
    elif shutil.which("nvidia-smi", path=os.defpath):
        pytest.skip("a GPU is here")
    done = run(tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert message.replace(r".*", "python3") in done.stderr
    assert not list((tmp_path / "out").glob("*.log"))


# What stands for python3: torch is there, `packages` finds one missing, one file of tests fails, benches write JSON.
PYTHON = """
case "$*" in
  *"import torch"*) echo "2.11.0+cu130 True" ;;
  -) echo "Missing: pydantic>=2.7; bring its wheel" >&2; exit 1 ;;
  *--benchmark-json=*) for a; do case $a in --benchmark-json=*) echo '{}' >"${a#*=}" ;; esac; done ;;
  *tests/test_radon.py*) echo "1 failed"; exit 1 ;;
  *test_operators.py*) echo "-k: $*"; exit 5 ;;
  *tables.py*) echo record >"$3" ;;
  *) echo "python $*" ;;
esac
"""


@needs_bash
def test_script_goes_on_after_failures_and_tells_them_at_the_end(tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    stub(folder, "nvidia-smi", "echo NVIDIA H200")
    stub(folder, "python3", PYTHON)
    stub(folder, "compute-sanitizer", 'echo "sanitizer $*"; case "$*" in *racecheck*) exit 9 ;; esac')
    stub(folder, "ncu", "case $1 in --import) echo ==PROF== x; echo kernel,us ;; esac")
    done = run(tmp_path)
    assert done.returncode == 1, done.stderr
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {
        "nvidia-h200.log",
        "nvidia-h200.json",
        "nvidia-h200-kernels.csv",
    }
    assert (out / "nvidia-h200-kernels.csv").read_text() == "kernel,us\n"
    found = {line.split()[1]: line.split()[0] for line in done.stdout.split("s in all;")[1].splitlines()[1:]}
    failed = {"packages:", "tests:", "racecheck:"}
    assert found == dict.fromkeys(failed, "FAILED") | dict.fromkeys(
        ["build:", "memcheck:", "synccheck:", "benches:", "table:", "ncu:"], "ok"
    )
    assert "Missing: pydantic>=2.7; bring its wheel" in done.stdout
    log = (out / "nvidia-h200.log").read_text()
    assert "---- tests/test_radon.py : exit status 1" in log
    assert "-k cuda and not triton tests/test_operators.py" in log
    assert "sanitizer --tool memcheck --kernel-name kns=oder" in log
    parts = {}
    for file, which in re.findall(r"^---- (tests/\w+\.py) (.*): exit status", log, re.M):
        parts.setdefault(file, []).append(which)
    assert {ROOT / file for file in parts} == set(ROOT.glob("tests/test_*.py"))
    for file, conditions in parts.items():
        words = sorted({w for c in conditions for w in re.findall(r"\w+", c)} - {"and", "or", "not"})
        for values in product([False, True], repeat=len(words)):
            chosen = [c for c in conditions if not c or eval(c, dict(zip(words, values, strict=True)))]
            assert len(chosen) == 1, (file, words, values)


# A clock that stands still until the tests are waited for, and `timeout` whose alarm goes off once they have begun, however
# long that takes.
CLOCK = """
unset SECONDS
SECONDS=0
wait() {
  builtin wait
  SECONDS=2
}
timeout() {
  local options=()
  while [[ $1 == --* ]]; do options+=("$1"); shift; done
  echo "$1 ${*:2}" >>"$LIMITS"
  command timeout "${options[@]}" 600 "${@:2}" &
  local alarm=$! status
  if [[ $* == *"bash -c tests" ]]; then
    until grep -qs begun "$work"/*.pytest; do sleep 0.05; done
    kill -ALRM "$alarm"
  fi
  builtin wait "$alarm"
}
"""


@needs_bash
def test_script_says_which_tools_are_missing_and_ends_in_time(tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    stub(folder, "nvidia-smi", "echo NVIDIA H200")
    torch_is_there = 'case "$*" in *"import torch"*) echo "2.11.0 True" ;;'
    stub(folder, "python3", torch_is_there + " *test_radon.py*) echo begun; exec sleep 600 ;; esac")
    (tmp_path / "clock").write_text(CLOCK)
    limits = tmp_path / "limits"
    clock = {"BASH_ENV": str(tmp_path / "clock"), "LIMITS": str(limits)}
    done = run(tmp_path, BUDGET="6", CUDA_HOME=str(tmp_path), **clock)
    assert done.returncode == 1, done.stderr
    found = done.stdout.splitlines()
    assert any(
        re.match(r"FAILED   tests: exit status 124, \d+ s, stopped at its limit", line) for line in found
    )
    assert limits.read_text().splitlines() == ["6 bash -c packages", "6 bash -c build", "6 bash -c tests"]
    assert "begun\n" in (tmp_path / "out" / "nvidia-h200.log").read_text()
    assert "FAILED   benches: not begun, the 6 s are used up" in found
    assert "skipped  memcheck: compute-sanitizer is not on the PATH" in found
    assert "skipped  table: the benches wrote no JSON" in found
    assert "skipped  ncu: ncu (Nsight Compute) is not on the PATH" in found


@needs_bash
def test_script_names_a_folder_of_wheels_that_is_not_there(tmp_path):
    done = run(tmp_path, WHEELS=str(tmp_path / "none"), PYTHON=sys.executable)
    assert done.returncode == 2
    assert "there is no folder of wheels" in done.stderr


@pytest.mark.skipif(not (ROOT / ".github").exists(), reason="the workflows are not here")
def test_the_workflow_runs_the_script_when_it_is_asked_to_alone():
    """Where a pull request started it, its code would run on somebody's machine."""
    workflow = yaml.safe_load((ROOT / ".github/workflows/gpu.yml").read_text())
    assert set(workflow[True]) == {"workflow_dispatch"}  # YAML reads "on" as true
    (job,) = workflow["jobs"].values()
    assert job["runs-on"] == ["self-hosted", "gpu"]
    (step,) = (step for step in job["steps"] if "run" in step)
    assert step["run"] == SCRIPT.relative_to(ROOT).as_posix()
    told = re.findall(r"^# ([A-Z]+) {2,}", SCRIPT.read_text(), re.MULTILINE)
    assert set(step["env"]) <= set(told)
    (upload,) = (step for step in job["steps"] if "upload-artifact" in step.get("uses", ""))
    assert upload["with"]["path"] == step["env"]["OUT"]
    assert upload["if"] == "always()"
