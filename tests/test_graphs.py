"""CUDA graphs of iterations, without a GPU: a graph that records and repeats what a real one would, and the same bits.

`Recorded` stands where `Side` stands. Python runs once, when an iteration is captured; what is repeated are the calls of
torch's operators, with the very tensors that they had.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from oder_fast import (
    DEQRED,
    Anderson,
    Average,
    CartesianMRI,
    Decay,
    DivergenceError,
    Implicit,
    JacobianFree,
    Nesterov,
    NotCapturedWarning,
    ParallelBeamCT,
    Picard,
    UNet,
    Unrolled,
)
from oder_fast.data import birdcage_maps, random_lines
from oder_fast.deqred import RED, Fidelity
from oder_fast.fixed_point import FixedPointMap, Step, graphs, solvers
from oder_fast.fixed_point.solvers import Solver, State
from oder_fast.ops import _checks, fourier

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::oder_fast.NotConvergedWarning"),
]

SIZE, VIEWS, TAU = 12, 9, 20.0

# What waits for the device: a value or a shape is needed on the host.
WAITING = {
    "_local_scalar_dense",
    "_linalg_check_errors",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "_unique2",
}
ON_HOST = (Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__)


# ------------------------------------------------------------------ a graph on the CPU


def tensors(tree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def spoil(values: list[Tensor]) -> None:
    """Leave in memory what one must not rely on."""
    for value in values:
        value.fill_(float("nan") if value.is_floating_point() or value.is_complex() else 1)


def refuse(what: str) -> None:
    raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {what}\nMore lines.")


class NothingOnHost(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in ON_HOST:
            refuse(func.__name__)
        return func(*args, **(kwargs or {}))


class Recording(TorchDispatchMode):
    """Record calls; undo all that they did when the recording ends, as capturing runs nothing."""

    def __init__(self, generators) -> None:
        super().__init__()
        self.generators = (torch.default_generator, *generators)
        self.calls: list[tuple] = []
        self.fresh: list[Tensor] = []
        self.made: set[int] = set()
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        masks = name == "index" and any(t.dtype in (torch.bool, torch.uint8) for t in tensors(args[1]))
        if name in WAITING or masks:
            refuse(name)
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Generator) and leaf._cdata not in {g._cdata for g in self.generators}:
                refuse("a generator that is not registered")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tensors(value):
                    if address(tensor) not in self.made | set(self.before):
                        self.before[address(tensor)] = (tensor, tensor.clone())
        inputs = {address(t) for t in tensors((args, kwargs))}
        output = func(*args, **kwargs)
        new = [t if address(t) not in inputs else None for t in tensors(output)]
        self.calls.append((func, args, kwargs, new))
        self.fresh += [t for t in new if t is not None]
        self.made |= {address(t) for t in new if t is not None}
        return output

    def __enter__(self):
        self.states = [g.get_state() for g in self.generators]
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        for tensor, value in self.before.values():
            tensor.copy_(value)
        for generator, state in zip(self.generators, self.states, strict=True):
            generator.set_state(state)
        spoil(self.fresh)

    def repeat(self, results: list[Tensor]) -> None:
        for func, args, kwargs, new in self.calls:
            for place, value in zip(new, tensors(func(*args, **kwargs)), strict=True):
                if place is not None:
                    place.copy_(value)
        # The pool gives this memory to the next graph.
        kept = {address(t) for t in results}
        spoil([t for t in self.fresh if address(t) not in kept])


class Recorded:
    """Stands where `graphs.Side` stands."""

    def __init__(self) -> None:
        self.depth = self.captures = self.replays = 0
        self.kinds: list[int] = []
        self.recordings: list[Recording] = []
        self.handed: list[Tensor] = []

    @contextmanager
    def aside(self):
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
            for recording in self.recordings:
                spoil(recording.fresh)
            self.recordings.clear()

    def hand_over(self, value: Tensor) -> None:
        assert self.depth <= 1
        self.handed.append(value)

    def capture(self, function, generators):
        assert self.depth > 0
        recording = Recording(generators)
        with recording, NothingOnHost():
            result = function()
        self.captures += 1
        self.recordings.append(recording)

        def replay() -> None:
            self.replays += 1
            with torch.no_grad():
                recording.repeat(tensors(result))

        return replay, result


@pytest.fixture
def side(monkeypatch) -> Recorded:
    """Solve on the CPU as on a GPU, where looking at a value waits for the device."""
    side = Recorded()
    monkeypatch.setattr(graphs, "side_of", lambda device: side)
    monkeypatch.setattr(solvers, "looking_is_cheap", lambda device: False)
    # Values are checked where looking is cheap.
    monkeypatch.setattr(_checks, "index", lambda *args: None)
    monkeypatch.setattr(fourier, "_check_lines", lambda *args: None)
    return side


def test_a_recorded_graph_repeats_with_new_values_and_draws(side):
    x, generator = torch.ones(3), torch.Generator().manual_seed(0)
    other = torch.Generator().manual_seed(0)

    def function():
        x.mul_(2)
        return x + torch.rand(3, generator=generator)

    with side.aside():
        replay, result = side.capture(function, (generator,))
        assert x.tolist() == [1, 1, 1]
        assert result.isnan().all()
        assert torch.equal(generator.get_state(), other.get_state())
        for k in (1, 2):
            replay()
            assert torch.equal(result, 2**k + torch.rand(3, generator=other))
        for waiting in (
            lambda: x.sum().item(),
            lambda: x.tolist(),
            lambda: x[x > 0],
            lambda: torch.rand(3, generator=other),
        ):
            with pytest.raises(RuntimeError, match="capturing"):
                side.capture(waiting, ())


# ------------------------------------------------------------------ equal bits


class Convolutions(nn.Module):
    """Two of them and a nonlinearity; contracts."""

    def __init__(self, channels: int = 1, normalized: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = (nn.Conv2d(*c, 3, padding=1) for c in ((channels, 4), (4, channels)))
        for conv in (self.first, self.last):
            nn.init.normal_(conv.weight, std=0.1)
            if normalized:
                parametrizations.spectral_norm(conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def phantoms(batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(batch, SIZE, SIZE, dtype=dtype, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def ct() -> ParallelBeamCT:
    return ParallelBeamCT(SIZE, VIEWS)


@dataclass
class Found:
    """All that a solve leaves."""

    solution: object
    gradients: list[Tensor]
    numbers: Tensor


def run(operator, y, denoiser, *, cuda_graph, x0=None, calls=1, **options) -> Found:
    denoiser = copy.deepcopy(denoiser)
    generator = torch.Generator().manual_seed(5)
    # Parameters are changed between calls.
    options = {"tau": TAU, "on_failure": "ignore"} | {
        name: copy.deepcopy(value) if isinstance(value, nn.Parameter) else value
        for name, value in options.items()
    }
    model = DEQRED(operator, denoiser, generator=generator, cuda_graph=cuda_graph, **options)
    gradients = []
    for _ in range(calls):
        solution = model(y, x0, return_solution=True)
        if solution.value.requires_grad:
            loss = (solution.value * torch.linspace(0.5, 1, SIZE)).abs().square().sum()
            parameters = [p for p in model.parameters() if p.requires_grad]
            gradients += torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for p in parameters:
                    p.mul_(0.9)
    return Found(solution, gradients, generator.get_state())


def same(one: Tensor, other: Tensor) -> bool:
    if one.is_complex():
        one, other = torch.view_as_real(one.resolve_conj()), torch.view_as_real(other.resolve_conj())
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def check(side: Recorded, operator, y, denoiser, *, captures: int | None = None, **options) -> Found:
    """Solve by graphs and without: the same bits everywhere."""
    eager = run(operator, y, denoiser, cuda_graph=False, **options)
    assert side.captures == 0
    found = run(operator, y, denoiser, cuda_graph=True, **options)
    pairs = [
        (eager.solution, found.solution),
        *zip(eager.solution.adjoint, found.solution.adjoint, strict=True),
    ]
    for one, other in pairs:
        assert one.value.isfinite().all()
        for name in ("value", "iterations", "residuals", "residual_iterations", "converged", "contraction"):
            assert same(getattr(one, name).detach(), getattr(other, name).detach()), name
        assert one.message == other.message
        assert other.fallback_reason is None
    assert len(eager.gradients) == len(found.gradients)
    assert all(map(same, eager.gradients, found.gradients))
    assert torch.equal(eager.numbers, found.numbers)
    assert side.replays > 3 * side.captures > 0
    if captures is not None:
        assert side.captures == captures
    assert any(found.solution.value.data_ptr() == t.data_ptr() for t in side.handed)
    return found


SOLVERS = {
    "Picard": Picard(60, 1e-4, check_every=7),
    "Nesterov": Nesterov(60, 1e-4, check_every=7),
    "Nesterov without restart": Nesterov(60, 1e-4, check_every=7, restart=False),
    "Nesterov untested": Nesterov(31, check_every=None),
}
EACH_SOLVER = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


@EACH_SOLVER
def test_all_views(side, ct, solver):
    adjoint = Implicit(solver=Picard(40, 1e-4, check_every=6))
    found = check(
        side, ct, ct(phantoms()), Convolutions(), captures=2, solver=solver, differentiation=adjoint
    )
    assert len(found.gradients) == 4


@EACH_SOLVER
def test_minibatches(side, ct, solver):
    """As published: noisy to the end, which the mean of the last half makes better."""
    for tail in (None, Average(0.5), Decay(0.4)):
        chosen = type(solver)(**{**vars(solver), "tail": tail})
        check(
            side,
            ct,
            ct(phantoms()),
            Convolutions(),
            minibatch_size=4,
            variance_reduction=False,
            solver=chosen,
            differentiation=Implicit(solver=chosen),
        )
        side.captures = side.replays = 0


@pytest.mark.parametrize("solver", [Picard, Nesterov])
def test_minibatches_of_reduced_variance(side, ct, solver):
    chosen = solver(60, 1e-5, check_every=5)
    # Steps with all views and with a minibatch, forward and adjoint.
    check(side, ct, ct(phantoms()), Convolutions(), captures=4, minibatch_size=4, solver=chosen)


def test_anderson_once_its_history_is_full(side, ct):
    solver = Anderson(40, 1e-7, check_every=9, memory=3)
    check(side, ct, ct(phantoms()), Convolutions(), captures=2, solver=solver)


def test_an_image_that_converges_earlier_keeps_its_value(side, ct):
    y = ct(phantoms(3))
    near = DEQRED(ct, Convolutions(), tau=TAU, solver=Picard(60, 1e-6))(y).detach()
    start = ct.initial(y)
    start[1] = near[1]
    solver = Picard(60, 1e-4, check_every=4)
    found = check(side, ct, y, Convolutions(), x0=start, solver=solver, nonnegative=True)
    assert len(set(found.solution.iterations.tolist())) > 1


@pytest.mark.parametrize("minibatch_size", [None, 4])
def test_jacobian_free(side, ct, minibatch_size):
    options = {"minibatch_size": minibatch_size, "differentiation": JacobianFree()}
    check(side, ct, ct(phantoms()), Convolutions(), solver=Nesterov(60, 1e-4, check_every=7), **options)


def test_adjoint_that_starts_warm_and_weights_that_change(side, ct):
    differentiation = Implicit(solver=Nesterov(60, 1e-4, check_every=7), warm_start=True)
    found = check(
        side, ct, ct(phantoms()), Convolutions(), calls=3, captures=6, differentiation=differentiation
    )
    assert len(found.gradients) == 12


@pytest.mark.parametrize("minibatch_size", [None, 4])
def test_spectral_norms(side, ct, minibatch_size):
    check(side, ct, ct(phantoms()), Convolutions(normalized=True), calls=2, minibatch_size=minibatch_size)


def test_a_network_whose_layers_are_computed_again(side, ct):
    torch.manual_seed(0)
    network = UNet(channels=(4, 8))
    check(side, ct, ct(phantoms()), network, solver=Picard(30, 1e-4, check_every=7))


def test_complex_images(side):
    maps = birdcage_maps(4, (SIZE, SIZE))
    mask = random_lines(SIZE, acceleration=2, center_fraction=0.2, generator=torch.Generator().manual_seed(0))
    mri = CartesianMRI(maps, mask)
    y = mri(phantoms(dtype=torch.complex64))
    for size in (None, 2):
        check(side, mri, y, Convolutions(2), tau=0.05, minibatch_size=size)
        side.captures = side.replays = 0


def test_autocast(side, ct):
    with torch.autocast("cpu", torch.bfloat16):
        check(side, ct, ct(phantoms()), Convolutions(), minibatch_size=4)


def test_step_size_and_tau_that_are_trained(side, ct):
    step_size = nn.Parameter(torch.tensor(1 / (ct.norm_squared() + 2 * TAU)))
    tau = nn.Parameter(torch.tensor(TAU))
    check(side, ct, ct(phantoms()), Convolutions(), step_size=step_size, tau=tau)


def test_without_gradients_unrolled_is_as_the_others(side, ct):
    with torch.no_grad():
        check(side, ct, ct(phantoms()), Convolutions(), captures=1, differentiation=Unrolled())


def test_default_generator(side, ct):
    found = []
    for cuda_graph in (False, True):
        torch.manual_seed(0)
        model = DEQRED(ct, Convolutions(), tau=TAU, minibatch_size=4, cuda_graph=cuda_graph)
        found.append((model(ct(phantoms())).detach(), torch.get_rng_state()))
    assert all(map(torch.equal, *found))
    assert side.replays > 0


def test_what_is_recorded_for_the_adjoint_is_recorded_aside(side, ct, monkeypatch):
    depths = []
    linearize = RED.linearize
    monkeypatch.setattr(RED, "linearize", lambda *args: depths.append(side.depth) or linearize(*args))
    for differentiation in (Implicit(), JacobianFree()):
        DEQRED(ct, Convolutions(), tau=TAU, differentiation=differentiation, cuda_graph=True)(ct(phantoms()))
    assert depths == [1, 0]


class Shift(FixedPointMap):
    """T(x) = x / 2 + b."""

    requires_grad = False

    def __init__(self, b: Tensor) -> None:
        self.b = b

    def __call__(self, point: Tensor) -> Tensor:
        return 0.5 * point + self.b


class Lagging(Solver):
    """Gives as its result what it started from, whose place the iteration writes over."""

    def _begin(self, start):
        return State(start)

    def _advance(self, fixed_point_map, state):
        step, before = fixed_point_map.step(state.point), state.point
        state.point = step.image
        return Step(before, before, step.reductions)


def test_a_result_that_lies_where_the_state_does(side):
    start, solver = torch.rand(2, 5), Lagging(6, 1e-30, check_every=None)
    with side.aside():
        solution = solver.solve(Shift(torch.ones(5)), start, graphs.graph_execution(start, set()))
    assert torch.equal(solution.value, solver.solve(Shift(torch.ones(5)), start).value)
    assert side.replays > 3


def test_divergence_is_still_raised(side, ct):
    class Growing(nn.Module):
        def forward(self, x):
            return -9 * x

    messages = []
    for cuda_graph in (False, True):
        model = DEQRED(ct, Growing(), tau=TAU, solver=Picard(200, check_every=5), cuda_graph=cuda_graph)
        with pytest.raises(DivergenceError) as caught:
            model(ct(phantoms()))
        messages.append((str(caught.value), caught.value.solution))
    assert messages[0][0] == messages[1][0]
    assert same(messages[0][1].value, messages[1][1].value)
    assert side.replays > 0


# ------------------------------------------------------------------ where it cannot be


def fallen_back(reason: str, ct, denoiser=None, *, backward: bool = False, y=None, **options):
    """Solve; the reason is told once, is there to be read, and the result is that of a solve without graphs."""
    y = ct(phantoms()) if y is None else y
    denoiser = Convolutions() if denoiser is None else denoiser
    options = {"tau": TAU, "on_failure": "ignore", "solver": Picard(30, 1e-4, check_every=4), **options}
    found = []
    for cuda_graph in (False, True):
        torch.manual_seed(0)
        if "generator" in options:
            options["generator"] = torch.Generator().manual_seed(0)
        model = DEQRED(ct, denoiser, cuda_graph=cuda_graph, **options)
        expected = pytest.warns(NotCapturedWarning, match=reason) if cuda_graph else nullcontext()
        with expected as told:
            solution = model(y, return_solution=True)
            if backward:
                solution.value.sum().backward()
        if cuda_graph:
            assert len(told) == len({str(w.message) for w in told})
            with warnings.catch_warnings():
                warnings.simplefilter("error", NotCapturedWarning)
                again = model(y, return_solution=True)
                if backward:
                    again.value.sum().backward()
        found.append(solution)
    assert same(*(s.value.detach() for s in found))
    assert found[0].fallback_reason is None
    return found[1]


def test_images_on_a_cpu(ct):
    solution = fallen_back("on the device cpu, not on a GPU", ct)
    assert "on the device cpu" in solution.fallback_reason


def test_the_warning_points_to_the_call(ct):
    model = DEQRED(ct, Convolutions(), tau=TAU, cuda_graph=True)
    with pytest.warns(NotCapturedWarning) as told:
        model(ct(phantoms()))
    assert told[0].filename == __file__


def test_a_denoiser_that_waits_for_the_device(side, ct):
    class Waits(Convolutions):
        def forward(self, x):
            return super().forward(x) * (1.0 if float(x.detach().mean()) < 1e9 else 2.0)

    options = {"minibatch_size": 4, "generator": True}
    reason = "cuda_graph: an iteration cannot be captured: CUDA error: .* capturing"
    solution = fallen_back(reason, ct, Waits(), **options)
    assert "More lines" not in solution.fallback_reason
    assert side.captures == 0
    assert solution.value.isfinite().all()


def test_a_denoiser_that_waits_in_its_derivative_alone(side, ct):
    class Waiting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * (1.0 if float(gradient.sum()) < 1e9 else 2.0)

    class Waits(Convolutions):
        def forward(self, x):
            return Waiting.apply(super().forward(x))

    solution = fallen_back("cannot be captured", ct, Waits(), backward=True)
    assert solution.fallback_reason is None
    assert "capturing" in solution.adjoint[0].fallback_reason
    assert side.replays > 0


def test_a_failed_capture_leaves_all_as_it_was(side, ct):
    """It fails late in an iteration, after the minibatch was drawn and the gradient taken."""
    captures = side.capture

    def late(function, generators):
        def fails():
            function()
            raise RuntimeError("out of memory")

        return captures(fails, generators)

    side.capture = late
    for solver in (Picard(30, 1e-4, check_every=4), Nesterov(30, 1e-4, check_every=4)):
        fallen_back("out of memory", ct, minibatch_size=4, generator=True, solver=solver)
    fallen_back("out of memory", ct, solver=Anderson(30, 1e-6, check_every=4))


def test_unrolled_with_gradients(side, ct):
    solution = fallen_back("Unrolled lets autograd record", ct, backward=True, differentiation=Unrolled())
    assert solution.fallback_reason.startswith("Unrolled")
    assert side.captures == 0


class Elsewhere(ParallelBeamCT):
    """Takes its views in turn, counted on the host: a graph would take the same ones forever."""

    turn = 0

    def draw_blocks(self, size, generator=None):
        self.turn += 1
        return (torch.arange(size) + self.turn * size) % self.n_blocks


def test_minibatches_drawn_by_somebody_elses_operator(side):
    ct = Elsewhere(SIZE, VIEWS)
    model = DEQRED(ct, Convolutions(), tau=TAU, minibatch_size=4, cuda_graph=True, on_failure="ignore")
    with pytest.warns(NotCapturedWarning, match=r"Elsewhere\.draw_blocks may draw"):
        model(ct(phantoms()))
    assert side.captures == 0


def test_all_views_of_somebody_elses_operator_are_captured(side):
    ct = Elsewhere(SIZE, VIEWS)
    check(side, ct, ct(phantoms()), Convolutions())


def test_minibatches_from_a_generator_of_the_cpu(ct):
    y = torch.empty(1, VIEWS, 17, device="meta")
    for generator, size in ((torch.Generator(), 4), (None, 4), (torch.Generator(), None)):
        obstacle = Fidelity(ct, y, size, True, generator).obstacle
        assert (obstacle is None) == (generator is None or size is None)
    assert (
        "a generator on the cpu; give one on the GPU" in Fidelity(ct, y, 4, True, torch.Generator()).obstacle
    )


def test_an_adjoint_of_minibatches_has_its_own_obstacles(side):
    ct = Elsewhere(SIZE, VIEWS)
    model = DEQRED(
        ct,
        Convolutions(),
        tau=TAU,
        differentiation=Implicit(minibatch_size=4),
        cuda_graph=True,
        on_failure="ignore",
    )
    solution = model(ct(phantoms()), return_solution=True)
    assert solution.fallback_reason is None
    with pytest.warns(NotCapturedWarning, match="draw_blocks"):
        solution.value.sum().backward()


def test_measurements_spread_over_processes(side):
    class Spread(ParallelBeamCT):
        def agree(self, numbers):
            return numbers

    fallen_back("spread over processes", Spread(SIZE, VIEWS))
    assert side.captures == 0


@dataclass
class _Counting(State):
    count: object


class Counts(Solver):
    """Has something on the host that changes."""

    def __init__(self, kind, max_iterations=20):
        super().__init__(max_iterations, 1e-30)
        object.__setattr__(self, "kind", kind)

    def _begin(self, start):
        return _Counting(start, self.kind(0))

    def _advance(self, fixed_point_map, state):
        step = fixed_point_map.step(state.point)
        state.point, state.count = step.image, state.count + 1
        return step


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (int, "the state of Counts had not come to constant shapes when the solve ended"),
        (np.int64, "the state of Counts cannot lie on the device: count is int64"),
    ],
)
def test_a_solver_whose_state_cannot_be_static(side, kind, reason):
    start = torch.zeros(1, 3)
    with side.aside():
        solution = Counts(kind).solve(Shift(torch.ones(3)), start, graphs.graph_execution(start, set()))
    assert reason in solution.fallback_reason
    assert torch.equal(solution.value, Counts(kind).solve(Shift(torch.ones(3)), start).value)
    assert side.captures == 0


def test_anderson_that_ends_before_its_history_is_full(side, ct):
    model = DEQRED(
        ct, Convolutions(), tau=TAU, solver=Anderson(5, 1e-9), cuda_graph=True, on_failure="ignore"
    )
    with pytest.warns(NotCapturedWarning, match="the state of Anderson had not come to constant shapes"):
        model(ct(phantoms()))


# ------------------------------------------------------------------ places


def test_values_that_lie_in_each_others_places_are_written_right():
    places = [torch.tensor([float(k)]) for k in range(4)]
    graphs._write(places, [places[1], places[0], places[2], places[3][:1] + 6])
    assert [p.item() for p in places] == [1, 0, 2, 9]
    graphs._write(places[:2], [places[1], places[1]])
    assert [p.item() for p in places[:2]] == [0, 0]
    row = torch.arange(3.0)
    graphs._write([row], [row.flip(0)])
    graphs._write([row], [row[[0, 0, 1]]])
    assert row.tolist() == [2, 2, 1]


# ------------------------------------------------------------------ the setting


def test_setting_is_checked_and_survives_copies(ct):
    with pytest.raises(TypeError, match="DEQRED: cuda_graph must be True or False, got str"):
        DEQRED(ct, Convolutions(), tau=TAU, cuda_graph="yes")
    model = DEQRED(ct, Convolutions(), tau=TAU, cuda_graph=True)
    with pytest.warns(NotCapturedWarning):
        model(ct(phantoms()))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.cuda_graph
        with pytest.warns(NotCapturedWarning):
            copied(ct(phantoms()))


# ------------------------------------------------------------------ the calls of torch.cuda


class Cuda:
    """What `Side` calls, in order."""

    def __init__(self, monkeypatch, broken: bool) -> None:
        self.log: list[object] = []
        cuda = self

        class Stream:
            device = torch.device("cuda", 0)

            def __init__(self, device=None):
                pass

            def wait_stream(self, other):
                cuda.log.append("wait")

        class Graph:
            def register_generator_state(self, generator):
                cuda.log.append("register")

            def capture_begin(self, pool, capture_error_mode):
                cuda.log.append(("begin", pool, capture_error_mode))

            def capture_end(self):
                cuda.log.append("end")
                if broken:
                    raise RuntimeError("capture was invalidated")

            def replay(self):
                cuda.log.append("replay")

        class Generator:
            def clone_state(self):
                return "copy"

            def graphsafe_set_state(self, state):
                cuda.log.append(("mended", state))

        pools = iter(range(9))
        self.generator = Generator()
        for name, value in {
            "Stream": Stream,
            "CUDAGraph": Graph,
            "graph_pool_handle": lambda: next(pools),
            "default_generators": (Generator(),),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(torch._C, name, lambda *args, name=name: self.log.append((name, *args)))


def test_a_capture_shares_the_pool_of_those_before(monkeypatch):
    cuda = Cuda(monkeypatch, broken=False)
    side = graphs.Side(torch.device("cuda", 0))
    for _ in range(2):
        replay, result = side.capture(lambda: "step", (cuda.generator,))
        replay()
        assert result == "step"
    assert cuda.log == ["register", ("begin", 0, "thread_local"), "end", "replay"] * 2


def test_a_broken_capture_is_ended_and_mended(monkeypatch):
    cuda = Cuda(monkeypatch, broken=True)
    side = graphs.Side(torch.device("cuda", 0))

    def fails():
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        side.capture(fails, (cuda.generator,))
    assert cuda.log[2:] == [
        "end",
        ("_cuda_endAllocateToPool", 0, 0),
        ("_cuda_releasePool", 0, 0),
        ("mended", "copy"),
        ("mended", "copy"),
    ]
    assert side.pool == 1
