"""`pytest` runs tests/; `pytest --benchmark` runs benches/ and prints throughput. Fixtures of both."""

from __future__ import annotations

import importlib
import os
from contextlib import nullcontext

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from oder_fast.ops import backends


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--benchmark", action="store_true", help="run benches/ in place of tests/ and print throughput"
    )
    parser.addoption("--all", action="store_true", help="run the exhaustive tests, too")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--benchmark") and config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = [str(config.rootpath / "benches")]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("exhaustive")])
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]


def _cpu_builds() -> list[str]:
    try:
        baseline = importlib.import_module("oder_fast._cpu_baseline")
    except ImportError:
        return []
    return [f"cpu-{isa}" for isa in baseline.supported_isas()]


COMPILED = _cpu_builds()
BUILDS = [*COMPILED, *(["cuda", "triton"] if torch.cuda.is_available() else [])]


class Build:
    """A backend under test: how to call it, and where its tensors live."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.backend = name.split("-")[0]
        self.device = "cuda" if self.backend in ("cuda", "triton") else "cpu"
        self.dtypes = backends.DTYPES[self.backend]

    def __enter__(self) -> Build:
        self._context = (
            backends.use_module("cpu", importlib.import_module(f"oder_fast._{self.name.replace('-', '_')}"))
            if self.backend == "cpu"
            else nullcontext()
        )
        self._context.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(*error)


@pytest.fixture(params=BUILDS)
def build(request: pytest.FixtureRequest) -> Build:
    """Every backend that runs here: each instruction set of the C++ one, and on a GPU the CUDA and Triton ones."""
    with Build(request.param) as result:
        yield result


@pytest.fixture(
    params=[pytest.param(b, marks=[pytest.mark.exhaustive] * (b in COMPILED[1:])) for b in BUILDS]
)
def fastest(request: pytest.FixtureRequest) -> Build:
    """As `build`; of the instruction sets the first tier takes the fastest alone."""
    with Build(request.param) as result:
        yield result


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    """Threads only wait for each other at the sizes of tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _fill_uninitialized_memory():
    """Give fresh tensors NaN, so that a kernel that leaves an element unwritten is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = fill
