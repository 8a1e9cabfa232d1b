"""What the demonstrations share: reading, training, solving, and telling the result."""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..choice import choose_tau, choose_weight
from ..data import Sample, atomic, patches, psnr, random_ellipses, read_image, save_npz, ssim
from ..denoisers import DnCNN, TotalVariation
from ..denoisers.call import from_channels
from ..deqred import DEQRED
from ..fixed_point import Anderson, Nesterov, NotConvergedWarning
from ..operators import MeasurementOperator
from ..pretrained import Name, model_card, pretrained
from ..red import GradientStep
from ..training import Trainer, read_configuration
from ..training.draws import seed_of
from ..viz import largest_of, new_figure, show_error, show_image, window_of

FILES = ("figure.png", "arrays.npz", "denoiser.pt")
SMALLEST = 16
# Training images are small: scans of them are those of the slice at a fraction of the cost.
PATCH = 64
FIXED_POINT_BATCH = 4
# Relative distance from the fixed point at which solves end, and that of the point they are compared with.
TOLERANCE, EXACT = 1e-3, 1e-5
# Calls of the denoiser in a solve of RED, in training too, and in one of ODER, at most.
RED_ITERATIONS, ODER_ITERATIONS = 100, 400
# Reconstructions by which the data choose the weight of total variation, and of the package's denoiser, at most.
SMOOTH_SOLVES, TAU_SOLVES = 6, 6
# Calls of its proximal map in each, at most; and its tau, so large that the fixed point is close to that of the norm
# itself, and so small that these calls come near it.
SMOOTH_ITERATIONS, SMOOTH_TAU = 50, 0.03
# Steps between validations, so many that there is one at the end of a stage; and its images.
AT_THE_END, VALIDATED = 10**9, 4
# Decibels by which a curve must lie above its end for the summary to say so.
NOTABLE = 0.1


class BadInputError(ValueError):
    """Something the user gave cannot be worked with."""


@dataclass(frozen=True)
class Settings:
    """What the user chose, whatever the demonstration; see the command's help."""

    input: Path | None
    array: str | None
    output: Path
    minibatch: int | None
    snr: float
    steps: int
    fixed_point_steps: int
    seed: int
    threads: int

    def generator(self, number: int) -> torch.Generator:
        """Return one of the generators that follow from the seed: 1 and 2 are those of training and minibatches."""
        return torch.Generator().manual_seed(self.seed + number)


@dataclass(frozen=True)
class TrainingPlan:
    """How a denoiser is made and trained.

    Attributes:
        network: Arguments of `DnCNN`. Without biases a network denoises an image twice as bright, and twice as
            noisy, as well as the original.
        sigma: Least and largest noise of its training.
        learning_rates: On noise, and through the fixed point.
        kind: `DnCNN` or what derives from it.
        batches: Images a step on noise, and through the fixed point.
    """

    network: dict[str, Any]
    sigma: tuple[float, float]
    learning_rates: tuple[float, float]
    kind: type[DnCNN] = DnCNN
    batches: tuple[int, int] = (8, FIXED_POINT_BATCH)


class Prior(NamedTuple):
    """What the images are expected to look like.

    Attributes:
        denoiser: Trained through the fixed point.
        tau: Its weight, in units of |A|^2.
        arguments: Of the denoiser.
    """

    denoiser: nn.Module
    tau: float
    arguments: dict[str, Any]


@dataclass
class Row:
    """One line of the table.

    Attributes:
        image: What is shown and compared with the truth; real, one slice or several.
        value: The reconstruction, `image` itself or complex.
        trace: PSNR of the point at each call of the denoiser.
        distances: Relative distance of that point from the fixed point.
        distance: The result's, as the solver estimates it.
    """

    name: str
    image: Tensor
    value: Tensor
    psnr: float
    ssim: float
    seconds: float
    denoiser_calls: int | None = None
    operator_calls: float | None = None
    trace: tuple[float, ...] = ()
    distances: tuple[float, ...] = ()
    converged: bool = True
    distance: float = 0.0

    @property
    def short(self) -> str:
        """The name without its explanation."""
        return self.name.split(",")[0]


@dataclass(frozen=True)
class View:
    """How an image is shown.

    Attributes:
        name: What is said of it.
        pick: From the image, of one slice or several, to rows and columns.
        aspect: Height of a pixel over its width.
    """

    name: str
    pick: Callable[[Tensor], Tensor]
    aspect: float = 1.0


@dataclass(frozen=True)
class Result:
    """All that is told and written.

    Attributes:
        title: Of the figure.
        unit: Of the images shown.
        truth: Real image.
        rows: Direct methods first; then total variation, RED and ODER.
        draw_data: Draws the measurements into an axis.
        remarks: Sentences of the demonstration's own.
        arrays: What arrays.npz holds.
        prior: Of RED and ODER.
        views: Of the images; errors are shown in the first.
    """

    title: str
    unit: str
    truth: Tensor
    rows: list[Row]
    draw_data: Callable[[Any], None]
    remarks: list[str]
    arrays: dict[str, Tensor]
    prior: Prior
    views: tuple[View, ...] = field(default=(View("", lambda image: image),))

    @property
    def direct(self) -> Row:
        """The best of the direct methods."""
        return max(self.rows[:-3], key=lambda row: row.psnr)


def say(text: str) -> None:
    """Tell of the progress."""
    print(text, file=sys.stderr, flush=True)


def check_minibatch(minibatch: int, blocks: int, what: str) -> None:
    """Raise a `BadInputError` where a minibatch has more than all blocks."""
    if minibatch > blocks:
        raise BadInputError(f"--minibatch must be at most the number of {what}, {blocks}, got {minibatch}")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn errors of readers into a `BadInputError`."""
    try:
        yield
    except OSError as error:
        raise BadInputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise BadInputError(f"cannot read {error}") from error


def read_slice(path: Path, array: str | None) -> Tensor:
    """Return a real image, as stored."""
    with reading(path):
        return read_image(path, array).image


def scaled(image: Tensor, path: Path) -> Tensor:
    """Scale an image to [0, 1], or a complex one to magnitudes of at most 1.

    Raises:
        BadInputError: For an image that is too small or shows nothing.
    """
    if min(image.shape) < SMALLEST:
        raise BadInputError(
            f"{path}: the image must have at least {SMALLEST} rows and columns, got {tuple(image.shape)}"
        )
    if not image.is_complex():
        image = image - image.min().clamp(max=0)
    magnitude = image.abs()
    if magnitude.min() == magnitude.max():
        raise BadInputError(f"{path}: all pixels have the same value")
    return image / magnitude.max()


@contextmanager
def working(settings: Settings) -> Iterator[None]:
    """Make the output folder, and remove it if nothing comes of it; work with the threads asked for."""
    created = _make_writable(settings.output)
    try:
        # One by default: the networks are small, and threads that wait for each other on busy cores take
        # ten times as long.
        torch.set_num_threads(settings.threads)
        yield
    except BaseException:
        if created:
            with suppress(OSError):
                settings.output.rmdir()
        raise


def _make_writable(folder: Path) -> bool:
    """Return whether the folder had to be made."""
    created = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for name in FILES:
            if (folder / name).is_dir():
                raise IsADirectoryError(0, f"{name} is a folder there")
    except OSError as error:
        raise BadInputError(f"cannot write to the folder {folder}: {error.strerror}") from error
    return created


def shipped(name: Name, operator: MeasurementOperator, y: Tensor, nonnegative: bool) -> Prior:
    """Return the denoiser that comes with the package, and the weight of it that the data choose."""
    model = pretrained(name, nonnegative=nonnegative, on_failure="ignore")
    say(f"The denoiser is that of oder_fast.pretrained('{name}'); --train trains one here.")
    tau = choose_tau(y, operator, model, solves=TAU_SOLVES).value
    say(f"The data choose tau/|A|^2 = {tau:.2g}.")
    assert isinstance(model.denoiser, nn.Module)
    return Prior(model.denoiser, tau, model_card(name)["denoiser"]["options"])


def training_images(truth: Tensor) -> list[Tensor]:
    """Return photographs and an MR slice that come with scikit-image and pydicom, scaled to [0, 1].

    Nothing of the slice to be reconstructed is among them: an image equal to it is left out.

    Args:
        truth: That slice as read, scaled to [0, 1].
    """
    import skimage.data
    from pydicom import examples

    arrays = [
        getattr(skimage.data, name)() for name in ("camera", "coins", "moon", "gravel", "brick", "grass")
    ]
    arrays.append(examples.overlay.pixel_array)
    images = [torch.from_numpy(array.astype("float32")) / float(array.max()) for array in arrays]
    images = [image for image in images if image.shape != truth.shape or not torch.allclose(image, truth)]
    halves = [torch.nn.functional.avg_pool2d(image[None], 2)[0] for image in images]
    return images + [half for half in halves if min(half.shape) >= PATCH]


def draw_image(images: list[Tensor], generator: torch.Generator) -> Tensor:
    """Draw a phantom, or three times as often a patch of another brightness, shape (PATCH, PATCH)."""
    if float(torch.rand((), generator=generator)) < 1 / 4:
        return random_ellipses(1, PATCH, generator, texture=0.01)[0]
    k = int(torch.randint(len(images), (), generator=generator))
    brightness = 0.3 + 0.7 * torch.rand((), generator=generator)
    return brightness * patches(images[k], PATCH, 1, generator)[0]


class Drawn(Dataset[Sample]):
    """Images drawn from seeds of their own.

    Args:
        draw: Returns an image.
        n: Number of images.
        seed: Other seeds give other images.
    """

    def __init__(self, draw: Callable[[torch.Generator], Tensor], n: int, seed: int) -> None:
        self.draw, self.n, self.seed = draw, n, seed

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Sample:
        generator = torch.Generator().manual_seed(seed_of(self.seed, index))
        return Sample(f"image {index}", self.draw(generator))


def train(
    settings: Settings,
    plan: TrainingPlan,
    operator: Mapping[str, Any],
    draw: Callable[[torch.Generator], Tensor],
    tau: float,
) -> DnCNN:
    """Train a denoiser on noise, then through the fixed point, and let everything else that a run writes go.

    Args:
        settings: The user's.
        plan: Of the denoiser.
        operator: Of small scans, as in a configuration.
        draw: Draws an image.
        tau: Weight of the prior in small scans.
    """
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        denoiser = plan.kind(**plan.network)
    steps = (settings.steps, settings.fixed_point_steps)
    stages: list[dict[str, Any]] = [
        {"steps": n, "batch_size": batch, "learning_rate": rate, "schedule": "cosine", "ema": None}
        for n, batch, rate in zip(steps, plan.batches, plan.learning_rates, strict=True)
    ]
    drawn = max(n * batch for n, batch in zip(steps, plan.batches, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        configuration = read_configuration(
            {
                "operator": operator,
                # Images are drawn here; none is turned or scaled again.
                "data": {"phantoms": {"kind": "ellipses"}, "augment": False, "workers": 0},
                "red": {
                    "tau": tau,
                    "max_iterations": RED_ITERATIONS,
                    "adjoint_iterations": RED_ITERATIONS,
                },
                "validation": {"every": AT_THE_END, "samples": VALIDATED, "images": 0},
                "checkpoints": {"every": AT_THE_END},
                "output": folder,
                "seed": settings.seed,
                "device": "cpu",
                "pretraining": stages[0] | {"sigma": plan.sigma},
                "training": stages[1],
            }
        )
        trainer = Trainer(
            configuration,
            denoiser=denoiser,
            train_set=Drawn(draw, drawn, settings.seed),
            validation_set=Drawn(draw, VALIDATED, settings.seed + 1),
        )
        if trainer.fit().reason != "finished":
            raise KeyboardInterrupt
    return denoiser.eval()


def build_models(
    settings: Settings,
    prior: Prior,
    *,
    minibatch: int,
    nonnegative: bool,
    check_every: int = 10,
) -> tuple[DEQRED, DEQRED]:
    """Return RED by the proximal form, and ODER by gradient steps of minibatches, which follow from the seed.

    The minibatches' noise is reduced, so that both end at the same fixed point.
    """
    solver = Nesterov(ODER_ITERATIONS, TOLERANCE, check_every)
    step, generator = GradientStep(minibatch_size=minibatch), settings.generator(2)
    common: dict[str, Any] = {
        "tau": prior.tau,
        "nonnegative": nonnegative,
        "normalize": False,
        "on_failure": "ignore",
    }
    red = DEQRED(prior.denoiser, solver=Anderson(RED_ITERATIONS, TOLERANCE), **common)
    return red, DEQRED(prior.denoiser, step=step, solver=solver, generator=generator, **common)


def direct_row(
    name: str,
    reconstruct: Callable[[], Tensor],
    truth: Tensor,
    show: Callable[[Tensor], Tensor] = torch.abs,
) -> Row:
    """Time a reconstruction without iterations; compare what is shown of it with the truth."""
    start = time.perf_counter()
    value = reconstruct()
    seconds = time.perf_counter() - start
    image = show(value)
    return Row(name, image, value, psnr(image, truth), ssim(image, truth), seconds)


def smooth_row(
    operator: MeasurementOperator,
    y: Tensor,
    truth: Tensor,
    show: Callable[[Tensor], Tensor] = torch.abs,
    nonnegative: bool = False,
    dual_iterations: int = 200,
) -> Row:
    """Reconstruct by total variation, whose weight the data choose."""

    def smooth(weight: float) -> DEQRED:
        solver, denoiser = Anderson(SMOOTH_ITERATIONS, TOLERANCE), TotalVariation(weight, dual_iterations)
        return DEQRED(denoiser, tau=SMOOTH_TAU, solver=solver, nonnegative=nonnegative)

    with warnings.catch_warnings():
        # The table tells of what has not converged.
        warnings.simplefilter("ignore", NotConvergedWarning)
        choice = choose_weight(y, operator, smooth, tau=SMOOTH_TAU, solves=SMOOTH_SOLVES)
        start = time.perf_counter()
        with torch.no_grad():
            solution = choice.model(y, operator, return_solution=True)
    seconds = time.perf_counter() - start
    image = show(solution.value[0])
    return Row(
        f"Total variation, weight {choice.value:.2g}",
        image,
        solution.value[0],
        psnr(image, truth),
        ssim(image, truth),
        seconds,
        denoiser_calls=solution.denoiser_calls,
        operator_calls=solution.operator_calls,
    )


def beside(row: Row, others: Sequence[Row], quality: Callable[[Row], float] = lambda row: row.psnr) -> str:
    """Say how much better one row is than others."""
    differences = (f"{quality(row) - quality(other):+.2f} dB from {other.name}" for other in others)
    return f"{row.short} is " + "; ".join(differences)


def solved_rows(
    names: Sequence[str],
    models: Sequence[DEQRED],
    operator: MeasurementOperator,
    y: Tensor,
    truth: Tensor,
    show: Callable[[Tensor], Tensor] = torch.abs,
) -> list[Row]:
    """Solve for one image by several models of one fixed point, and compare what they go through with it."""
    exact = copy(models[0])
    exact.solver = replace(exact.solver, tolerance=EXACT, max_iterations=2 * RED_ITERATIONS)
    with torch.no_grad():
        fixed_point = exact(y, operator)
    return [
        _solved_row(name, model, operator, y, truth, show, fixed_point)
        for name, model in zip(names, models, strict=True)
    ]


def _solved_row(
    name: str,
    model: DEQRED,
    operator: MeasurementOperator,
    y: Tensor,
    truth: Tensor,
    show: Callable[[Tensor], Tensor],
    fixed_point: Tensor,
) -> Row:
    assert isinstance(model.denoiser, nn.Module)
    trace: list[float] = []
    distances: list[float] = []

    def record(_: Any, arguments: tuple[Tensor, ...]) -> None:
        point = from_channels(arguments[0], fixed_point)
        error = (show(point[0]) - truth).square().mean()
        trace.append(float(-10 * torch.log10(error / (truth.max() - truth.min()) ** 2)))
        distances.append(float((point - fixed_point).norm() / fixed_point.norm()))

    hook = model.denoiser.register_forward_pre_hook(record)
    start = time.perf_counter()
    with torch.no_grad():
        solution = model(y, operator, return_solution=True)
    seconds = time.perf_counter() - start
    hook.remove()
    value = solution.value[0]
    image = show(value)
    return Row(
        name,
        image,
        value,
        psnr(image, truth),
        ssim(image, truth),
        seconds,
        denoiser_calls=solution.denoiser_calls,
        operator_calls=solution.operator_calls,
        trace=tuple(trace),
        distances=tuple(distances),
        converged=bool(solution.converged[0]),
        distance=float(solution.distance[0]),
    )


def report(folder: Path, result: Result) -> None:
    """Print the table and the summary; write figure, arrays and weights, each whole or not at all."""
    width = max(len(row.name) for row in result.rows)
    print(f"{'method':{width}}  PSNR (dB)   SSIM  seconds  denoiser calls  operator calls")
    for row in result.rows:
        calls = ("-" if n is None else f"{n:.0f}" for n in (row.denoiser_calls, row.operator_calls))
        print(
            f"{row.name:{width}}  {row.psnr:9.2f}  {row.ssim:.3f}  {row.seconds:7.3f}",
            *(f"{n:>14}" for n in calls),
            sep="  ",
        )
    for sentence in (*result.remarks, *_caveats(result.rows[-2:])):
        print(sentence)
    figure = _figure(result)
    with atomic(folder / "figure.png") as temporary:
        figure.savefig(temporary, dpi=120)
    save_npz(folder / "arrays.npz", **result.arrays)
    denoiser, arguments = result.prior.denoiser, result.prior.arguments
    with atomic(folder / "denoiser.pt") as temporary:
        torch.save({"arguments": arguments, "state_dict": denoiser.state_dict()}, temporary)
    print("Wrote " + ", ".join(str(folder / name) for name in FILES))


def _caveats(rows: Sequence[Row]) -> list[str]:
    """Say where a solve was cut short, and where the image was better on the way."""
    sentences = []
    for row in rows:
        if not row.converged:
            sentences.append(
                f"{row.short} ended after {row.denoiser_calls} denoiser calls, its largest number, at an estimated "
                f"relative distance of {row.distance:.1e} (wanted: {TOLERANCE:.0e}): its image is not the fixed point "
                "itself."
            )
    for row in rows:
        best = max(row.trace)
        if best > row.psnr + NOTABLE:
            sentences.append(
                f"On its way {row.short} had {best:.2f} dB (after {row.trace.index(best)} denoiser calls); it ends at "
                f"{row.psnr:.2f} dB: PSNR may peak before the fixed point, and only the truth tells where to stop."
            )
    return sentences


def _figure(result: Result) -> Any:
    """Draw images, error maps on one scale, and what the solves went through."""
    truth, direct = result.truth, result.direct
    smooth, red, oder = result.rows[-3:]
    views = result.views
    # Images fill a row each as far as they are square; cuts through few slices are low.
    heights = [4.0]
    for view in views[1:]:
        height, width = view.pick(truth).shape
        heights.append(0.6 + 3.4 * min(height * view.aspect / width, 1.0))
    figure = new_figure(14, 7 + sum(heights))
    figure.suptitle(result.title, fontsize=15)
    parts: Any = figure.subfigures(2, 1, height_ratios=(4 + sum(heights), 3.4))
    images, curves = parts
    axes = images.subplots(len(views) + 1, 4, height_ratios=(*heights, 4.0))
    quality, convergence = curves.subplots(1, 2)
    window, rows, known = window_of(truth), (direct, smooth, red), views[0].pick(truth)
    largest = largest_of(views[0].pick(direct.image) - known)

    for k, (view, line) in enumerate(zip(views, axes[:-1], strict=True)):
        for axis, image in zip(line, (truth, *(row.image for row in rows)), strict=True):
            shown = show_image(axis, view.pick(image), window, view.name, view.aspect)
        if k == 0:
            line[0].set_title(f"Truth, {view.name}" if view.name else "Truth")
            for axis, row in zip(line[1:], rows, strict=True):
                axis.set_title(f"{row.name}\nPSNR {row.psnr:.2f} dB, SSIM {row.ssim:.3f}")
            images.colorbar(shown, ax=line, label=result.unit, shrink=0.9, pad=0.01)

    last = axes[-1]
    result.draw_data(last[0])
    for axis, row in zip(last[1:], rows, strict=True):
        shown = show_error(axis, views[0].pick(row.image), known, largest, f"|{row.short} - truth|")
    images.colorbar(shown, ax=last, label="absolute error", shrink=0.9, pad=0.01, extend="max")

    styles: tuple[dict[str, Any], ...] = (
        {"color": "tab:orange", "marker": ".", "linewidth": 1.8},
        {"color": "tab:blue", "linewidth": 1.8},
    )
    for row, style in zip((red, oder), styles, strict=True):
        name = row.name if row.converged else f"{row.name} (not converged)"
        quality.plot(range(len(row.trace)), row.trace, label=name, **style)
        convergence.semilogy(range(len(row.distances)), row.distances, label=name, **style)
    for row, dashes in ((direct, ":"), (smooth, "--")):
        quality.axhline(row.psnr, color="gray", linestyle=dashes, label=row.name)
    quality.set(
        xlabel="denoiser calls",
        ylabel="PSNR (dB)",
        title="Quality (it may peak before the fixed point)",
    )
    convergence.set(
        xlabel="denoiser calls",
        ylabel="|x - fixed point| / |fixed point|",
        title="Distance from the fixed point (dotted: wanted)",
    )
    convergence.axhline(TOLERANCE, color="gray", linestyle=":")
    for axis in (quality, convergence):
        axis.grid(alpha=0.3)
        axis.legend()
    return figure
