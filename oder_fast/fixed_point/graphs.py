"""Iterations captured as CUDA graphs and replayed: a launch each in place of one for each kernel."""

from __future__ import annotations

import operator
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from .maps import FixedPointMap, Step

# Of a solver, at a map and a state: `Solver._advance`, for one.
Advance = Callable[[FixedPointMap, Any], Step]


class NotCapturedWarning(UserWarning):
    """Iterations were not replayed as a CUDA graph, though that was asked for."""


def tell(reason: str | None, told: set[str], *, stacklevel: int) -> None:
    """Warn of a reason against CUDA graphs, once."""
    if reason is not None and reason not in told:
        told.add(reason)
        warnings.warn(f"cuda_graph: {reason}", NotCapturedWarning, stacklevel=stacklevel)


class Evaluation:
    """How the iterations of one solve are evaluated: each operation by itself."""

    def __init__(self, reason: str | None = None) -> None:
        self._reason = reason

    @property
    def reason(self) -> str | None:
        """Why not, or not to the end, by CUDA graphs, where those were asked for."""
        return self._reason

    def __call__(self, advance: Advance, exact: FixedPointMap, state: Any, drawn: bool) -> Step:
        """Advance the state by the map, or by a minibatch's; what is returned is valid until the next call."""
        return advance(exact.draw() if drawn else exact, state)

    def keep(self, values: Tensor) -> Tensor:
        """Return a result as it is now, whatever is called next."""
        return values


class Captured(Evaluation):
    """Iterations captured and replayed, once they repeat themselves.

    Iterations that take another part of the program are captured each for itself: of the full map, of a minibatch,
    of a tail. The first of a kind runs as always: it is where algorithms are chosen and memory is set up. If it left
    the shapes of the state as they were, the next is captured, which runs nothing, and then replayed.

    A graph reads and writes fixed addresses, so what goes from one iteration to the next (the solver's state, and
    what the map carries) has its places, and each graph ends by bringing there what it made.
    """

    def __init__(self, side: Side, solver: str) -> None:
        super().__init__()
        self.side = side
        self.solver = solver
        self.places: list[Tensor] = []
        self.layout: tuple[Any, ...] | str | None = None  # of the state that lies in the places
        self.graphs: dict[tuple[Advance, bool], tuple[Callable[[], None], Step]] = {}
        self.repeating: set[tuple[Advance, bool]] = set()
        self.changing = False

    @property
    def reason(self) -> str | None:
        """Why not, or not to the end, by CUDA graphs."""
        if self._reason is None and self.changing and not self.graphs:
            return f"the state of {self.solver} had not come to constant shapes when the solve ended"
        return self._reason

    def __call__(self, advance: Advance, exact: FixedPointMap, state: Any, drawn: bool) -> Step:
        """Advance the state; what is returned is valid until the next call."""
        if self._reason is not None:
            return super().__call__(advance, exact, state, drawn)
        kind = advance, drawn
        if kind not in self.repeating:
            return self._watch(kind, exact, state)
        self._settle(exact, state)
        if kind not in self.graphs and not self._capture(kind, exact, state):
            return super().__call__(advance, exact, state, drawn)
        replay, step = self.graphs[kind]
        replay()
        return step

    def keep(self, values: Tensor) -> Tensor:
        """Return a result as it is now, whatever is called next."""
        return values.clone() if self.graphs else values

    def _watch(self, kind: tuple[Advance, bool], exact: FixedPointMap, state: Any) -> Step:
        """Advance as always, and see whether the state keeps its shapes."""
        before = _layout(state)
        step = super().__call__(kind[0], exact, state, kind[1])
        after = _layout(state)
        if isinstance(after, str):
            self._reason = f"the state of {self.solver} cannot lie on the device: {after}"
        elif after == before:
            self.repeating.add(kind)
        self.changing = after != before
        return step

    def _settle(self, exact: FixedPointMap, state: Any) -> None:
        """Bring what goes from one iteration to the next to its places, wherever it was made."""
        values = [*exact.hidden.carried, *_tensors(state)]
        if len(values) == len(self.places) and all(map(operator.is_, values, self.places)):
            return
        layout = _layout(state)
        if layout != self.layout or len(values) != len(self.places):
            self.graphs.clear()
            self.layout, self.places = layout, [_place(v) for v in values]
        else:
            _write(self.places, values)
        remaining = iter(self.places)
        if exact.hidden.carried:
            exact.hidden.carried = tuple(next(remaining) for _ in exact.hidden.carried)
        for name, value in vars(state).items():
            if isinstance(value, Tensor):
                setattr(state, name, next(remaining))
            elif isinstance(value, list):
                setattr(state, name, [next(remaining) for _ in value])

    def _capture(self, kind: tuple[Advance, bool], exact: FixedPointMap, state: Any) -> bool:
        """Capture an iteration, where that can be done."""
        before, carried = dict(vars(state)), exact.hidden.carried

        def iteration() -> Step:
            step = super(Captured, self).__call__(kind[0], exact, state, kind[1])
            values = [*exact.hidden.carried, *_tensors(state)]
            if _layout(state) != self.layout or len(values) != len(self.places):
                raise RuntimeError(f"the state of {self.solver} changed its shapes")
            kept = {_address(place) for place in self.places}
            step = Step(*(v.clone() if _address(v) in kept else v for v in step))
            _write(self.places, values)
            return step

        try:
            self.graphs[kind] = self.side.capture(iteration, exact.hidden.generators)
        except RuntimeError as error:
            said, *_ = str(error).strip().splitlines() or [type(error).__name__]
            self._reason = f"an iteration cannot be captured: {said}"
            return False
        finally:
            # Capturing runs nothing: what was there is there still.
            vars(state).update(before)
            if carried:
                exact.hidden.carried = carried
        return True


def _layout(state: Any) -> tuple[Any, ...] | str:
    """Return all of a solver's state that a graph takes for constant, or why there is more than tensors in it."""
    found: list[Any] = []
    for name, value in vars(state).items():
        if isinstance(value, Tensor | list):
            tensors = [value] if isinstance(value, Tensor) else value
            found.append([(v.shape, v.stride(), v.dtype, v.device) for v in tensors])
        elif isinstance(value, tuple):
            found.append([id(v) for v in value])
        elif value is None or isinstance(value, bool | int | float | str):
            found.append(value)
        else:
            return f"{name} is {type(value).__name__}"
    return tuple(found)


def _tensors(state: Any) -> list[Tensor]:
    """Return the tensors of a state that go from one iteration to the next."""
    found: list[Tensor] = []
    for value in vars(state).values():
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list):
            found.extend(value)
    return found


def _place(value: Tensor) -> Tensor:
    """Return a copy in memory of its own, with the same strides where elements have each their own."""
    if 0 in value.stride():
        return value.clone()
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device).copy_(
        value
    )


def _write(places: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values to their places; one that lies in another's place is taken out before that is written over."""
    written: set[int] = set()
    moving = []
    for place, value in zip(places, values, strict=True):
        written.add(_address(place))
        if value is not place:
            moving.append((place, value.clone() if _address(value) in written else value))
    for place, value in moving:
        place.copy_(value)


def _address(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


# ------------------------------------------------------------------ where solves run


class Execution:
    """How solves run: each operation of an iteration by itself.

    Attributes:
        reason: Why not by CUDA graphs, where those were asked for.
        told: Reasons that the user knows.
    """

    def __init__(self, reason: str | None = None, told: set[str] | None = None) -> None:
        self.reason = reason
        self.told = set() if told is None else told

    def aside(self) -> AbstractContextManager[None]:
        """Return a context for a solve, and for what the adjoint solve is recorded from."""
        return nullcontext()

    def hand_over(self, value: Tensor) -> Tensor:
        """Return a tensor made aside, for use outside."""
        return value

    def evaluation(self, solver: str, exact: FixedPointMap) -> Evaluation:
        """Return how the iterations of one solve are evaluated."""
        return Evaluation(self.reason)


EAGER = Execution()


class GraphExecution(Execution):
    """Solves by CUDA graphs, on the side stream of a device.

    Autograd runs a derivative on the stream of what it is the derivative of. What an adjoint solve replays must
    therefore have been recorded aside, by this very object.
    """

    def __init__(self, side: Side, told: set[str]) -> None:
        super().__init__(None, told)
        self.side = side

    def aside(self) -> AbstractContextManager[None]:
        """Return a context for a solve, and for what the adjoint solve is recorded from."""
        return self.side.aside()

    def hand_over(self, value: Tensor) -> Tensor:
        """Return a tensor made aside, for use outside."""
        self.side.hand_over(value)
        return value

    def evaluation(self, solver: str, exact: FixedPointMap) -> Evaluation:
        """Return how the iterations of one solve are evaluated."""
        obstacle = exact.hidden.obstacle
        return Captured(self.side, solver) if obstacle is None else Evaluation(obstacle)


def graph_execution(start: Tensor, told: set[str]) -> Execution:
    """Return CUDA graphs on the device of `start`, or, with the reason, what takes their place."""
    side = side_of(start.device)
    return Execution(side, told) if isinstance(side, str) else GraphExecution(side, told)


# ------------------------------------------------------------------ the device


class Side:
    """A stream of a CUDA device beside the current one, and the memory of the graphs captured on it."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        # A pool lives as long as a graph of it; the next solve's graphs then find memory there.
        self.latest: torch.cuda.CUDAGraph | None = None

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Run on this stream: after what the current one has been given, and before what it will be given."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            current.wait_stream(self.stream)

    def hand_over(self, value: Tensor) -> None:
        """Keep the memory of a tensor made here until the current stream has read it."""
        value.record_stream(torch.cuda.current_stream(self.stream.device))

    def capture(
        self, function: Callable[[], Step], generators: Sequence[torch.Generator]
    ) -> tuple[Callable[[], None], Step]:
        """Capture what a function launches on this stream.

        Returns:
            How to run it, and where its result then is.

        Raises:
            RuntimeError: Where something in it cannot be captured.
        """
        # `torch.cuda.graph` would synchronize, collect garbage and empty the cache.
        graph = torch.cuda.CUDAGraph()
        try:
            for generator in generators:
                graph.register_generator_state(generator)
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            result = function()
            graph.capture_end()
        except BaseException:
            self._abandon(graph, generators)
            raise
        self.latest = graph
        return graph.replay, result

    def _abandon(self, graph: torch.cuda.CUDAGraph, generators: Sequence[torch.Generator]) -> None:
        """End a capture that failed, and mend what torch leaves as it was in it."""
        device = self.stream.device
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a graph that is empty
            with suppress(RuntimeError):
                graph.capture_end()
        # Where ending failed, the pool still takes part; where not, the first of these raises.
        with suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(device.index, self.pool)
            torch._C._cuda_releasePool(device.index, self.pool)
        self.pool = torch.cuda.graph_pool_handle()
        for generator in (torch.cuda.default_generators[device.index], *generators):
            generator.graphsafe_set_state(generator.clone_state())


_SIDES = threading.local()


def side_of(device: torch.device) -> Side | str:
    """Return this thread's side stream of a device, or why there is none."""
    if device.type != "cuda":
        return f"the images are on the device {device}, not on a GPU"
    sides: dict[torch.device, Side] = _SIDES.__dict__.setdefault("sides", {})
    if device not in sides:
        sides[device] = Side(device)
    return sides[device]
