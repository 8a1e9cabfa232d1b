r"""The weight of the prior, chosen from the data alone.

What is scored is how well a reconstruction foretells measurements: those left out of it, or, where the noise is known,
all of them by an unbiased estimate.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ._extras import new_axes
from ._numpy import takes_numpy
from .denoisers import TotalVariation
from .deqred import DEQRED
from .fixed_point import DivergenceError, Solution
from .operators import MeasurementOperator, MeasurementParallel, as_operator
from .operators.base import check_numbers, seen

Criterion = Literal["left_out", "risk", "discrepancy"]
CRITERIA = ("left_out", "risk", "discrepancy")
# From one value tried to the next until the best lies between two others, as a factor.
STRIDE = 3.0
# The search ends where the neighbours of the best are as near as this factor.
CLOSE = 1.5
# Scores within this share are the same, and the largest value of those is taken: solves of very little regularization
# end before they converge, so that less of it changes nothing.
SAME = 1e-3
# A score that varies by less than this share has no minimum.
FLAT = 1e-4
# A discrepancy is met to this relative accuracy.
MET = 0.02


class Trial(NamedTuple):
    """A value that was tried.

    Attributes:
        value: Of tau, or of the weight.
        score: Mean square of what was foretold wrongly, in the unit of the data squared; with the discrepancy, mean
            square of the residual; infinite where no image converged.
    """

    value: float
    score: float


@dataclass(frozen=True, repr=False)
class Choice:
    """What was chosen, and what was tried.

    Attributes:
        name: ``"tau"`` or ``"weight"``.
        value: The value chosen.
        model: The model with that value, for all of the data.
        tried: All values tried, in increasing order, with their scores.
        criterion: ``"left_out"``, ``"risk"`` or ``"discrepancy"``.
        target: What the score is to meet, with the discrepancy; else None.
        at_bound: The bound at which the search ended, or None where it found a best value between them.
    """

    name: str
    value: float
    model: DEQRED
    tried: tuple[Trial, ...]
    criterion: Criterion
    target: float | None = None
    at_bound: float | None = None

    @property
    def tau(self) -> float:
        """Of the model."""
        return float(self.model.tau)

    def __repr__(self) -> str:
        """Tell the value and how it was found."""
        return (
            f"Choice({self.name}={self.value:.3g}, criterion={self.criterion!r}, solves={len(self.tried)}, "
            f"at_bound={self.at_bound})"
        )

    def plot(self, axes: Any = None) -> Any:
        """Draw the scores over the values tried.

        Args:
            axes: Of matplotlib; by default those of a new figure.

        Returns:
            The axes.

        Raises:
            ImportError: Where matplotlib is not installed.
        """
        if axes is None:
            axes = new_axes("Choice.plot")
        finite = [trial for trial in self.tried if math.isfinite(trial.score)]
        axes.plot([t.value for t in finite], [t.score for t in finite], "o-")
        axes.axvline(self.value, linestyle="--", label=f"{self.name} = {self.value:.3g}")
        if self.target is not None:
            axes.axhline(self.target, linestyle=":", label="expected")
        axes.set_xscale("log")
        axes.set_xlabel(self.name)
        axes.set_ylabel(LABELS[self.criterion])
        axes.legend()
        return axes


LABELS = {
    "left_out": "mean square of the residual, left out",
    "risk": "estimated mean square of the error of A x",
    "discrepancy": "mean square of the residual",
}


@takes_numpy
def choose_tau(
    y: Tensor,
    operator: Any,
    denoiser: Callable[[Tensor], Tensor],
    *,
    criterion: Criterion = "left_out",
    noise: float | None = None,
    bounds: tuple[float, float] = (1e-4, 1.0),
    nonnegative: bool = False,
    share: float = 0.1,
    solves: int = 12,
    generator: torch.Generator | None = None,
) -> Choice:
    r"""Choose :math:`\tau` from the data alone.

    Each value has a score, by one of three criteria:

    - ``"left_out"``: :math:`\|A_2 x - y_2\|^2`, where x comes from the rest of the data alone, :math:`y_1`. Left out
      are views, lines of k-space or illuminations (`MeasurementOperator.split`); the weight :math:`\tau \|A\|^2` is the
      same for a part of the data as for all.
    - ``"risk"``: :math:`\|A x - y\|^2 + 2 \sigma^2 \operatorname{div}_y A x`, but for a constant an unbiased estimate
      of the error of A x under white Gaussian noise (SURE). The divergence comes from a second solve, beside y.
    - ``"discrepancy"``: :math:`\|A x - y\|^2`, which is to meet :math:`m \sigma^2` with m measured values.

    Prefer the first, also where the noise is known. The risk counts errors only where something is measured, and the
    discrepancy principle takes all of the noise for residual: both smooth too much where the data do not determine the
    image.

    The search walks from the middle of the bounds by factors of 3 until the best value lies between two others, and
    goes on by parabolas in the logarithm. Each solve starts at the last one's solution.

    Args:
        y: Measurements, shape ``(B, *data_shape)``; one value is chosen for all of the batch.
        operator: As of `DEQRED`.
        denoiser: A denoiser; or a `DEQRED`, whose settings are taken, all but tau.
        criterion: ``"left_out"``, ``"risk"`` or ``"discrepancy"``.
        noise: For the last two, standard deviation of the noise in `y`; of complex noise that of real and imaginary
            part together.
        bounds: Least and largest tau.
        nonnegative: As of `DEQRED`; a `DEQRED` has its own.
        share: Share of the measurements that is left out.
        solves: Largest number of values tried.
        generator: Draws what is left out; by default one of seed 0, so that the choice is reproducible.

    Returns:
        The value, what was tried, and a model with it. A warning tells where the search ended at a bound.

    Raises:
        TypeError: For an argument of the wrong type.
        ValueError: For values that make no sense, NaN in `y`, or measurements that cannot be split.
        DivergenceError: Where no value tried converges.

    Example:
        >>> import torch
        >>> from oder_fast import ParallelBeamCT, TotalVariation, choose_tau
        >>> ct = ParallelBeamCT(image_size=16, angles=20)
        >>> x = torch.zeros(1, 16, 16)
        >>> x[:, 4:10, 6:12] = 1.0
        >>> y = ct(x) + 0.5 * torch.randn(1, 20, ct.n_bins, generator=torch.Generator().manual_seed(0))
        >>> choice = choose_tau(y, ct, TotalVariation(0.1))
        >>> choice.model(y, ct).shape
        torch.Size([1, 16, 16])

    References:
        Stone, "Cross-validatory choice and assessment of statistical predictions", J. Royal Statistical Society B 36
        (1974). Stein, "Estimation of the mean of a multivariate normal distribution", Annals of Statistics 9 (1981).
        Ramani, Blu, Unser, "Monte-Carlo SURE: a black-box optimization of regularization parameters for general
        denoising algorithms", IEEE Trans. Image Processing 17 (2008). Morozov, "Methods for solving incorrectly posed
        problems" (1984).
    """

    def build(tau: float) -> DEQRED:
        return _with_tau(denoiser, tau, nonnegative)

    return _choose(
        "choose_tau", "tau", y, operator, build, noise, criterion, bounds, share, solves, generator
    )


@takes_numpy
def choose_weight(
    y: Tensor,
    operator: Any,
    build: Callable[[float], Callable[[Tensor], Tensor]] = TotalVariation,
    *,
    tau: float = 0.1,
    criterion: Criterion = "left_out",
    noise: float | None = None,
    bounds: tuple[float, float] = (1e-4, 1.0),
    nonnegative: bool = False,
    share: float = 0.1,
    solves: int = 12,
    generator: torch.Generator | None = None,
) -> Choice:
    r"""Choose the weight of total variation, or another number of a denoiser, with :math:`\tau` fixed.

    A fixed point with the proximal map D of :math:`w R` minimizes

    .. math:: \tfrac12 \|A x - y\|^2 + \tau \|A\|^2 w \, R_w(x)

    where :math:`R_w(x) = \min_u R(u) + \|u - x\|^2 / (2 w)` is R made smooth on the scale w. The strength is the
    product :math:`\tau w`, so one of the two is chosen and the other fixed. A larger tau with a smaller w is nearer to
    R itself and costs more calls of the denoiser; a small tau bounds the strength, and where more is needed the search
    ends at a bound.

    Args:
        y: As of `choose_tau`.
        operator: As of `choose_tau`.
        build: Denoiser of a weight; it may return a `DEQRED`, whose settings are taken, all but tau.
        tau: In units of :math:`\|A\|^2`.
        criterion: As of `choose_tau`.
        noise: As of `choose_tau`.
        bounds: Least and largest weight; `TotalVariation` sees images of about 1.
        nonnegative: As of `choose_tau`.
        share: As of `choose_tau`.
        solves: As of `choose_tau`.
        generator: As of `choose_tau`.

    Returns:
        As `choose_tau`.

    Raises:
        TypeError: As `choose_tau`.
        ValueError: As `choose_tau`.
        DivergenceError: As `choose_tau`.

    Example:
        >>> import torch
        >>> from oder_fast import ParallelBeamCT, TotalVariation, choose_weight
        >>> ct = ParallelBeamCT(image_size=16, angles=20)
        >>> x = torch.zeros(1, 16, 16)
        >>> x[:, 4:10, 6:12] = 1.0
        >>> y = ct(x) + 0.5 * torch.randn(1, 20, ct.n_bins, generator=torch.Generator().manual_seed(0))
        >>> choice = choose_weight(y, ct, lambda w: TotalVariation(w, iterations=20), bounds=(0.01, 1.0))
        >>> 0.01 < choice.value < 1
        True

    References:
        Moreau, "Proximite et dualite dans un espace hilbertien", Bulletin de la S. M. F. 93 (1965); those of
        `choose_tau`.
    """
    if not callable(build):
        raise TypeError(f"choose_weight: build must be a function of the weight, got {build!r}")

    def model(weight: float) -> DEQRED:
        return _with_tau(build(weight), tau, nonnegative)

    return _choose(
        "choose_weight", "weight", y, operator, model, noise, criterion, bounds, share, solves, generator
    )


def _with_tau(denoiser: Callable[[Tensor], Tensor], tau: float, nonnegative: bool) -> DEQRED:
    """Return a model of a denoiser; of a `DEQRED` one with its settings, all but tau."""
    if not isinstance(denoiser, DEQRED):
        return DEQRED(denoiser, tau=tau, nonnegative=nonnegative)
    return DEQRED(
        denoiser.denoiser,
        tau=tau,
        step=denoiser.step,
        solver=denoiser.solver,
        differentiation=denoiser.differentiation,
        nonnegative=denoiser.nonnegative,
        normalize=denoiser.normalize,
        generator=denoiser.generator,
        on_failure=denoiser.on_failure,
    )


def _choose(
    owner: str,
    name: str,
    y: Tensor,
    operator: Any,
    build: Callable[[float], DEQRED],
    noise: float | None,
    criterion: Criterion,
    bounds: tuple[float, float],
    share: float,
    solves: int,
    generator: torch.Generator | None,
) -> Choice:
    _check(owner, y, operator, noise, criterion, bounds, solves, generator)
    operator = as_operator(operator)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    score: Callable[[float], float]
    with torch.no_grad():
        if criterion == "left_out":
            score = _LeftOut(y, operator, build, share, generator)
        else:
            assert noise is not None
            score = _Residual(y, operator, build, noise, criterion == "risk", generator)
        search = _Search(score, bounds, solves)
        target = None if criterion != "discrepancy" or noise is None else noise**2
        value = search.least() if target is None else search.crossing(target)
    finite = [s for s in search.scores.values() if math.isfinite(s)]
    if not finite:
        raise DivergenceError(f"{owner}: the solves diverge for every {name} tried")
    at_bound = next((bound for bound in bounds if value == bound), None)
    if max(finite) - min(finite) <= FLAT * abs(max(finite)):
        warnings.warn(
            f"{owner}: the score hardly depends on {name} within bounds {bounds}, so any value is as good as another",
            stacklevel=4,
        )
    elif at_bound is not None:
        what = "the score still falls" if target is None else "the residual has not met the noise"
        warnings.warn(
            f"{owner}: {what} at the bound {name} = {at_bound:g}, so a better one may lie beyond; widen bounds",
            stacklevel=4,
        )
    tried = tuple(Trial(v, s) for v, s in sorted(search.scores.items()))
    return Choice(name, value, build(value), tried, criterion, target, at_bound)


def _check(
    owner: str,
    y: Any,
    operator: Any,
    noise: float | None,
    criterion: str,
    bounds: Any,
    solves: int,
    generator: Any,
) -> None:
    if not isinstance(y, Tensor):
        raise TypeError(f"{owner}: y must be a torch.Tensor, got {type(y).__name__}")
    if not (y.is_floating_point() or y.is_complex()):
        raise TypeError(f"{owner}: y must be floating-point or complex, got {y.dtype}")
    if y.numel() == 0:
        raise ValueError(f"{owner}: y must not be empty, got the shape {tuple(y.shape)}")
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(f"{owner}: generator must be a torch.Generator or None, got {generator!r}")
    if isinstance(operator, MeasurementParallel):
        raise ValueError(
            f"{owner}: measurements spread over processes cannot be scored; give the whole operator"
        )
    if criterion not in CRITERIA:
        raise ValueError(f"{owner}: criterion must be one of {CRITERIA}, got {criterion!r}")
    if criterion != "left_out" and noise is None:
        raise ValueError(f"{owner}: the criterion {criterion!r} needs the noise, its standard deviation in y")
    if criterion == "left_out" and noise is not None:
        raise ValueError(
            f"{owner}: noise is for the criteria 'risk' and 'discrepancy'; 'left_out' needs none"
        )
    if noise is not None and not _is_number(noise):
        raise TypeError(f"{owner}: noise must be a number, got {noise!r}")
    if noise is not None and not (math.isfinite(noise) and noise > 0):
        raise ValueError(
            f"{owner}: noise must be finite and above 0, got {noise:g}; without noise the least "
            f"{owner.removeprefix('choose_')} is best"
        )
    pair = isinstance(bounds, tuple | list) and len(bounds) == 2 and all(map(_is_number, bounds))
    if not pair or not (0 < bounds[0] < bounds[1] and math.isfinite(bounds[1])):
        raise ValueError(f"{owner}: bounds must be two finite numbers above 0, the least first, got {bounds}")
    if isinstance(solves, bool) or not isinstance(solves, int) or solves < 3:
        raise ValueError(f"{owner}: solves must be a whole number of at least 3, got {solves!r}")
    check_numbers(owner, "y", y)


def _is_number(value: Any) -> bool:
    # NumPy's numbers are real numbers too.
    one = isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)
    return one and not isinstance(value, bool)


def norm_squared(operator: MeasurementOperator, y: Tensor) -> float:
    """Return the norm squared, also of an operator that has to see data before it knows the shape of an image."""
    operator.initial(y)
    return operator.norm_squared()


class _Solver:
    """Solves for one value after the other, each from the last one's solution."""

    def __init__(
        self, y: Tensor, operator: MeasurementOperator, build: Callable[[float], DEQRED], ratio: float = 1.0
    ) -> None:
        self.y, self.operator, self.build, self.ratio = y, operator, build, ratio
        self.last: Solution | None = None

    def __call__(self, value: float) -> Tensor | None:
        """Return the images, or None where one diverged."""
        model = self.build(value)
        model.on_failure = "ignore"
        model.tau = float(model.tau) * self.ratio
        try:
            self.last = model(self.y, self.operator, self.last, return_solution=True)
        except DivergenceError:
            return None
        return None if bool(self.last.diverged.any()) else self.last.value


def _square(v: Tensor, where: Tensor) -> float:
    return float((v * where).abs().square().sum(dtype=torch.float64) / where.expand(v.shape).sum())


class _LeftOut:
    """The mean square of the residual of measurements left out."""

    def __init__(
        self,
        y: Tensor,
        operator: MeasurementOperator,
        build: Callable[[float], DEQRED],
        share: float,
        generator: torch.Generator,
    ) -> None:
        stays, self.rest = operator.split(y, share, generator)
        # The weight tau |A|^2 against the data is that of all of them.
        ratio = norm_squared(operator, y) / norm_squared(stays.operator, stays.y)
        self.solve = _Solver(stays.y, stays.operator, build, ratio)
        self.seen: Tensor | None = None

    def __call__(self, value: float) -> float:
        image = self.solve(value)
        if image is None:
            return math.inf
        if self.seen is None:
            self.seen = seen(self.rest.operator, image)
        return _square(self.rest.operator(image) - self.rest.y, self.seen)


class _Residual:
    """The mean square of the residual; or of the error of A x, estimated by how far the residual follows the noise."""

    def __init__(
        self,
        y: Tensor,
        operator: MeasurementOperator,
        build: Callable[[float], DEQRED],
        noise: float,
        risk: bool,
        generator: torch.Generator,
    ) -> None:
        self.y, self.operator, self.noise, self.risk = y, operator, noise, risk
        self.seen = seen(operator, operator.initial(y))
        self.solve = _Solver(y, operator, build)
        if risk:
            self.probe = torch.randn(y.shape, dtype=y.dtype, generator=generator).to(y.device) * self.seen
            # A step of the noise's size: the derivative that the noise itself sees.
            self.beside = _Solver(y + noise * self.probe, operator, build)

    def __call__(self, value: float) -> float:
        image = self.solve(value)
        if image is None:
            return math.inf
        measured = self.operator(image)
        residual = _square(measured - self.y, self.seen)
        if not self.risk:
            return residual
        if self.beside.last is None:
            self.beside.last = self.solve.last
        beside = self.beside(value)
        if beside is None:
            return math.inf
        change = (self.operator(beside) - measured) / self.noise
        along = float((change * self.probe.conj()).real.sum(dtype=torch.float64))
        along /= float(self.seen.expand(self.y.shape).sum())
        return residual + 2 * self.noise**2 * along - self.noise**2


class _Search:
    """Searches on the logarithm of a value."""

    def __init__(self, score: Callable[[float], float], bounds: tuple[float, float], solves: int) -> None:
        self.score, self.bounds, self.solves = score, bounds, solves
        self.scores: dict[float, float] = {}

    def at(self, value: float) -> float:
        """Return the score of a value, tried if it was not before."""
        if value not in self.scores:
            self.scores[value] = self.score(value)
        return self.scores[value]

    def _clip(self, value: float) -> float:
        low, high = self.bounds
        return min(max(value, low), high)

    @property
    def _left(self) -> bool:
        return len(self.scores) < self.solves

    def _best(self) -> float:
        least = min(self.scores.values())
        if not math.isfinite(least):
            return min(self.scores)
        return max(v for v, score in self.scores.items() if score <= least + SAME * abs(least))

    def least(self) -> float:
        """Return the value of the least score."""
        low, high = self.bounds
        self.at(math.sqrt(low * high))
        while self._left:
            best = self._best()
            values = sorted(self.scores)
            k = values.index(best)
            below = values[k - 1] if k else None
            above = values[k + 1] if k + 1 < len(values) else None
            if above is None and best < high:
                self.at(self._clip(best * STRIDE))
            elif below is None and best > low:
                self.at(self._clip(best / STRIDE))
            elif below is None or above is None:
                neighbour = above if below is None else below
                # At a bound: whether the score falls up to it is seen from near by.
                if neighbour is None or max(best / neighbour, neighbour / best) < CLOSE:
                    break
                self.at(math.sqrt(best * neighbour))
            elif above / below <= CLOSE**2:
                break
            else:
                self.at(self._between(below, best, above))
        return self._best()

    def _between(self, below: float, best: float, above: float) -> float:
        """Return the least of the parabola through three points, kept off the points themselves."""
        a, b, c = (math.log(v) for v in (below, best, above))
        fa, fb, fc = (self.scores[v] for v in (below, best, above))
        wide = best / below if b - a > c - b else above / best
        middle = math.sqrt(below * best) if b - a > c - b else math.sqrt(best * above)
        if not all(map(math.isfinite, (fa, fb, fc))):
            return middle
        left, right = (b - a) * (fb - fc), (b - c) * (fb - fa)
        if left == right:
            return middle
        x = b - 0.5 * ((b - a) * left - (b - c) * right) / (left - right)
        near = 0.15 * math.log(wide)
        # Where the parabola agrees with the best point, the wider side is halved.
        return math.exp(x) if a + near < x < c - near and abs(x - b) > near else middle

    def crossing(self, target: float) -> float:
        """Return the value at which a score that grows with it meets a target."""
        low, high = self.bounds
        value = math.sqrt(low * high)
        below = above = None
        while self._left:
            here = self.at(value)
            if abs(here - target) <= MET * target:
                return value
            if here < target:
                below = value
            else:
                above = value
            if below is None:
                if value == low:
                    return low
                value = self._clip(value / STRIDE)
            elif above is None:
                if value == high:
                    return high
                value = self._clip(value * STRIDE)
            else:
                if above / below < 1 + MET:
                    break
                value = self._secant(below, above, target)
        return min(self.scores, key=lambda v: abs(math.log(max(self.scores[v], 1e-300) / target)))

    def _secant(self, below: float, above: float, target: float) -> float:
        f, g = self.scores[below], self.scores[above]
        if not math.isfinite(g) or f <= 0:
            return math.sqrt(below * above)
        share = math.log(target / f) / math.log(g / f)
        # A quarter of the way at the least, as a score may bend.
        share = min(max(share, 0.25), 0.75)
        return float(below ** (1 - share) * above**share)
