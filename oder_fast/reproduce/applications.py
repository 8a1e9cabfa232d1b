r"""The methods of the paper side by side, on images of the user's: CT, MRI, diffraction tomography.

A folder holds ``train``, ``validation`` and ``test`` with files that `oder_fast.data.ImageFolder` reads; folders in
``test`` are patients. Scans are simulated, the same ones for all methods. Trained are, from one network that learned
to denoise white noise:

=================  =============================================================================
unrolled RED       through a fixed number of gradient steps
SGD-Net-like       the same, each step with a third of the measurements
RED (DEQ)          through the fixed point, implicitly, all measurements
ODER, w of b       through the fixed point, implicitly, w of the b measurements a step, both ways
=================  =============================================================================

All stages through a fixed point penalize maps that hardly contract (`contraction_loss`), or there would be none to
compare. RED (DEQ) is trained and solved in the proximal form, and solved again by gradient steps as published, which
has the same fixed point; ODER is solved as its official code has it. Weights of the prior, of total variation and of
Tikhonov's norm, and the filter, are those with the best PSNR on ``validation``.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..data import ImageFolder, psnr, snr, ssim
from ..data.samples import collate
from ..denoisers import TotalVariation
from ..deqred import DEQRED
from ..fixed_point import Anderson, DivergenceError, Nesterov, NotConvergedWarning, Solution, Solver
from ..operators import MeasurementOperator
from ..published import oder
from ..red import GradientStep, ProximalStep
from ..training import Trainer, load_model, read_configuration
from ..training.draws import seed_of
from ..training.scans import Measured, Scan, make_scan
from ..viz import largest_of, new_figure, show_error, show_image, window_of
from .report import Claim, Report

Scale = Literal["cpu", "gpu"]
Solve = Callable[[Any, Tensor], Tensor | Solution]

DENOISED, SMOOTH = "RED, denoiser trained on noise", "total variation"
UNROLLED, SGD_NET = "unrolled RED", "SGD-Net-like"
GRADIENT, PROXIMAL = "RED (DEQ), gradient form", "RED (DEQ), proximal form"
SHARES = {"1/2": 2, "1/3": 3, "1/6": 6}
"""Of the measurements, in a step of ODER."""

THIRD = "1/3"
UNROLLED_STEPS, OFFICIAL_STEPS, MOST_STEPS = 12, 180, 2000
"""Of the unrolled networks, of ODER when it is solved, and of the gradient form until it converges."""

TOLERANCE = 1e-3
TAUS, ODER_TAUS = (0.3, 1.0, 3.0), (1.0, 3.0, 10.0)
"""Factors of the prior's weight that are tried on the validation images; ODER ends before small ones show."""

UNROLLED_TAU, UNROLLED_TIMES = 0.2, 3
"""Where the weight of the unrolled networks starts, which they learn; and their steps over those of the others."""

WEIGHTS, SMOOTH_TAU = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), 0.03
"""Of total variation, and the tau with which it is solved."""

NO_DATA = {"phantoms": {"kind": "ellipses"}}
CONTRACTION = {"mse": 1.0, "contraction": 0.02}
NEVER = 10**9


@dataclass(frozen=True)
class Effort:
    """How much is trained.

    Attributes:
        network: Options of `DnCNN`.
        noise: Steps on noise, and images in each.
        trained: Steps of each other stage, and images in each.
        iterations: Of the solves of ODER in training, both ways.
        patch: Rows and columns of the images trained on.
    """

    network: Mapping[str, Any]
    noise: tuple[int, int]
    trained: tuple[int, int]
    iterations: int
    patch: int


EFFORTS: dict[str, Effort] = {
    "cpu": Effort({"depth": 6, "width": 32, "bias": False}, (1200, 8), (120, 2), 120, 48),
    "gpu": Effort({"depth": 12, "width": 64, "bias": False}, (20000, 32), (2000, 8), 180, 128),
}


@dataclass(frozen=True)
class Application:
    """What is measured, and how it is reconstructed without a prior.

    Attributes:
        operator: As in a configuration.
        sigma: Largest noise of the first stage.
        tau: Weight of the prior, in units of the norm squared.
        direct: Its methods, by what is said of each.
        patches: Whether training takes parts of the images.
        views: Whether the number of views goes with the size of an image, as that which sampling needs does, so that
            small images have the artefacts of whole ones; and tau with its inverse, as the norm squared does.
        volumes: By how much fewer steps are trained, and images taken in each, as an image is one of many slices.
        denoiser: As in a configuration, in place of a `DnCNN`.
    """

    operator: Mapping[str, Any]
    sigma: float
    tau: float
    direct: Mapping[str, Solve]
    patches: bool = True
    views: bool = False
    volumes: int = 1
    denoiser: Mapping[str, Any] | None = None

    def of_size(self, share: float) -> tuple[dict[str, Any], float]:
        """Return operator and tau of images of a share of the whole size."""
        operator = dict(self.operator)
        if not self.views:
            return operator, self.tau
        return {**operator, "angles": max(1, round(share * operator["angles"]))}, self.tau / share


def _fbp(name: Any, ct: Any, y: Tensor) -> Tensor:
    image: Tensor = ct.fbp(y, filter=name).clamp(min=0)
    return image


def _tikhonov(share: float, idt: Any, y: Tensor) -> Tensor:
    image: Tensor = idt.tikhonov(y, share * idt.norm_squared())
    return image


def _zero_filled(mri: Any, y: Tensor) -> Tensor:
    image: Tensor = mri.adjoint(y)
    return image


APPLICATIONS: dict[str, Application] = {
    "ct": Application(
        {"kind": "ct", "angles": 48, "snr": 50},
        0.03,
        0.008,
        {f"FBP, {name}": partial(_fbp, name) for name in ("ramp", "shepp-logan", "cosine", "hann")},
        views=True,
    ),
    "mri": Application(
        {
            "kind": "mri",
            "coils": 12,
            "mask": "gaussian_lines",
            "acceleration": 4,
            "center_fraction": 0.08,
            "snr": 30,
        },
        0.04,
        0.02,
        {"zero-filled": _zero_filled},
    ),
    "idt": Application(
        {
            "kind": "idt",
            "depths": [2.0 * k - 7 for k in range(8)],
            "thickness": 2.0,
            "rings": [[21, 0.9], [17, 0.72], [13, 0.54], [9, 0.36], [4, 0.18]],
            "pixel_size": 0.14,
            "wavelength": 0.515,
            "numerical_aperture": 0.9,
            "medium_index": 1.33,
            "contrast_unit": 0.0266,
            "snr": 15,
        },
        0.15,
        0.00225,
        {f"Tikhonov, {share:g}": partial(_tikhonov, share) for share in (1e-5, 1e-4, 3e-4, 1e-3, 1e-2)},
        patches=False,
        volumes=3,
        denoiser={
            "kind": "slice_dncnn",
            "options": {"dilations": [1, 2, 4, 8, 4, 2, 1], "width": 24, "neighbours": 2},
        },
    ),
}


class Case(NamedTuple):
    """An image and its measurements.

    Attributes:
        name: Of the file.
        patient: The folder it lies in.
        truth: Shape ``(*image_shape)``.
        measured: Operator and data, of one image.
    """

    name: str
    patient: str
    truth: Tensor
    measured: Measured


class Score(NamedTuple):
    """How well an image was reconstructed, and what it took."""

    psnr: float
    ssim: float
    snr: float
    seconds: float
    denoiser_calls: float
    operator_calls: float
    converged: float


DIVERGED = Score(math.nan, math.nan, math.nan, math.nan, math.nan, math.nan, 0.0)


class Experiment:
    """One application: its data, its trained networks, and the methods.

    Args:
        name: A key of `APPLICATIONS`.
        data: Folder with ``train``, ``validation`` and ``test``.
        work: Folder of the runs; those that are there are gone on with.
        scale: How much is trained.
        seed: Of everything random.
    """

    def __init__(self, name: str, data: Path, work: Path, scale: Scale, seed: int) -> None:
        self.application, self.effort = APPLICATIONS[name], EFFORTS[scale]
        self.data, self.work, self.seed = data, work, seed
        operator = read_configuration({"operator": dict(self.application.operator), "data": NO_DATA}).operator
        self.scan: Scan = make_scan(operator)
        self.nonnegative = self.scan.nonnegative
        self.validation, self.test = (self._cases(part) for part in ("validation", "test"))
        self.blocks = int(self.test[0].measured.operator.n_blocks)
        size, patch = max(self.test[0].truth.shape), self.effort.patch
        self.share = min(1.0, patch / size) if self.application.patches else 1.0
        self.small, self.small_tau = self.application.of_size(self.share)

    # ------------------------------------------------------------------ data

    def _cases(self, part: str) -> list[Case]:
        folder = ImageFolder(self.data / part, scale="none", volumes=self.scan.axes == 3)
        cases = []
        for k in range(len(folder)):
            g = torch.Generator().manual_seed(seed_of(self.seed, part, k))
            sample = self.scan.prepare(folder[k], g)
            self.scan.check(tuple(sample.image.shape), sample.image.is_complex())
            measured = self.scan.measure(collate([sample]), [g])
            cases.append(Case(sample.name, folder.groups[k], sample.image, measured))
        return cases

    def score(self, case: Case, solve: Solve) -> Score:
        """Reconstruct an image and compare it."""
        return self.reconstruct(case, solve)[0]

    def reconstruct(self, case: Case, solve: Solve) -> tuple[Score, Tensor]:
        """Reconstruct an image, compare it, and return what is shown of it too; NaN where the solve diverges."""
        start = time.perf_counter()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConvergedWarning)
            try:
                result = solve(case.measured.operator, case.measured.data)
            except DivergenceError:
                return DIVERGED, torch.full_like(self.scan.show(case.truth), math.nan)
        seconds = time.perf_counter() - start
        solution = result if isinstance(result, Solution) else None
        value = solution.value if solution is not None else result
        assert isinstance(value, Tensor)
        image, truth = self.scan.show(value[0]), self.scan.show(case.truth)
        score = Score(
            psnr(image, truth),
            ssim(image, truth),
            snr(image, truth),
            seconds,
            solution.denoiser_calls if solution else 0,
            float(solution.operator_calls) if solution else 1,
            float(solution.converged.all()) if solution else 1.0,
        )
        return score, image

    # ------------------------------------------------------------------ training

    def _configuration(self, run: str, red: Mapping[str, Any], weights: Path | None) -> Any:
        application, effort = self.application, self.effort
        first, unrolled = weights is None, red.get("differentiation") == "unrolled"
        (noise_steps, noise), (trained_steps, trained) = (
            (
                steps // application.volumes,
                {"batch_size": max(1, size // application.volumes), "schedule": "cosine", "ema": None},
            )
            for steps, size in (effort.noise, effort.trained)
        )
        denoiser = dict(application.denoiser or {"kind": "dncnn", "options": dict(effort.network)})
        return read_configuration(
            {
                "operator": self.small,
                "data": {
                    "train": str(self.data / "train"),
                    "validation": str(self.data / "validation"),
                    "scale": "none",
                    "patch": effort.patch if application.patches else None,
                    "workers": 0,
                },
                "denoiser": denoiser if weights is None else {**denoiser, "weights": str(weights)},
                "red": {"tau": self.small_tau, **red},
                "pretraining": {
                    **noise,
                    "steps": noise_steps if first else 0,
                    "learning_rate": 2e-3,
                    "sigma": [0.0, application.sigma],
                },
                "training": {
                    **trained,
                    "steps": 0 if first else trained_steps * (UNROLLED_TIMES if unrolled else 1),
                    "learning_rate": 4e-4,
                    "loss": {"mse": 1.0} if unrolled else CONTRACTION,
                    "contraction": 0.95,
                },
                "validation": {"every": NEVER, "samples": 1, "images": 0},
                "checkpoints": {"every": 50},
                "output": str(self.work / run),
                "seed": self.seed,
            }
        )

    def train(self, run: str, red: Mapping[str, Any], weights: Path | None = None) -> Path:
        """Train, or go on, or find it done; return the checkpoint.

        Raises:
            KeyboardInterrupt: Where the run was ended by a signal.
        """
        outcome = Trainer(self._configuration(run, red, weights)).fit(resume=True)
        if outcome.reason != "finished":
            raise KeyboardInterrupt
        return outcome.last

    def train_all(self) -> dict[str, DEQRED]:
        """Return a model of each method that is trained."""
        iterations = {"max_iterations": self.effort.iterations, "adjoint_iterations": self.effort.iterations}
        unrolled = {
            "step": "gradient",
            "tau": UNROLLED_TAU,
            "train_tau": True,
            "differentiation": "unrolled",
            "solver": "picard",
            "max_iterations": UNROLLED_STEPS,
            "tolerance": 1e-12,
        }
        published = {"step": "gradient", "solver": "nesterov", "variance_reduction": False, **iterations}
        first = self.train("noise", {})
        runs: dict[str, dict[str, Any]] = {
            UNROLLED: unrolled,
            SGD_NET: {**unrolled, "minibatch_size": self.small_size(THIRD), "variance_reduction": False},
            PROXIMAL: {"max_iterations": 40, "adjoint_iterations": 40},
        }
        runs |= {
            self.oder(share): {**published, "minibatch_size": self.small_size(share)} for share in SHARES
        }
        checkpoints = {DENOISED: first}
        for method, red in runs.items():
            tell(f"training {method}")
            folder = "".join(c if c.isalnum() else "-" for c in method)
            checkpoints[method] = self.train(folder, red, first)
        return {method: load_model(path)[0] for method, path in checkpoints.items()}

    def size(self, share: str) -> int:
        """Return the blocks of a minibatch."""
        return max(1, self.blocks // SHARES[share])

    def small_size(self, share: str) -> int:
        """Return the blocks of a minibatch in training."""
        blocks = self.small["angles"] if self.application.views else self.blocks
        return max(1, blocks // SHARES[share])

    def oder(self, share: str) -> str:
        """Return the name of ODER with a share of the measurements."""
        return f"ODER, {self.size(share)} of {self.blocks}"

    # ------------------------------------------------------------------ methods

    def methods(self) -> dict[str, Solve]:
        """Return all methods in the order of the table; what each has to choose is chosen on the validation images."""
        name, direct = self._best(self.application.direct)
        smooth = {w: self._fixed_point(TotalVariation(w), SMOOTH_TAU) for w in WEIGHTS}
        trained = self.train_all()
        methods: dict[str, Solve] = {name: direct, SMOOTH: self._best(smooth)[1]}
        for method, model in trained.items():
            denoiser = model.denoiser
            assert isinstance(denoiser, nn.Module)
            if method in (UNROLLED, SGD_NET):
                model.generator = torch.Generator().manual_seed(self.seed)
                if model.step.minibatch_size is not None:
                    model.step = replace(model.step, minibatch_size=self.size(THIRD))
                methods[method] = solving(model)
                continue
            if method in (DENOISED, PROXIMAL):
                tau, methods[method] = self._best_tau(TAUS, partial(self._fixed_point, denoiser))
                if method == PROXIMAL:
                    slow = Nesterov(MOST_STEPS, TOLERANCE)
                    methods[GRADIENT] = self._fixed_point(denoiser, tau, GradientStep(), slow)
                continue
            share = next(s for s in SHARES if self.oder(s) == method)
            build = partial(self._published, denoiser, self.size(share))
            _, methods[method] = self._best_tau(ODER_TAUS, build)
        return methods

    def _fixed_point(
        self,
        denoiser: nn.Module,
        tau: float,
        step: ProximalStep | GradientStep | None = None,
        solver: Solver[Any] | None = None,
    ) -> Solve:
        return solving(
            DEQRED(
                denoiser,
                tau=tau,
                step=step or ProximalStep(),
                solver=solver or Anderson(tolerance=TOLERANCE),
                nonnegative=self.nonnegative,
                normalize=False,
                on_failure="ignore",
            )
        )

    def _published(self, denoiser: nn.Module, size: int, tau: float) -> Solve:
        model = oder(
            denoiser,
            tau,
            size,
            max_iterations=OFFICIAL_STEPS,
            nonnegative=self.nonnegative,
            generator=torch.Generator().manual_seed(self.seed),
        )
        return solving(model)

    def _best_tau(self, factors: Sequence[float], build: Callable[[float], Solve]) -> tuple[float, Solve]:
        tau, solve = self._best(
            {factor * self.application.tau: build(factor * self.application.tau) for factor in factors}
        )
        return float(tau), solve

    def _best(self, methods: Mapping[Any, Solve]) -> tuple[Any, Solve]:
        """Return the method with the best mean PSNR on the validation images, and its key."""
        scores = {
            key: statistics.fmean(self.score(case, solve).psnr for case in self.validation)
            for key, solve in methods.items()
        }
        best = max(scores, key=lambda key: -math.inf if math.isnan(scores[key]) else scores[key])
        return best, methods[best]


def solving(model: DEQRED) -> Solve:
    """Return a model as a function that tells of its solves."""

    def solve(operator: MeasurementOperator, y: Tensor) -> Solution:
        solution: Solution = model(y, operator, return_solution=True)
        return solution

    return solve


def tell(text: str) -> None:
    """Tell of the progress."""
    print(f"oder-fast: {text}", file=sys.stderr, flush=True)


def run(name: str, data: Path, output: Path, scale: Scale = "cpu", seed: int = 0) -> Report:
    """Train and compare.

    Args:
        name: ``"ct"``, ``"mri"`` or ``"idt"``.
        data: Folder with ``train``, ``validation`` and ``test``.
        output: Folder, in which ``NAME-runs`` keeps what is trained: the same call goes on with it.
        scale: How much is trained: ``"cpu"`` takes less than an hour on two cores.
        seed: Of everything random.

    Returns:
        A row for each method and patient.

    Raises:
        OSError: For a folder that cannot be read.
        ValueError: For images that the operator does not take.
    """
    start = time.perf_counter()
    experiment = Experiment(name, data, output / f"{name}-runs", scale, seed)
    methods = experiment.methods()
    images: dict[str, Tensor] = {}
    scores: dict[str, list[Score]] = {}
    for method, solve in methods.items():
        scores[method] = []
        for k, case in enumerate(experiment.test):
            score, image = experiment.reconstruct(case, solve)
            scores[method].append(score)
            if k == 0:
                images[method] = image
        tell(f"{method}: {statistics.fmean(score.psnr for score in scores[method]):.2f} dB")
    rows = _rows(scores, [case.patient for case in experiment.test])
    first = experiment.test[0]
    remarks = [
        f"{len(experiment.test)} test images of {' x '.join(map(str, first.truth.shape))}, "
        f"{len(experiment.validation)} to choose on; "
        f"{time.perf_counter() - start:.0f} s with what had to be trained.",
        *_unconverged(scores),
    ]
    figure = _figure(experiment.scan.show(first.truth), images, scores)
    return Report(name, rows, _claims(scores, experiment), figure, remarks)


def _mean(scores: Sequence[Score], quantity: str) -> float:
    return statistics.fmean(getattr(score, quantity) for score in scores)


def _error(scores: Sequence[Score], quantity: str) -> float:
    """Return the standard error of the mean; NaN of one image."""
    values = [getattr(score, quantity) for score in scores]
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _rows(scores: Mapping[str, Sequence[Score]], patients: Sequence[str]) -> list[dict[str, Any]]:
    groups = ["all", *dict.fromkeys(patients)] if len(set(patients)) > 1 else ["all"]
    rows = []
    for group in groups:
        for method, of_all in scores.items():
            of = [s for s, patient in zip(of_all, patients, strict=True) if group in ("all", patient)]
            row: dict[str, Any] = {"test": group, "images": len(of), "method": method}
            for quantity in ("psnr", "ssim", "snr"):
                row |= {
                    quantity: round(_mean(of, quantity), 4),
                    f"{quantity}_error": round(_error(of, quantity), 4),
                }
            for quantity in ("seconds", "denoiser_calls", "operator_calls", "converged"):
                row[quantity] = round(_mean(of, quantity), 3)
            rows.append(row)
    return rows


def _claims(scores: Mapping[str, Sequence[Score]], experiment: Experiment) -> list[Claim]:
    quality = {method: _mean(of, "psnr") for method, of in scores.items()}
    direct = next(iter(scores))
    third = experiment.oder(THIRD)
    calls = _mean(scores[PROXIMAL], "denoiser_calls") / _mean(scores[GRADIENT], "denoiser_calls")
    return [
        Claim(f"dB of {SMOOTH} above {direct}", quality[SMOOTH] - quality[direct], 0.0),
        Claim(f"dB of {DENOISED}, above {SMOOTH}", quality[DENOISED] - quality[SMOOTH], 0.0),
        Claim(
            "dB of RED (DEQ) above the denoiser trained on noise", quality[PROXIMAL] - quality[DENOISED], 0.0
        ),
        Claim(f"dB of {third} measurements, below RED (DEQ)", quality[GRADIENT] - quality[third], high=0.3),
        Claim("dB between the two forms", abs(quality[PROXIMAL] - quality[GRADIENT]), high=0.02),
        Claim("denoiser calls of the proximal form over those of the gradient form", calls, high=0.1),
    ]


def _unconverged(scores: Mapping[str, Sequence[Score]]) -> list[str]:
    return [
        f"{method}: {sum(not score.converged for score in scores[method])} of {len(scores[method])} solves did not "
        f"converge."
        for method in (DENOISED, GRADIENT, PROXIMAL)
        if not all(score.converged for score in scores[method])
    ]


def _figure(truth: Tensor, images: Mapping[str, Tensor], scores: Mapping[str, Sequence[Score]]) -> Any:
    def plane(image: Tensor) -> Tensor:
        return image[len(image) // 2] if image.ndim == 3 else image

    methods = [
        *list(images)[:3],
        PROXIMAL,
        next(m for m in images if m.startswith("ODER") and m != list(images)[-1]),
    ]
    figure = new_figure(16, 9)
    above, below = figure.subfigures(2, 1, height_ratios=(2, 1))
    axes = above.subplots(2, len(methods) + 1)
    truth = plane(truth)
    window, largest = window_of(truth), largest_of(plane(images[methods[0]]) - truth)
    show_image(axes[0, 0], truth, window, "truth")
    axes[1, 0].set_axis_off()
    for column, method in zip(axes[:, 1:].T, methods, strict=True):
        show_image(column[0], plane(images[method]), window, f"{method}\n{scores[method][0].psnr:.2f} dB")
        show_error(column[1], plane(images[method]), truth, largest)
    quality = below.subplots()
    means, errors = ([of(scores[method], "psnr") for method in scores] for of in (_mean, _error))
    widths = [0.0 if math.isnan(error) else error for error in errors]
    quality.errorbar(means, list(scores), xerr=widths, fmt="o", capsize=3)
    quality.invert_yaxis()
    quality.grid(axis="x", alpha=0.3)
    quality.set(xlabel="PSNR (dB), mean and standard error")
    return figure
