"""Solvers of x = T(x), image by image."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .maps import Anchor, FixedPointMap, Step, as_map
from .progress import Numbers, Progress, host, mask
from .solution import Solution

# Tolerances below this many roundings may be out of reach.
ROUNDING = 8
# Contraction factors above this are called none.
STALLED = 0.999
# Momentum that lets a residual grow this many times beyond the least one is taken away.
OVERSHOOT = 10.0
# A mixed iterate is accepted where its residual is below this share of the largest of the last accepted ones.
DECREASE = 0.99


@dataclass(frozen=True)
class Average:
    """End a stochastic solve with the mean of its last iterates, which averages the minibatches' noise away.

    Args:
        share: Share of `max_iterations`, the last ones, over which the mean is taken.
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"Average: share must lie in (0, 1], got {self.share}")


@dataclass(frozen=True)
class State:
    """What a solver carries from one iteration to the next, of the same shape throughout.

    Attributes:
        point: Where the map is evaluated next.
        anchor: What the last evaluation with all blocks left for minibatches.
    """

    point: Tensor
    anchor: Anchor


StateT = TypeVar("StateT", bound=State)


@dataclass(frozen=True)
class Solver(ABC, Generic[StateT]):
    r"""Iterate a map until each image is near its fixed point: what `Anderson`, `Picard` and `Nesterov` share.

    Args:
        max_iterations: Evaluations of the map, at most.
        tolerance: Largest relative distance from the fixed point, estimated as
            :math:`\|T(s) - s\| / (1 - \rho) / \|T(s)\|` with the contraction factor :math:`\rho` seen in the last
            iterations.
        check_every: Of a stochastic map: iterations from one evaluation with all blocks, which is tested and which
            minibatches are anchored at, to the next; a deterministic map is tested in every iteration. None: run all
            iterations and test nothing but that the result is finite, as the official code of ODER does.
    """

    takes_minibatches: ClassVar[bool] = True

    max_iterations: int = 100
    tolerance: float = 1e-3
    check_every: int | None = 10

    def __post_init__(self) -> None:
        name = type(self).__name__
        for field in ("max_iterations", "check_every"):
            value = getattr(self, field)
            if field == "check_every" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: {field} must be a whole number above 0, got {value!r}")
        if not (math.isfinite(self.tolerance) and self.tolerance > 0):
            raise ValueError(f"{name}: tolerance must be a finite number above 0, got {self.tolerance}")

    @abstractmethod
    def init(self, start: Tensor) -> StateT:
        """Return the state before the first iteration."""

    @abstractmethod
    def step(
        self, fixed_point_map: FixedPointMap, state: StateT, progress: Progress, blocks: Tensor | None
    ) -> tuple[StateT, Step]:
        """Evaluate the map at ``state.point`` with the blocks given, and return the next state."""

    def terminate(self, progress: Progress) -> bool:
        """Whether no image is left to iterate on."""
        return progress.n_done == progress.batch

    def _tail(self) -> Average | None:
        return None

    def solve(self, fixed_point_map: FixedPointMap | Callable[[Tensor], Tensor], start: Tensor) -> Solution:
        r"""Iterate from `start` until each image's estimated distance from its fixed point is within the tolerance.

        An image that has converged keeps its value. One that diverges is given up and the others go on. Differentiable
        as the unrolled iterations, except that momentum and mixing weights count as constants.

        Args:
            fixed_point_map: The map, or any callable ``(B, ...) -> (B, ...)`` that treats images one by one.
            start: Shape ``(B, ...)``.

        Returns:
            A `Solution`, converged or not; of each image the iterate with the least residual.

        Raises:
            ValueError: For an empty batch, or a map of minibatches where the solver takes none.
        """
        name = type(self).__name__
        if start.ndim == 0 or start.shape[0] == 0:
            raise ValueError(f"{name}: start must hold at least one image, got {tuple(start.shape)}")
        T = as_map(fixed_point_map)
        if T.stochastic and not self.takes_minibatches:
            raise ValueError(f"{name} takes no minibatches: use Nesterov or Picard")
        tail = self._tail() if T.stochastic and not T.variance_reduced else None
        averaged_from = self.max_iterations - (0 if tail is None else round(tail.share * self.max_iterations))
        tested = self.check_every is not None
        state, progress = self.init(start), Progress(start, self.tolerance, T)
        average = start
        for iteration in range(1, self.max_iterations + 1):
            last, ending = iteration == self.max_iterations, iteration > averaged_from
            full = not T.stochastic or (tested and not ending and self._is_full(iteration))
            point = state.point
            state, step = self.step(T, state, progress, None if full else T.draw())
            if ending:
                average = torch.lerp(average, step.image, 1 / (iteration - averaged_from))
                if last and tested:
                    point, step, full = average, T.step(average), True
                elif last:
                    step = step._replace(image=average)
            if full and tested:
                progress.record(iteration, point, step, only=ending)
                if self.terminate(progress):
                    break
                state = replace(state, point=progress.freeze(state.point))
            elif last:
                progress.close(iteration, step)
        return progress.solution(T.calls(), lambda solution: self._describe(T, progress, solution))

    def _is_full(self, iteration: int) -> bool:
        return (iteration - 1) % (self.check_every or 1) == 0 or iteration == self.max_iterations

    def _describe(self, fixed_point_map: FixedPointMap, progress: Progress, solution: Solution) -> str:
        """Say what happened, and what to change."""
        name, n = type(self).__name__, len(solution.converged)
        if bool(solution.diverged.any()):
            images = solution.diverged.nonzero().flatten().tolist()
            last = (solution.residual_iterations[:, None] == solution.iterations) & solution.diverged
            grew = bool(last.any()) and bool(solution.residuals[last].isfinite().all())
            how = "grew far beyond its start" if grew else "became NaN or infinite"
            at = int(solution.iterations[images].max())
            return f"{name}: the residual {how} by iteration {at} (images {images} of {n}); {fixed_point_map.advice}"
        left, (times, error) = ~solution.converged, progress.short
        short = f"in {times} of its evaluations, the last with an error of about {error:.2g}, "
        short = short + fixed_point_map.shortage if times else ""
        if not bool(left.any()):
            near = f"all images are within the relative distance {self.tolerance:g} of their fixed points"
            return f"{name}: {near}; {short}" if times else f"{name}: {near}"
        if len(solution.residuals) == 0:
            return f"{name}: no residual was taken in {self.max_iterations} iterations; set check_every"
        worst = float(solution.distance[left].max())
        rates = solution.contraction[left & solution.contraction.isfinite()]
        rate = float(rates.max()) if len(rates) else math.nan
        pace = f", and the residual shrinks by {rate:.3g} per iteration" if len(rates) else ""
        message = (
            f"{name}: {int(left.sum())} of {n} images are not within the relative distance {self.tolerance:g} of their "
            f"fixed points after {self.max_iterations} iterations: it is about {worst:.2g}{pace}; "
        )
        if times:
            return message + short
        if self.tolerance < ROUNDING * torch.finfo(solution.value.dtype).eps:
            return message + f"rounding of {solution.value.dtype} may not allow that tolerance: raise it"
        if fixed_point_map.stochastic and not fixed_point_map.variance_reduced:
            return message + (
                "it is the minibatches' noise: reduce its variance, raise the minibatch size or the tolerance"
            )
        if not math.isfinite(worst):
            return message + f"the map hardly contracts: {fixed_point_map.advice}"
        if math.isnan(rate):
            return message + "raise max_iterations or the tolerance"
        if rate < STALLED:
            more = math.ceil(math.log(self.tolerance / worst) / math.log(rate))
            return message + f"about {more} more would do: raise max_iterations or the tolerance"
        if fixed_point_map.stochastic:
            message += "raise the minibatch size or lower check_every, or "
        return message + f"the map hardly contracts: {fixed_point_map.advice}"


@dataclass(frozen=True)
class Picard(Solver[State]):
    r"""Iterate the map itself.

    .. math:: x_{k+1} = T(x_k)

    Args:
        max_iterations: Evaluations of the map, at most.
        tolerance: Largest relative distance from the fixed point, estimated; see `Solver`.
        check_every: Of a stochastic map; see `Solver`.
        tail: How a solve ends whose minibatches are noisy to the end (a map without variance reduction):
            `Average`, or None.

    Example:
        >>> import torch
        >>> solution = Picard(tolerance=1e-6).solve(lambda x: 0.5 * x + 1, torch.zeros(1, 3))
        >>> solution.value, int(solution.iterations)
        (tensor([[2.0000, 2.0000, 2.0000]]), 21)
    """

    tail: Average | None = Average()

    def _tail(self) -> Average | None:
        return self.tail

    def init(self, start: Tensor) -> State:
        """Return the start alone."""
        return State(start, ())

    def step(
        self, fixed_point_map: FixedPointMap, state: State, progress: Progress, blocks: Tensor | None
    ) -> tuple[State, Step]:
        """Go where the map leads."""
        step = fixed_point_map.step(state.point, progress.accuracy, blocks=blocks, anchor=state.anchor)
        return State(step.image, step.anchor or state.anchor), step


@dataclass(frozen=True)
class NesterovState(State):
    """State of `Nesterov`.

    Attributes:
        previous: The last image.
        t: :math:`t_k`, float64, shape ``(B,)``.
        plain: Images whose momentum was taken away, bool, shape ``(B,)``.
    """

    previous: Tensor
    t: Tensor
    plain: Tensor


@dataclass(frozen=True)
class Nesterov(Solver[NesterovState]):
    r"""Iterate the map with Nesterov's momentum, restarted where it misleads.

    .. math:: x_k = T(s_{k-1}), \quad t_k = \tfrac12 \Bigl(1 + \sqrt{1 + 4 t_{k-1}^2}\Bigr), \quad
        s_k = x_k + \frac{t_{k-1} - 1}{t_k} (x_k - x_{k-1})

    Momentum helps maps that are gradient steps of a convex function, and diverges on others that contract. An image
    whose residual grows to ten times its least one goes back to where that was, and on without momentum.

    Args:
        max_iterations: Evaluations of the map, at most.
        tolerance: Largest relative distance from the fixed point, estimated; see `Solver`.
        check_every: Of a stochastic map; see `Solver`.
        restart: Set :math:`t_k = 1` for an image where :math:`\langle s_{k-1} - x_k, x_k - x_{k-1} \rangle >
            0` (momentum points uphill), and take momentum away where it hurts; without, the iteration of ODER's
            official code, which triples the minibatches' noise.
        tail: How a solve ends whose minibatches are noisy to the end (a map without variance reduction):
            `Average`, or None.

    Example:
        >>> import torch
        >>> slow = lambda x: 0.99 * x + 0.01
        >>> int(Nesterov(tolerance=1e-4, max_iterations=2000).solve(slow, torch.zeros(1, 3)).iterations) < 200
        True

    References:
        O'Donoghue, Candes, "Adaptive restart for accelerated gradient schemes",
        Foundations of Computational Mathematics 15 (2015).
    """

    restart: bool = True
    tail: Average | None = Average()

    def _tail(self) -> Average | None:
        return self.tail

    def init(self, start: Tensor) -> NesterovState:
        """Return a state without momentum."""
        t = torch.ones(start.shape[0], dtype=torch.float64, device=start.device)
        return NesterovState(start, (), start, t, torch.zeros_like(t, dtype=torch.bool))

    def step(
        self, fixed_point_map: FixedPointMap, state: NesterovState, progress: Progress, blocks: Tensor | None
    ) -> tuple[NesterovState, Step]:
        """Apply the map, and extrapolate."""
        t = 0.5 * (1 + (1 + 4 * state.t.square()).sqrt())
        momentum = torch.where(state.plain, 0, (state.t - 1) / t)
        step = fixed_point_map.step(
            state.point, progress.accuracy, state.previous, momentum, blocks, state.anchor
        )
        point, image, plain = step.extrapolated, step.image, state.plain
        if self.restart:
            t = torch.where(step.reductions[:, 2].detach() > 0, 1, t)
        if self.restart and blocks is None:
            hurts = ~(host(step.reductions)[:, 0] <= OVERSHOOT**2 * progress.change)
            if hurts.any() and (hurts := hurts & ~host(plain)).any():
                back = mask(hurts, point)
                point, image = (torch.where(back, progress.value, v) for v in (point, image))
                plain = plain | back.reshape(plain.shape)
        return NesterovState(point, step.anchor or state.anchor, image, t, plain), step


@dataclass(frozen=True)
class AndersonState(State):
    """State of `Anderson`; m is the memory, n the size of an image in reals. Small arrays are on the host.

    Attributes:
        image: The last accepted image.
        residual: Its residual, shape ``(B, n)``.
        squares: Squared residuals of the last accepted evaluations, ``(B, m)``.
        mixed: Whether `point` is a mixed iterate, ``(B,)``.
        count: Evaluations so far.
        image_changes: The last differences of accepted images, at most m of them.
        residual_changes: Of their residuals, ``(B, m, n)``.
        gram: Inner products of `residual_changes`, ``(B, m, m)``.
        valid: Which of the differences count, ``(B, m)``.
    """

    image: Tensor
    residual: Tensor
    squares: Numbers
    mixed: NDArray[np.bool_]
    count: int
    image_changes: tuple[Tensor, ...]
    residual_changes: Tensor
    gram: Numbers
    valid: NDArray[np.bool_]


@dataclass(frozen=True)
class Anderson(Solver[AndersonState]):
    r"""Mix the last iterates so that the residual, were the map linear, would be smallest.

    .. math:: \gamma = \arg\min_\gamma \Bigl\| f_k - \sum_i \gamma_i \Delta f_i \Bigr\|^2
        + \text{ridge}, \quad x_{k+1} = T(x_k) - \sum_i \gamma_i \Delta T_i, \quad f_k = T(x_k) - x_k

    *What contracts, converges.* A mixed iterate is accepted if its residual is at most 0.99 times the largest,
    :math:`M_k`, of the last `memory` accepted residuals; else the iteration takes the plain step from the last accepted
    iterate and forgets the history. Let `T` contract by :math:`\rho < 1`. A plain step has a residual of at most
    :math:`\rho` times the last accepted one, so it is always accepted, and after one rejection comes a plain step. Each
    accepted residual is hence at most :math:`q M_k`, with :math:`q = \max(\rho, 0.99)`, and after `memory` of them
    :math:`M` has shrunk by `q`: residuals go to 0, and with them the distance from the fixed point, which is at most
    the residual over :math:`1 - \rho`.

    The differences are scaled to unit norm, so the ridge, relative to the trace of their Gram matrix, depends
    neither on the unit of the image nor on how far the iteration has come. Complex images mix with real weights, as
    pairs of reals: a denoiser of two channels is linear in no other sense. Minibatches are refused: mixing amplifies
    noise.

    Args:
        max_iterations: Evaluations of the map, at most; a rejected iterate counts.
        tolerance: Largest relative distance from the fixed point, estimated; see `Solver`.
        check_every: Not used, but for None; see `Solver`.
        memory: Differences kept.
        ridge: Relative to the trace of the Gram matrix; at least the rounding of the images.

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
        if not isinstance(self.memory, int) or isinstance(self.memory, bool) or self.memory < 1:
            raise ValueError(f"Anderson: memory must be a whole number above 0, got {self.memory!r}")
        if not (math.isfinite(self.ridge) and self.ridge >= 0):
            raise ValueError(f"Anderson: ridge must be a finite number, at least 0, got {self.ridge}")

    def init(self, start: Tensor) -> AndersonState:
        """Return an empty history."""
        flat, m = _flat(start), self.memory
        zeros = np.zeros((len(start), m))
        return AndersonState(
            start,
            (),
            start,
            flat,
            zeros,
            zeros[:, 0] > 0,
            0,
            (),
            flat.new_zeros(len(start), m, flat.shape[1]),
            np.zeros((len(start), m, m)),
            zeros > 0,
        )

    @np.errstate(invalid="ignore", over="ignore")
    def step(
        self, fixed_point_map: FixedPointMap, state: AndersonState, progress: Progress, blocks: Tensor | None
    ) -> tuple[AndersonState, Step]:
        """Accept or reject the evaluation, and mix."""
        step = fixed_point_map.step(state.point, progress.accuracy)
        image, square = step.image, host(step.reductions)[:, 0]
        residual = _flat(image) - _flat(state.point)
        good = ~state.mixed | (square <= DECREASE**2 * state.squares.max(1))
        if not good.all():
            accepted = mask(good, image)
            image = torch.where(accepted, image, state.image)
            residual = torch.where(accepted.reshape(-1, 1), residual, state.residual)
            square = np.where(good, square, state.squares[:, (state.count - 1) % self.memory])
        squares = state.squares.copy()
        squares[:, state.count % self.memory] = square
        image_changes, gram, valid, point = state.image_changes, state.gram, state.valid, image
        if state.count > 0:
            # The difference to the last accepted evaluation takes the oldest one's place. It has no graph, and is
            # used by this solve alone: written in place.
            slot, changes = (state.count - 1) % self.memory, state.residual_changes
            torch.sub(residual, state.residual, out=changes[:, slot])
            image_changes = (*image_changes[:slot], image - state.image, *image_changes[slot + 1 :])
            pair = torch.stack((changes[:, slot], residual), 2)
            row, right = host(torch.bmm(changes, pair).double()).transpose(2, 0, 1)
            gram = gram.copy()
            gram[:, slot], gram[:, :, slot] = row, row
            # Where the evaluation is rejected, all is forgotten.
            valid = valid & good[:, None]
            valid[:, slot] = good & (row[:, slot] > 0)
            ridge = max(self.ridge, torch.finfo(residual.dtype).eps)
            weights = torch.from_numpy(_weights(gram, right, valid, ridge)).to(residual)
            weights = weights.reshape(*weights.shape, *[1] * (image.ndim - 1))
            for weight, change in zip(weights.unbind(1), image_changes, strict=False):
                point = torch.addcmul(point, weight, change, value=-1)
        mixed, count, changes = np.logical_or.reduce(valid, 1), state.count + 1, state.residual_changes
        return (
            AndersonState(
                point, (), image, residual, squares, mixed, count, image_changes, changes, gram, valid
            ),
            step,
        )


def _weights(gram: Numbers, right: Numbers, valid: NDArray[np.bool_], ridge: float) -> Numbers:
    """Solve the small least-squares problems of `Anderson`: ``(B, m)``, 0 for differences that do not count."""
    m = valid.shape[1]
    scale = valid / np.sqrt(np.where(valid, gram.diagonal(axis1=1, axis2=2), 1))
    # Rows that do not count become those of the identity: the trace is m, whatever counts.
    matrix = gram * scale[:, :, None] * scale[:, None]
    matrix[:, range(m), range(m)] += ~valid + ridge * m
    weights: Numbers = np.linalg.solve(matrix, (right * scale)[..., None])[..., 0] * scale
    return weights


def _flat(images: Tensor) -> Tensor:
    """View images as rows of reals, without a graph."""
    images = images.detach().resolve_conj()
    return (torch.view_as_real(images) if images.is_complex() else images).flatten(1)
