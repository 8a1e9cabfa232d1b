"""The package as it is installed: what was built, what an import costs, which backend is chosen."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import subprocess
import sys

import pytest
import torch

import oder_fast
from oder_fast._extras import APART, EXTRAS
from oder_fast.ops import Detector, backends
from without_torchvision import import_deepinv


def test_build_info_tells_what_runs_here():
    info = oder_fast.build_info()
    assert info["backends"]["reference"] == "available"
    assert info["backends"]["cpu"] == "available"
    assert info["cpu"]["isa"] in info["cpu"]["isas"]
    assert "baseline" in info["cpu"]["isas"]
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


def test_one_pool_of_threads():
    with open("/proc/self/maps") as maps:
        pools = {line.split()[-1] for line in maps if "libgomp" in line}
    assert len(pools) == 1


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
