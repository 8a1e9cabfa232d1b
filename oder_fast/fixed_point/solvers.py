"""Solvers of x = T(x), image by image."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from .graphs import EAGER, Evaluation, Execution
from .maps import FixedPointMap, Step, as_map, inner, per_image
from .solution import DivergenceError, Solution, fit_contraction, last_residual

# No transient of a momentum makes a step this many times longer than the first one and than the image.
DIVERGENCE = 1e3
# Tolerances below this many roundings may be out of reach.
ROUNDING = 8
# Contraction factors above this are called none.
STALLED = 0.999


@dataclass(frozen=True)
class Average:
    """End a stochastic solve with the mean of its last iterates, which averages the minibatches' noise away.

    Args:
        share: Share of `max_iterations`, the last ones, over which the mean is taken.
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        _check_share(self)


@dataclass(frozen=True)
class Decay:
    r"""End a stochastic solve with ever shorter steps and no momentum.

    .. math:: x^+ = x + a_j (T_B(x) - x), \quad a_j = 1 / (1 + \mathrm{rate} \cdot j), \quad j = 0, 1, \ldots

    Args:
        share: Share of `max_iterations`, the last ones, over which the weights decay.
        rate: How fast they do.
    """

    share: float = 0.5
    rate: float = 0.1

    def __post_init__(self) -> None:
        _check_share(self)
        _positive("Decay", "rate", self.rate)


Tail = Average | Decay


def _check_share(tail: Tail) -> None:
    if not 0 < tail.share <= 1:
        raise ValueError(f"{type(tail).__name__}: share must lie in (0, 1], got {tail.share}")


def _positive(name: str, field: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: {field} must be a finite number above 0, got {value}")


@dataclass
class State:
    """What a solver carries from one iteration to the next.

    Fields are tensors whose first axis is the batch, lists of such tensors, lists of a number for each image, or tuples
    of others.

    Attributes:
        point: Where the map is evaluated next.
    """

    point: Tensor

    def select(self, images: Tensor) -> None:
        """Keep some images of the batch."""
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                setattr(self, f.name, value.index_select(0, images))
            elif isinstance(value, list) and all(isinstance(v, Tensor) for v in value):
                setattr(self, f.name, [v.index_select(0, images) for v in value])
            elif isinstance(value, list):
                setattr(self, f.name, [value[k] for k in images.tolist()])


StateT = TypeVar("StateT", bound=State)


class _Record:
    """Collects what becomes a `Solution`."""

    def __init__(self, batch: int, evaluate: Evaluation) -> None:
        self.evaluate = evaluate
        self.rows: list[tuple[int, list[int], Tensor]] = []
        self.pieces: list[tuple[list[int], Tensor]] = []
        self.iterations = np.zeros(batch, np.int64)
        self.converged = np.zeros(batch, np.bool_)

    def tested(self, iteration: int, images: list[int], reductions: Tensor) -> None:
        self.rows.append((iteration, images, self.evaluate.keep(reductions)))

    def finish(self, images: list[int], values: Tensor, iteration: int, converged: bool) -> None:
        self.pieces.append((images, self.evaluate.keep(values)))
        self.iterations[images] = iteration
        self.converged[images] = converged

    def solution(self, describe: Callable[[Tensor, Tensor, Tensor], str]) -> Solution:
        value = self.pieces[0][1]
        if len(self.pieces) > 1:
            order = torch.from_numpy(np.concatenate([images for images, _ in self.pieces]).argsort())
            value = torch.cat([v for _, v in self.pieces]).index_select(0, order.to(value.device))
        residuals = np.full((len(self.rows), len(self.iterations)), math.nan)
        if self.rows:
            change, norm = torch.cat([reductions for _, _, reductions in self.rows]).cpu()[:, :2].unbind(1)
            found = torch.where(change == 0, change, change / norm).sqrt().numpy()
            ends = np.cumsum([len(images) for _, images, _ in self.rows])[:-1]
            for row, (iteration, images, _), values in zip(
                residuals, self.rows, np.split(found, ends), strict=True
            ):
                here = np.array(images)
                alive = iteration <= self.iterations[here]
                row[here[alive]] = values[alive]
        at = torch.tensor([iteration for iteration, _, _ in self.rows], dtype=torch.int64)
        iterations, converged, relative = map(torch.from_numpy, (self.iterations, self.converged, residuals))
        contraction = fit_contraction(relative, at)
        message = describe(converged, relative, contraction)
        reason = self.evaluate.reason
        return Solution(
            value, iterations, relative, at, converged, contraction, message, fallback_reason=reason
        )


def _of(values: Tensor, chosen: list[int]) -> Tensor:
    """Return some images of a batch, in order."""
    if len(chosen) == len(values):
        return values
    return values.index_select(0, torch.tensor(chosen, device=values.device))


def _limit(change: float, norm: float) -> float:
    """Return the squared change beyond which an image diverges, by those of its first iteration."""
    limit = DIVERGENCE**2 * max(change, norm)
    return limit if math.isfinite(limit + change + norm) else 0.0


def _apply(fixed_point_map: FixedPointMap, state: State) -> Step:
    """Evaluate the map at the state's point, and leave that as it is."""
    return fixed_point_map.step(state.point)


def looking_is_cheap(device: torch.device) -> bool:
    """Whether the values of a tensor can be looked at without waiting for a device."""
    return device.type == "cpu"


@dataclass(frozen=True)
class Solver(ABC, Generic[StateT]):
    """What `Picard`, `Nesterov` and `Anderson` share: the loop around one update.

    Args:
        max_iterations: Evaluations of the map, at most.
        tolerance: Relative residual ``|T(s) - s| / |T(s)|`` at which an image has converged.
        check_every: Iterations from one test of the residual to the next on a GPU, where each is a
            synchronisation, and of a stochastic map, where each is a step with all blocks instead of a
            minibatch; otherwise every iteration is tested. None: run all iterations and test nothing but
            that the result is finite, as the official code of ODER does.
    """

    takes_minibatches: ClassVar[bool] = True

    max_iterations: int = 200
    tolerance: float = 1e-4
    check_every: int | None = 10

    def __post_init__(self) -> None:
        name = type(self).__name__
        for field in ("max_iterations", "check_every"):
            value = getattr(self, field)
            if field == "check_every" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: {field} must be a whole number above 0, got {value!r}")
        _positive(name, "tolerance", self.tolerance)

    @abstractmethod
    def _begin(self, start: Tensor) -> StateT: ...

    @abstractmethod
    def _advance(self, fixed_point_map: FixedPointMap, state: StateT) -> Step:
        """Evaluate the map at ``state.point``, update the state, and return the evaluation."""

    def _tail(self) -> Tail | None:
        return None

    def solve(
        self,
        fixed_point_map: FixedPointMap | Callable[[Tensor], Tensor],
        start: Tensor,
        execution: Execution = EAGER,
    ) -> Solution:
        r"""Iterate from `start` until :math:`\|T(x) - x\| \le \mathrm{tolerance} \, \|T(x)\|` for each image.

        An image that has converged keeps its value; on a CPU it leaves the batch where the map allows that.
        Differentiable as the unrolled iterations, except that momentum and mixing weights count as constants.

        Args:
            fixed_point_map: The map, or any callable ``(B, ...) -> (B, ...)`` that treats images one by one.
            start: Shape ``(B, ...)``.
            execution: How the iterations run.

        Returns:
            A `Solution`, converged or not.

        Raises:
            DivergenceError: Where the residual becomes NaN or infinite, or grows far beyond its start.
            ValueError: For an empty batch, or a map of minibatches where the solver takes none.
        """
        if start.ndim == 0 or start.shape[0] == 0:
            raise ValueError(
                f"{type(self).__name__}: start must hold at least one image, got {tuple(start.shape)}"
            )
        exact = as_map(fixed_point_map)
        if exact.stochastic and not self.takes_minibatches:
            raise ValueError(f"{type(self).__name__} takes no minibatches: use Nesterov or Picard")
        cheap_to_look, target = looking_is_cheap(start.device), self.tolerance**2
        state = self._begin(start)
        evaluate = execution.evaluation(type(self).__name__, exact)
        tail = self._tail() if exact.stochastic and not exact.variance_reduced else None
        tail_start = self.max_iterations - (0 if tail is None else round(tail.share * self.max_iterations))
        average = start
        record = _Record(start.shape[0], evaluate)
        # A few numbers of each image decide on the host, where lists are quicker than small tensors.
        images = list(range(start.shape[0]))  # which images of the whole batch are here
        alive = [True] * start.shape[0]  # which of those have not converged
        first: Tensor | None = None
        limits: list[float] = []

        for iteration in range(1, self.max_iterations + 1):
            last = iteration == self.max_iterations
            check = self._checks(iteration, exact.stochastic, cheap_to_look)
            ending = tail if iteration > tail_start else None
            averaging = isinstance(ending, Average)
            drawn = exact.stochastic and not (check and not averaging)
            if isinstance(ending, Decay):
                step = evaluate(_apply, exact, state, drawn)
                weight = 1 / (1 + ending.rate * (iteration - tail_start - 1))
                state.point = torch.lerp(state.point, step.image, weight)
            else:
                step = evaluate(self._advance, exact, state, drawn)
            if averaging:
                average = torch.lerp(average, step.image, 1 / (iteration - tail_start))
                if check:
                    step = exact.step(average)
                elif last:
                    step = step._replace(image=average)
            reductions = step.reductions
            if reductions.requires_grad:
                reductions = reductions.detach()
            if first is None:
                first = reductions
            tested = check or not exact.stochastic
            if tested:
                record.tested(iteration, images, reductions)
            if not check and not last:
                continue
            if not limits:
                limits = [_limit(change, norm) for change, norm, _ in first.tolist()]
            found = list(zip(reductions.tolist(), limits, alive, strict=True))
            wrong = [k for k, (r, limit, here) in enumerate(found) if here and not r[0] <= limit]
            if wrong:
                finite = all(map(math.isfinite, itertools.chain.from_iterable(found[k][0] for k in wrong)))
                left = [k for k, here in enumerate(alive) if here]
                record.finish([images[k] for k in left], _of(step.image, left), iteration, False)
                raise DivergenceError(
                    *self._diverged(record, exact, iteration, [images[k] for k in wrong], finite)
                )
            done = [k for k, (r, _, here) in enumerate(found) if here and tested and r[0] <= target * r[1]]
            failed = [k for k, here in enumerate(alive) if here and k not in done] if last else []
            for group, success in ((done, True), (failed, False)):
                if group:
                    record.finish([images[k] for k in group], _of(step.image, group), iteration, success)
            for k in done:
                alive[k] = False
            if last or not any(alive):
                break
            if cheap_to_look and done:
                keep = [k for k, here in enumerate(alive) if here]
                chosen = torch.tensor(keep)
                selected = exact.select(chosen)
                if selected is not None:
                    exact = selected
                    state.select(chosen)
                    average = average.index_select(0, chosen)
                    images, limits, alive = (
                        [images[k] for k in keep],
                        [limits[k] for k in keep],
                        [True] * len(keep),
                    )
        return record.solution(lambda *found: self._describe(exact, start.real.dtype, *found))

    def iterate(self, fixed_point_map: FixedPointMap, start: Tensor) -> Tensor:
        """Run all iterations and test nothing: what can be traced."""
        state = self._begin(start)
        step = self._advance(fixed_point_map, state)
        for _ in range(self.max_iterations - 1):
            step = self._advance(fixed_point_map.draw(), state)
        return step.image

    def _checks(self, iteration: int, stochastic: bool, cheap_to_look: bool) -> bool:
        """Whether an iteration takes the residual of the full map and tests it."""
        if self.check_every is None:
            return False
        if cheap_to_look and not stochastic:
            return True
        return (iteration - 1) % self.check_every == 0 or iteration == self.max_iterations

    def _diverged(
        self, record: _Record, exact: FixedPointMap, iteration: int, images: list[int], finite: bool
    ) -> tuple[str, Solution]:
        how = "grew far beyond its start" if finite else "became NaN or infinite"
        message = (
            f"{type(self).__name__}: the residual {how} by iteration {iteration} (images {images}); "
            f"{exact.advice}"
        )
        return message, record.solution(lambda *_: message)

    def _describe(
        self,
        exact: FixedPointMap,
        dtype: torch.dtype,
        converged: Tensor,
        residuals: Tensor,
        contraction: Tensor,
    ) -> str:
        """Say what happened, and what to change."""
        name, left = type(self).__name__, ~converged
        if not bool(left.any()):
            return f"{name}: all images reached the relative residual {self.tolerance:g}"
        if len(residuals) == 0:
            return f"{name}: no residual was taken in {self.max_iterations} iterations; set check_every"
        worst = float(last_residual(residuals)[left].max())
        rates = contraction[left & contraction.isfinite()]
        rate = float(rates.max()) if len(rates) else math.nan
        pace = f", times {rate:.3g} per iteration" if len(rates) else ""
        message = (
            f"{name}: {int(left.sum())} of {len(left)} images did not reach the relative residual "
            f"{self.tolerance:g} in {self.max_iterations} iterations: it is {worst:.2g}{pace}; "
        )
        if self.tolerance < ROUNDING * torch.finfo(dtype).eps:
            return message + f"rounding of {dtype} may not allow that tolerance: raise it"
        if exact.stochastic and not exact.variance_reduced:
            return message + (
                "it is the minibatches' noise: reduce its variance, raise the minibatch size or the tolerance"
            )
        if math.isnan(rate):
            return message + "raise max_iterations or the tolerance"
        if rate < STALLED:
            more = math.ceil(math.log(self.tolerance / worst) / math.log(rate))
            return message + f"about {more} more would do: raise max_iterations or the tolerance"
        if exact.stochastic:
            message += "raise the minibatch size or lower check_every, or "
        return message + f"the map hardly contracts: {exact.advice}"


@dataclass(frozen=True)
class Picard(Solver[State]):
    r"""Iterate the map itself.

    .. math:: x_{k+1} = T(x_k)

    Args:
        max_iterations: Evaluations of the map, at most.
        tolerance: Relative residual at which an image has converged.
        check_every: Iterations from one test to the next on a GPU or of a stochastic map; see `Solver`.
        tail: How a solve ends whose minibatches are noisy to the end (a map without variance reduction):
            `Average`, `Decay`, or None for neither.

    Example:
        >>> import torch
        >>> solution = Picard(tolerance=1e-6).solve(lambda x: 0.5 * x + 1, torch.zeros(1, 3))
        >>> solution.value, int(solution.iterations)
        (tensor([[2.0000, 2.0000, 2.0000]]), 20)
    """

    tail: Tail | None = Average()

    def _tail(self) -> Tail | None:
        return self.tail

    def _begin(self, start: Tensor) -> State:
        return State(start)

    def _advance(self, fixed_point_map: FixedPointMap, state: State) -> Step:
        step = fixed_point_map.step(state.point)
        state.point = step.image
        return step


@dataclass
class _NesterovState(State):
    previous: Tensor
    age: Tensor | list[int]  # iterations since the start or the last restart
    momenta: tuple[Tensor]  # at each age


@dataclass(frozen=True)
class Nesterov(Solver[_NesterovState]):
    r"""Iterate the map with Nesterov's momentum, as ODER's official code does, restarted where it misleads.

    .. math:: x_k = T(s_{k-1}), \quad t_k = \tfrac12 \Bigl(1 + \sqrt{1 + 4 t_{k-1}^2}\Bigr), \quad
        s_k = x_k + \frac{t_{k-1} - 1}{t_k} (x_k - x_{k-1})

    Args:
        max_iterations: Evaluations of the map, at most.
        tolerance: Relative residual at which an image has converged.
        check_every: Iterations from one test to the next on a GPU or of a stochastic map; see `Solver`.
        restart: Set :math:`t_k = 1` for an image where :math:`\langle s_{k-1} - x_k, x_k - x_{k-1} \rangle >
            0` (momentum points uphill); without, the official code's iteration, which triples the
            minibatches' noise.
        tail: How a solve ends whose minibatches are noisy to the end (a map without variance reduction):
            `Average`, `Decay`, or None for neither.

    Example:
        >>> import torch
        >>> slow = lambda x: 0.99 * x + 0.01
        >>> int(Nesterov(tolerance=1e-6, max_iterations=2000).solve(slow, torch.zeros(1, 3)).iterations) < 200
        True

    References:
        O'Donoghue, Candes, "Adaptive restart for accelerated gradient schemes",
        Foundations of Computational Mathematics 15 (2015).
    """

    restart: bool = True
    tail: Tail | None = Average()

    def _tail(self) -> Tail | None:
        return self.tail

    def _begin(self, start: Tensor) -> _NesterovState:
        momenta, t = [], 1.0
        for _ in range(self.max_iterations):
            before, t = t, 0.5 * (1 + math.sqrt(1 + 4 * t * t))
            momenta.append((before - 1) / t)
        table = torch.tensor(momenta, dtype=torch.float64, device=start.device)
        # On the host each call of torch costs as much as a small operator.
        if looking_is_cheap(start.device) and not torch.compiler.is_compiling():
            return _NesterovState(start, start, [0] * start.shape[0], (table,))
        age = torch.zeros(start.shape[0], dtype=torch.int64, device=start.device)
        return _NesterovState(start, start, age, (table,))

    def _advance(self, fixed_point_map: FixedPointMap, state: _NesterovState) -> Step:
        (table,), age = state.momenta, state.age
        if isinstance(age, Tensor):
            momentum = table[age]
        elif len(age) == 1:
            momentum = table[age[0] : age[0] + 1]
        else:
            momentum = table[torch.tensor(age)]
        step = fixed_point_map.step(state.point, state.previous, momentum)
        state.point, state.previous = step.extrapolated, step.image
        if isinstance(age, Tensor):
            state.age = age + 1
            if self.restart:
                state.age = state.age * (step.reductions[:, 2] <= 0)
        elif self.restart:
            found = zip(age, step.reductions.tolist(), strict=True)
            state.age = [n + 1 if uphill <= 0 else 0 for n, (_, _, uphill) in found]
        else:
            state.age = [n + 1 for n in age]
        return step


@dataclass
class _AndersonState(State):
    """The last accepted evaluation, and the k last differences of accepted ones, the newest last."""

    accepted: Tensor | None  # an image
    residual: Tensor
    reductions: Tensor  # [B, 3]
    image_changes: list[Tensor]
    residual_changes: list[Tensor]
    gram: Tensor  # [B, k, k], inner products of residual_changes
    valid: Tensor  # [B, k], false of differences from before a reset
    mixed: Tensor  # [B], whether point is a mixed iterate
    squares: list[Tensor]  # [B] each, squared residuals of the last accepted evaluations


@dataclass(frozen=True)
class Anderson(Solver[_AndersonState]):
    r"""Mix the last iterates so that the residual, were the map linear, would be smallest.

    .. math:: \gamma = \arg\min_\gamma \Bigl\| f_k - \sum_i \gamma_i \Delta f_i \Bigr\|^2
        + \text{ridge}, \quad x_{k+1} = T(x_k) - \sum_i \gamma_i \Delta T_i, \quad f_k = T(x_k) - x_k

    The differences are scaled to unit norm, so the ridge, relative to the trace of their Gram matrix, depends
    neither on the unit of the image nor on how far the iteration has come. A mixed iterate is accepted only
    if its residual does not grow beyond those of the last `memory` iterates; else the iteration goes back to
    the last accepted image and forgets the history. Complex images mix with real weights, as pairs of reals: a
    denoiser of two channels is linear in no other sense. Minibatches are refused: mixing amplifies noise.

    Args:
        max_iterations: Evaluations of the map, at most; a rejected iterate counts.
        tolerance: Relative residual at which an image has converged.
        check_every: Iterations from one test to the next on a GPU; see `Solver`.
        memory: Differences kept.
        ridge: Relative to the trace of the Gram matrix.

    Raises:
        ValueError: For no memory, or a negative ridge.

    Example:
        >>> import torch
        >>> slow = lambda x: torch.tensor([0.99, 0.9, -0.5]) * x + 1
        >>> int(Anderson(tolerance=1e-6).solve(slow, torch.zeros(1, 3)).iterations) < 10
        True

    References:
        Walker, Ni, "Anderson acceleration for fixed-point iterations", SIAM J. Numerical Analysis 49 (2011).
    """

    takes_minibatches: ClassVar[bool] = False

    memory: int = 5
    ridge: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.memory, int) or self.memory < 1:
            raise ValueError(f"Anderson: memory must be a whole number above 0, got {self.memory!r}")
        if not (math.isfinite(self.ridge) and self.ridge >= 0):
            raise ValueError(f"Anderson: ridge must be a finite number, at least 0, got {self.ridge}")

    def _begin(self, start: Tensor) -> _AndersonState:
        empty = torch.zeros(start.shape[0], 0, dtype=torch.float64, device=start.device)
        none = empty.bool()
        gram = empty[:, :, None].expand(-1, 0, 0)
        return _AndersonState(start, None, start, empty, [], [], gram, none, none.any(1), [])

    def _advance(self, fixed_point_map: FixedPointMap, state: _AndersonState) -> Step:
        step = fixed_point_map.step(state.point)
        residual = (step.image - state.point).detach()
        if state.accepted is None:
            state.accepted, state.residual, state.reductions = step.image, residual, step.reductions
            state.point, state.squares = step.image, [step.reductions[:, 0]]
            return step
        # A residual that is NaN is no better either.
        good = ~state.mixed | (step.reductions[:, 0] <= torch.stack(state.squares).amax(0))
        where = good.reshape(-1, *[1] * (residual.ndim - 1))
        image = torch.where(where, step.image, state.accepted)
        residual = torch.where(where, residual, state.residual)
        state.reductions = torch.where(good[:, None], step.reductions, state.reductions)
        state.squares = [*state.squares[1 - self.memory :], state.reductions[:, 0]][-self.memory :]
        self._remember(state, image - state.accepted, residual - state.residual, good)
        state.accepted, state.residual = image, residual
        state.point = image
        for weight, change in zip(self._weights(state).unbind(1), state.image_changes, strict=True):
            state.point = state.point - per_image(weight, change) * change
        state.mixed = state.valid.any(1)
        return Step(image, state.point, state.reductions)

    def _remember(
        self, state: _AndersonState, image_change: Tensor, residual_change: Tensor, good: Tensor
    ) -> None:
        """Append differences; forget those of images that went back."""
        oldest = max(0, len(state.image_changes) + 1 - self.memory)
        state.image_changes = [*state.image_changes[oldest:], image_change]
        state.residual_changes = [*state.residual_changes[oldest:], residual_change]
        row = torch.stack([inner(change, residual_change) for change in state.residual_changes], 1)
        kept = torch.cat([state.gram[:, oldest:, oldest:], row[:, :-1, None]], 2)
        state.gram = torch.cat([kept, row[:, None]], 1)
        state.valid = torch.cat([state.valid[:, oldest:] & good[:, None], good[:, None]], 1)

    def _weights(self, state: _AndersonState) -> Tensor:
        """Solve the small least-squares problem: float64 ``(B, k)``, 0 for differences that do not count."""
        squares = state.gram.diagonal(dim1=1, dim2=2)
        state.valid = state.valid & (squares > 0)
        scale = torch.where(state.valid, squares, 1.0).rsqrt() * state.valid
        # Rows that do not count become those of the identity: the trace is k, whatever counts.
        matrix = state.gram * scale[:, :, None] * scale[:, None] + torch.diag_embed((~state.valid).double())
        matrix = matrix + torch.diag_embed(torch.full_like(squares, self.ridge * squares.shape[1]))
        right = torch.stack([inner(change, state.residual) for change in state.residual_changes], 1) * scale
        # Without the check of `solve`, which waits for the device: a mixed iterate that is no number is rejected.
        weights: Tensor = torch.linalg.solve_ex(matrix, right)[0] * scale
        return weights
