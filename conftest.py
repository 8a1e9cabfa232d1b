"""`pytest` runs tests/; `pytest --benchmark` runs benches/ and prints throughput. Fixtures of both."""

from __future__ import annotations

import importlib
import os
from contextlib import nullcontext

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from oder_fast.ops import faces


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--benchmark", action="store_true", help="run benches/ in place of tests/ and print throughput"
    )
    parser.addoption("--all", action="store_true", help="run the exhaustive tests, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all"):
        left_out = [item for item in items if item.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--benchmark") and config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = [str(config.rootpath / "benches")]


def _cpu_faces() -> list[str]:
    try:
        baseline = importlib.import_module("oder_fast._cpu_baseline")
    except ImportError:
        return []
    return [f"cpu-{isa}" for isa in baseline.supported_isas()]


COMPILED = _cpu_faces()
FACES = [*COMPILED, *(["cuda", "triton"] if torch.cuda.is_available() else [])]


class Face:
    """A face under test: how to call it, and where its tensors live."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.backend = name.split("-")[0]
        self.device = "cuda" if self.backend in ("cuda", "triton") else "cpu"
        self.dtypes = faces.DTYPES[self.backend]

    def __enter__(self) -> Face:
        self._context = (
            faces.use_module("cpu", importlib.import_module(f"oder_fast._{self.name.replace('-', '_')}"))
            if self.backend == "cpu"
            else nullcontext()
        )
        self._context.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(*error)


@pytest.fixture(params=FACES)
def face(request: pytest.FixtureRequest) -> Face:
    """Every face that runs here: each instruction set of the C++ one, and on a GPU the CUDA and Triton ones."""
    with Face(request.param) as result:
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
