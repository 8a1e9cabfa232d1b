"""The package as it is installed: what was built, what an import costs, which backend is chosen."""

from __future__ import annotations

import doctest
import importlib
import json
import os
import pkgutil
import re
import runpy
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import setuptools
import torch
from test_layout import tracked

import oder_fast
from oder_fast import CartesianMRI
from oder_fast._extras import APART, EXTRAS
from oder_fast.ops import Detector, backends
from without_torchvision import import_deepinv

ROOT = Path(__file__).resolve().parents[1]
beside_the_sources = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="the sources are not here")


def test_build_info_tells_what_runs_here():
    info = oder_fast.build_info()
    assert info["backends"]["reference"] == "available"
    assert info["backends"]["cpu"] == "available"
    assert info["cpu"]["isa"] in info["cpu"]["isas"]
    assert "baseline" in info["cpu"]["isas"]
    assert info["cpu"]["built"]
    assert info["cpu"]["openmp"] is ("clang" not in info["cpu"]["compiler"])
    assert info["cuda"]["reason"]
    if not info["cuda"]["built"]:
        assert info["backends"]["cuda"] != "available"


def test_import_loads_nothing_heavy():
    code = (
        "import sys, torch; before = set(sys.modules); import oder_fast; "
        "print(' '.join(m for m in set(sys.modules) - before if not m.startswith('oder_fast')))"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    loaded = {name.split(".")[0] for name in run.stdout.split()}
    optional = {module for modules in (*EXTRAS.values(), *APART.values()) for module in modules}
    assert not loaded & {"triton", "scipy", "sympy", *optional}
    assert "torch._dynamo" not in run.stdout.split()


def test_the_version_is_the_same_everywhere():
    declared = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert oder_fast.__version__ == declared, "install again"
    if not (ROOT / "CITATION.cff").exists():
        pytest.skip("the sources are not here")
    cited = re.search(r"^version: (.*)", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1]
    assert cited == declared
    newest = re.search(r"^## (.*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    release, dated = re.fullmatch(r"(\S+) \((unreleased|\d{4}-\d{2}-\d{2})\)", newest).groups()
    assert release == declared.partition(".dev")[0]
    assert dated == "unreleased" or release == declared, "a version that is out is no version in the making"
    assert 'version = metadata.version("oder-fast")' in (ROOT / "docs/conf.py").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="what is mapped stands in /proc on Linux alone")
def test_one_pool_of_threads():
    with open("/proc/self/maps") as maps:
        pools = {line.split()[-1] for line in maps if "libgomp" in line}
    assert len(pools) == 1


def test_threads_of_python_call_the_kernels_at_once():
    generator = torch.Generator().manual_seed(0)
    cases = []
    # Lengths that no other test has: all threads find no table of the transform, and make it at once.
    for n in range(4001, 5001, 100):
        image = torch.randn(1, 2, n, dtype=torch.complex64, generator=generator)
        every_line = torch.ones(n, dtype=torch.bool)
        cases.append((image, CartesianMRI(torch.ones_like(image), every_line, backend="cpu")))
    start = threading.Barrier(4)

    def measure_all(_):
        results = []
        for image, mri in cases:
            start.wait()
            results.append(mri.adjoint(mri(image)))
        return results

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(measure_all, range(4)))
    for (image, _), one, *others in zip(cases, *found, strict=True):
        # All samples of one coil: the adjoint inverts.
        torch.testing.assert_close(one, image, rtol=1e-4, atol=1e-4)
        assert all(torch.equal(other, one) for other in others)


def test_the_environment_chooses_the_backend(monkeypatch):
    x, angles = torch.ones(1, 4, 4), torch.zeros(1)
    monkeypatch.setenv("ODER_FAST_BACKEND", "reference")
    assert backends.resolve("auto", x.device, x.dtype) == "reference"
    monkeypatch.setenv("ODER_FAST_BACKEND", "cuda")
    if not torch.cuda.is_available():
        with pytest.raises(oder_fast.ops.BackendUnavailableError, match=r"takes CUDA tensors|not built"):
            oder_fast.ops.radon_forward(x, angles, Detector(4))
    monkeypatch.setenv("ODER_FAST_BACKEND", "fast")
    with pytest.raises(ValueError, match="backend must be one of"):
        oder_fast.ops.radon_forward(x, angles, Detector(4))
    monkeypatch.delenv("ODER_FAST_BACKEND")
    assert backends.resolve("auto", x.device, x.dtype) == "cpu"
    assert backends.resolve("auto", x.device, torch.bfloat16) == "reference"


MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(oder_fast.__path__, "oder_fast.")
    if not m.name.rpartition(".")[2].startswith("_c") and ".kernels" not in m.name
)


# They train, or import what takes seconds.
LONG = ("oder_fast.training.trainer", "oder_fast.reconstruction.run", "oder_fast.deepinv")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.exhaustive] if name in LONG else [])
        for name in ("oder_fast", *MODULES)
    ],
)
def test_examples_in_docstrings(name):
    if name == "oder_fast.deepinv" and import_deepinv() is None:
        pytest.skip("deepinv is not installed: see CONTRIBUTING.md")
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.failed == 0


# ------------------------------------------------------------------ whether C++ is compiled


@pytest.fixture
def build_script(monkeypatch):
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))


@beside_the_sources
def test_a_compiler_is_found_or_named(build_script, monkeypatch, tmp_path):
    find = build_script["find_cxx"]
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CXX", "ODER_FAST_CPU", "ODER_FAST_CUDA"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit, match=r"the C\+\+17 compiler g\+\+ is not on the PATH.*ODER_FAST_CPU=0"):
        find()
    (tmp_path / "g++").touch(0o755)
    assert find() == "g++"
    monkeypatch.setenv("CXX", "clang++")
    with pytest.raises(SystemExit, match=r"the C\+\+17 compiler clang\+\+ is not"):
        find()
    monkeypatch.setenv("CXX", str(tmp_path / "g++"))
    assert find() == str(tmp_path / "g++")
    monkeypatch.setenv("ODER_FAST_CPU", "0")
    assert find() is None
    monkeypatch.setenv("ODER_FAST_CUDA", "1")
    with pytest.raises(SystemExit, match="ODER_FAST_CUDA=1 needs the C"):
        find()
    monkeypatch.setenv("ODER_FAST_CPU", "no")
    with pytest.raises(SystemExit, match="must be 1 or 0, got 'no'"):
        find()


def build(folder, tmp_path, **environment):
    """Run a build of the package where no compiler is on the PATH."""
    empty = tmp_path / "empty"
    empty.mkdir()
    kept = {k: v for k, v in os.environ.items() if k not in ("CXX", "ODER_FAST_CPU", "ODER_FAST_CUDA")}
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-base", tmp_path / "base", "--build-lib", folder],
        cwd=ROOT,
        env={**kept, "PATH": str(empty), **environment},
        capture_output=True,
        text=True,
    )


@beside_the_sources
def test_without_a_compiler_the_build_ends_in_one_sentence(tmp_path):
    run = build(tmp_path / "package", tmp_path)
    assert run.returncode != 0
    assert "Traceback" not in run.stderr
    last = run.stderr.splitlines()[-1]
    assert last.startswith("oder-fast: the C++17 compiler g++ is not on the PATH")
    assert "ODER_FAST_CPU=0" in last


WITHOUT = """
import sys

# An editable install elsewhere offers its compiled modules to a package that has none.
sys.meta_path[:] = [f for f in sys.meta_path if not f.__module__.startswith("__editable__")]
import torch
from oder_fast import DEQRED, ParallelBeamCT, TotalVariation, cli
from oder_fast.ops import backends

cli.main(["info"])
image = torch.ones(1, 16, 16)
ct = ParallelBeamCT(16, 8)
print(backends.resolve("auto", image.device, image.dtype))
print(DEQRED(TotalVariation(0.01), tau=0.003)(ct(image), ct).shape)
ct = ParallelBeamCT(16, 8, backend="cpu")
try:
    ct(image)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.exhaustive
@beside_the_sources
def test_without_the_compiled_kernels_the_reference_runs(tmp_path):
    package = tmp_path / "package"
    (package / "oder_fast").mkdir(parents=True)
    # An earlier build was with a compiler.
    stale = package / "oder_fast" / "_cpu_baseline.cpython-0.so"
    stale.touch()
    run = build(package, tmp_path, ODER_FAST_CPU="0")
    assert run.returncode == 0, run.stderr
    assert "oder-fast: compiles nothing: ODER_FAST_CPU=0" in run.stdout
    assert not stale.exists()
    info = json.loads((package / "oder_fast" / "_build_info.json").read_text())
    left_out = {"built": False, "reason": "ODER_FAST_CPU=0"}
    assert info == {"cpu": left_out, "cuda": left_out}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "  cpu: the C++ kernels were not built; oder_fast.build_info() says why" in done.stdout
    assert "\n  reason: ODER_FAST_CPU=0\n" in done.stdout
    *_, chosen, shape, refused = done.stdout.splitlines()
    assert chosen == "reference"
    assert shape == "torch.Size([1, 16, 16])"
    assert refused.startswith("backend 'cpu' is not available: the C++ kernels were not built")
    # Of the sources what Python reads is installed: modules, the Triton kernels and data.
    installed = {path.relative_to(package / "oder_fast") for path in package.rglob("*") if path.is_file()}
    places = {"oder_fast": Path(), "kernels": Path("kernels")}
    sources = [Path(name) for name in tracked() if name.split("/")[0] in places]
    wanted = {places[path.parts[0]].joinpath(*path.parts[1:]) for path in sources}
    assert Path("kernels/radon.py") in wanted
    assert installed == wanted | {Path("_build_info.json")}
