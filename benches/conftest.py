"""How a bench measures: equality first, then candidates in turn in one run, medians, ratios."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import pytest
import torch

import oder_fast
from without_torchvision import import_deepinv

TABLE: list[dict[str, object]] = []


@pytest.fixture
def build(build):
    """The C++ backends: what runs on a GPU is timed by the benches named test_gpu."""
    if build.device != "cpu":
        pytest.skip(f"the {build.name} backend is timed by test_gpu")
    return build


@pytest.fixture(autouse=True)
def _fill_uninitialized_memory():
    """In place of what tests do to fresh tensors: here the time would be counted."""


@dataclass
class Report:
    """One row of the throughput table, kept in the JSON of pytest-benchmark too."""

    benchmark: object
    rows: list[dict[str, object]] = field(default_factory=list)

    def add(
        self,
        op: str,
        backend: str,
        shape: str,
        seconds: float | None,
        *,
        rate: str = "",
        peers: dict[str, float] | None = None,
        note: str = "",
        error: float | None = None,
    ) -> None:
        ratios = {name: round(t / (seconds or 1), 2) for name, t in (peers or {}).items()}
        row = {
            "op": op,
            "backend": backend,
            "shape": shape,
            "ms": None if seconds is None else float(f"{seconds * 1e3:.4g}"),
            "rate": rate,
            "ratio": ratios,
            "note": note,
            "relative_error": error,
        }
        TABLE.append(row)
        self.rows.append(row)


@pytest.fixture
def report(benchmark) -> Report:
    """Collect rows; what `benchmark` itself times is the candidate given to `report.benchmark`."""
    result = Report(benchmark)
    yield result
    benchmark.extra_info["rows"] = result.rows
    benchmark.extra_info["versions"] = {"torch": torch.__version__, "oder_fast": oder_fast.__version__}
    benchmark.extra_info["build"] = oder_fast.build_info()
    # What else the machine does: a load above 1 is of other programs, while a bench on one thread runs.
    benchmark.extra_info["load"] = round(os.getloadavg()[0], 1)
    if torch.cuda.is_available():
        benchmark.extra_info["gpu"] = torch.cuda.get_device_name()


@pytest.fixture(scope="session")
def deepinv():
    return import_deepinv()


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter) -> None:
    if not TABLE:
        return
    terminalreporter.section("throughput (medians; ratios to peers timed in turn in the same run)")
    header = ("op", "backend", "shape", "ms", "rate", "times as fast as", "note")
    rows = [
        (
            str(r["op"]),
            str(r["backend"]),
            str(r["shape"]),
            "" if r["ms"] is None else f"{r['ms']:.4g}",
            str(r["rate"]),
            ", ".join(f"{name} {value:g}x" for name, value in r["ratio"].items()),
            str(r["note"])
            + (f" (error {r['relative_error']:.1e})" if r["relative_error"] is not None else ""),
        )
        for r in TABLE
    ]
    widths = [max(len(row[k]) for row in [header, *rows]) for k in range(len(header))]
    for row in [header, *rows]:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        terminalreporter.write_line(line.rstrip())
