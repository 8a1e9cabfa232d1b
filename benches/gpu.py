"""How the benches time kernels on a GPU, and the floor under what a kernel takes.

A floor is computed, never measured: the largest of a kernel's bytes, operations, bytes of shared memory and instructions,
each over the rate of the machine. The rates of an H200 are constants; those of another GPU are measured where they are
asked for.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

import pytest
import torch

T = TypeVar("T")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

# Seconds of one candidate's calls that are timed together, and beyond which a call needs no run before it.
SWEEP, LONG = 0.02, 0.05


@dataclass(frozen=True)
class Machine:
    """What a GPU does at best.

    Attributes:
        name: As the driver tells it.
        bandwidth: Bytes a second that a copy in device memory reads and writes.
        processors: Number of multiprocessors.
        clock: Hz, under load.
        l2: Bytes of its last cache.
    """

    name: str
    bandwidth: float
    processors: int
    clock: float
    l2: int

    @property
    def instructions(self) -> float:
        """Instructions a second, each thread's counted: four warps of 32 a clock and multiprocessor."""
        return 128 * self.processors * self.clock

    @property
    def arithmetic(self) -> float:
        """float32 operations a second, a multiply-add counted as two."""
        return 2 * self.instructions

    @property
    def shared(self) -> float:
        """Bytes a second from shared memory: 32 banks of 4 bytes a clock and multiprocessor."""
        return 128 * self.processors * self.clock


# A measured device-to-device copy; 67 TFLOP/s by the datasheet, which is this clock; the L2 cache that torch reports.
H200 = Machine("NVIDIA H200", 4.3e12, 132, 1.98e9, 60 * 2**20)


@dataclass(frozen=True)
class Work:
    """What one launch has to do at least.

    Attributes:
        bytes: Through device memory, each input read once and each output written once.
        operations: In float32.
        shared: Bytes through shared memory.
        instructions: Of the inner loop, counted in the compiled code, each thread's.
    """

    bytes: float
    operations: float
    shared: float = 0.0
    instructions: float = 0.0

    def times(self, machine: Machine) -> dict[str, float]:
        """Seconds that each resource takes by itself."""
        return {
            "memory": self.bytes / machine.bandwidth,
            "arithmetic": self.operations / machine.arithmetic,
            "shared memory": self.shared / machine.shared,
            "instructions": self.instructions / machine.instructions,
        }


def floor(work: Sequence[Work], machine: Machine) -> tuple[float, str]:
    """Return the seconds that launches one after another take at least, and what binds the longest of them."""
    largest = [max(w.times(machine).items(), key=lambda item: item[1]) for w in work]
    return sum(seconds for _, seconds in largest), max(largest, key=lambda item: item[1])[0]


# ------------------------------------------------------------------ the machine that is here


@cache
def machine() -> Machine:
    """Return the rates of the GPU that is here: constants of an H200, measured ones of any other."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    here = replace(H200, processors=properties.multi_processor_count, l2=properties.L2_cache_size)
    if properties.name == H200.name:
        return here
    # A product of matrices stays below the peak, so that these floors are a little too high.
    clock = matmul_rate() / (256 * here.processors)
    return replace(here, name=properties.name, bandwidth=copy_rate(), clock=clock)


def copy_rate() -> float:
    """Measure the bytes a second that a copy of 2 GiB reads and writes."""
    source = torch.rand(2**29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / time_in_turn({"copy": lambda _: target.copy_(source)}, 1)["copy"]


def matmul_rate() -> float:
    """Measure the float32 operations a second of a product of matrices."""
    n, before = 8192, torch.backends.cuda.matmul.allow_tf32
    a, b = (torch.randn(n, n, device="cuda") for _ in range(2))
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        return 2 * n**3 / time_in_turn({"product": lambda _: a @ b}, 1)["product"]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


# ------------------------------------------------------------------ timing


def copies(size: float, l2: int) -> int:
    """Return how many sets of inputs of `size` bytes exceed twice the last cache, two at least."""
    return max(2, int(2 * l2 // size) + 1)


def rotated(inputs: T, size: float) -> list[T]:
    """Return inputs of `size` bytes and as many deep copies as no cache keeps from one round of calls to the next."""
    return [inputs, *(copy.deepcopy(inputs) for _ in range(copies(size, machine().l2) - 1))]


class Stopwatch:
    """Time on the device: by events, of a captured graph where asked for."""

    def prepare(self, calls: Callable[[], object], graph: bool) -> Callable[[], object]:
        """Return what runs the calls: a replay of their graph, or themselves."""
        if not graph:
            return calls
        # Capturing wants all that is made once to be there, and another stream than the default one.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            calls()
        torch.cuda.current_stream().wait_stream(stream)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            calls()
        return captured.replay

    def time(self, run: Callable[[], object], twice: bool) -> float:
        """Return seconds of a run; of the second of two, so that launching it is hidden behind the first."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if twice:
            run()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def time_in_turn(
    candidates: Mapping[str, Callable[[int], object]],
    n_copies: int,
    *,
    eager: Collection[str] = (),
    seconds: float = 1.0,
    rounds: int = 5,
    stopwatch: Any = None,
) -> dict[str, float]:
    """Return the median seconds of a call of each candidate, timed in turn.

    Args:
        candidates: Functions of the number of the copy of the inputs to take, so that none is found in a cache.
        n_copies: Of the inputs.
        eager: Those that are called as a user calls them, not captured in a graph.
        seconds: To spend, about.
        rounds: At least.
        stopwatch: In place of `Stopwatch`, for tests.
    """
    stopwatch = Stopwatch() if stopwatch is None else stopwatch
    runs = {}
    for name, call in candidates.items():
        call(0)
        once = stopwatch.time(lambda call=call: call(0), False)
        n_calls = min(n_copies, math.ceil(SWEEP / max(once, 1e-6)))

        def calls(call: Callable[[int], object] = call, n_calls: int = n_calls) -> list[object]:
            # Results are kept until the last call: those too must not share a place in the cache.
            return [call(k) for k in range(n_calls)]

        runs[name] = stopwatch.prepare(calls, name not in eager), n_calls, once < LONG
    times: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < rounds:
        for name, (run, n_calls, short) in runs.items():
            times[name].append(stopwatch.time(run, short) / n_calls)
    return {name: statistics.median(t) for name, t in times.items()}


def add_row(
    report: Any,
    op: str,
    shape: str,
    times: dict[str, float],
    work: Sequence[Work],
    error: float | None = None,
    note: str = "",
    backend: str = "cuda",
) -> None:
    """Add the row of a backend, ``times[backend]``, beside its peers and its floor."""
    peers = dict(times)
    seconds, by_call = peers.pop(backend), peers.pop("call by call", None)
    least, binds = floor(work, machine())
    notes = [f"{100 * least / seconds:.0f} % of its floor, {1e6 * least:.1f} us by {binds}"]
    if by_call is not None:
        notes.append(f"{1e6 * by_call:.0f} us called without a graph")
    if note:
        notes.append(note)
    report.add(op, backend, shape, seconds, peers=peers, error=error, note="; ".join(notes))
