"""What the demonstrations share: reading, training, solving, and telling the result."""

from __future__ import annotations

import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import atomic, patches, psnr, random_ellipses, read_image, save_npz, ssim
from ..denoisers import DnCNN
from ..deqred import DEQRED, from_channels
from ..fixed_point import Implicit, Nesterov, NotConvergedWarning
from ..training import train_denoiser, train_fixed_point

FILES = ("figure.png", "arrays.npz", "denoiser.pt")
SMALLEST = 16
# Training images are small: scans of them are those of the slice at a fraction of the cost.
PATCH = 64
FIXED_POINT_BATCH = 4
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
class Recipe:
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


@dataclass
class Row:
    """One line of the table.

    Attributes:
        image: What is shown and compared with the truth; real, one slice or several.
        value: The reconstruction, `image` itself or complex.
        trace: PSNR of the point at each iteration.
        residuals: Iterations at which the full map's residual was taken, and its values.
        tolerance: The residual to be reached.
    """

    name: str
    image: Tensor
    value: Tensor
    psnr: float
    ssim: float
    seconds: float
    iterations: int | None = None
    trace: tuple[float, ...] = ()
    residuals: tuple[Sequence[int], Sequence[float]] = ((), ())
    converged: bool = True
    tolerance: float = 0.0

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
        rows: Direct methods first; then RED and ODER.
        draw_data: Draws the measurements into an axis.
        remarks: Sentences of the demonstration's own.
        arrays: What arrays.npz holds.
        recipe: Of the denoiser.
        views: Of the images; errors are shown in the first.
    """

    title: str
    unit: str
    truth: Tensor
    rows: list[Row]
    draw_data: Callable[[Any], None]
    remarks: list[str]
    arrays: dict[str, Tensor]
    recipe: Recipe
    denoiser: DnCNN
    views: tuple[View, ...] = field(default=(View("", lambda image: image),))

    @property
    def direct(self) -> Row:
        """The best of the direct methods."""
        return max(self.rows[:-2], key=lambda row: row.psnr)


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


def draw_images(n: int, images: list[Tensor], generator: torch.Generator | None) -> Tensor:
    """Draw phantoms and three times as many patches, shape (n, PATCH, PATCH)."""
    phantoms = random_ellipses(n - 3 * n // 4, PATCH, generator, texture=0.01)
    drawn = torch.randint(len(images), (3 * n // 4,), generator=generator).tolist()
    cut = torch.cat([patches(images[k], PATCH, 1, generator) for k in drawn])
    brightness = 0.3 + 0.7 * torch.rand(len(cut), 1, 1, generator=generator)
    return torch.cat((phantoms, brightness * cut))


def build_model(
    settings: Settings,
    operator: Any,
    denoiser: DnCNN,
    *,
    tau: float,
    minibatch: int | None,
    solver: Nesterov,
    adjoint_solver: Nesterov,
    nonnegative: bool,
) -> DEQRED:
    """Return RED, or with a minibatch ODER; its minibatches follow from the seed."""
    if hasattr(operator, "minibatch_norm_squared"):
        # Minibatches take shorter steps, and the residual is as long as a step: RED and ODER are to end as near to
        # the fixed point.
        smooth = operator.minibatch_norm_squared(minibatch or operator.n_blocks)
        shorter = (operator.norm_squared() + 2 * tau) / (smooth + 2 * tau)
        solver = replace(solver, tolerance=solver.tolerance * shorter)
    return DEQRED(
        operator,
        denoiser,
        tau=tau,
        minibatch_size=minibatch,
        solver=solver,
        differentiation=Implicit(solver=adjoint_solver),
        nonnegative=nonnegative,
        generator=settings.generator(2),
        on_failure="ignore",
    )


def train(
    settings: Settings,
    recipe: Recipe,
    clean: Callable[[int, torch.Generator | None], Tensor],
    build: Callable[[DnCNN], DEQRED],
    scans: Callable[[int, torch.Generator | None], tuple[Tensor, Tensor]],
) -> DnCNN:
    """Train a denoiser on noise, then through the fixed point.

    Args:
        settings: The user's.
        recipe: Of the denoiser.
        clean: Draws so many clean images, ``(n, channels, PATCH, PATCH)``.
        build: Makes the model of small scans from the denoiser.
        scans: Draws so many small scans, and the images they are of.
    """
    generator = settings.generator(1)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        denoiser = recipe.kind(**recipe.network)
    denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    on_noise, through_fixed_point = recipe.learning_rates
    full_batch, fixed_point_batch = recipe.batches
    say("1/3 Training the denoiser on noise")
    train_denoiser(
        denoiser,
        lambda g: clean(full_batch, g).contiguous(memory_format=torch.channels_last),
        steps=settings.steps,
        sigma=recipe.sigma,
        learning_rate=on_noise,
        generator=generator,
    )
    model = build(denoiser)
    say("2/3 Training it through the fixed point")
    with warnings.catch_warnings():
        # A gradient good to a few per cent is good enough for Adam.
        warnings.simplefilter("ignore", NotConvergedWarning)
        train_fixed_point(
            model,
            lambda g: scans(fixed_point_batch, g),
            steps=settings.fixed_point_steps,
            learning_rate=through_fixed_point,
            generator=generator,
        )
    return denoiser


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


def solved_row(
    name: str, model: DEQRED, y: Tensor, truth: Tensor, show: Callable[[Tensor], Tensor] = torch.abs
) -> Row:
    """Solve for one image; compare what is shown of it with the truth, also along the iterations."""
    assert isinstance(model.denoiser, DnCNN)
    trace: list[float] = []
    shape = model.operator.image_shape

    def record(_: Any, arguments: tuple[Tensor, ...]) -> None:
        channels = arguments[0]
        is_complex = channels[0].numel() == 2 * math.prod(shape)
        like = torch.empty(1, *shape, dtype=channels.dtype.to_complex() if is_complex else channels.dtype)
        error = (show(from_channels(channels, like)[0]) - truth).square().mean()
        trace.append(float(-10 * torch.log10(error / (truth.max() - truth.min()) ** 2)))

    hook = model.denoiser.register_forward_pre_hook(record)
    start = time.perf_counter()
    with torch.no_grad():
        solution = model(y, return_solution=True)
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
        iterations=int(solution.iterations[0]),
        trace=tuple(trace),
        residuals=(solution.residual_iterations.tolist(), solution.residuals[:, 0].tolist()),
        converged=bool(solution.converged[0]),
        tolerance=model.solver.tolerance,
    )


def report(folder: Path, result: Result) -> None:
    """Print the table and the summary; write figure, arrays and weights, each whole or not at all."""
    width = max(len(row.name) for row in result.rows)
    print(f"{'method':{width}}  PSNR (dB)   SSIM  seconds  iterations")
    for row in result.rows:
        iterations = "-" if row.iterations is None else row.iterations
        print(f"{row.name:{width}}  {row.psnr:9.2f}  {row.ssim:.3f}  {row.seconds:7.3f}  {iterations:>10}")
    for sentence in (*result.remarks, *_caveats(result.rows[-2:])):
        print(sentence)
    figure = _figure(result)
    with atomic(folder / "figure.png") as temporary:
        figure.savefig(temporary, dpi=120)
    save_npz(folder / "arrays.npz", **result.arrays)
    with atomic(folder / "denoiser.pt") as temporary:
        torch.save(
            {"arguments": result.recipe.network, "state_dict": result.denoiser.state_dict()}, temporary
        )
    print("Wrote " + ", ".join(str(folder / name) for name in FILES))


def _caveats(rows: Sequence[Row]) -> list[str]:
    """Say where a solve was cut short, and where the image was better on the way."""
    sentences = []
    for row in rows:
        if not row.converged:
            residual = f"{row.residuals[1][-1]:.1e}" if row.residuals[1] else "unknown"
            sentences.append(
                f"{row.short} reached its largest number of iterations, {row.iterations}, at a residual of {residual} "
                f"(wanted: {row.tolerance:.0e}): its image is not the fixed point itself."
            )
    for row in rows:
        best = max(row.trace)
        if best > row.psnr + NOTABLE:
            sentences.append(
                f"On its way {row.short} had {best:.2f} dB (iteration {row.trace.index(best)}); it ends at "
                f"{row.psnr:.2f} dB: PSNR may peak before the fixed point, and only the truth tells where to stop."
            )
    return sentences


def _figure(result: Result) -> Any:
    """Draw images, error maps on one scale, and what happened along the iterations."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    truth, direct = result.truth, result.direct
    red, oder = result.rows[-2:]
    views = result.views
    # Images fill a row each as far as they are square; cuts through few slices are low.
    heights = [4.0]
    for view in views[1:]:
        height, width = view.pick(truth).shape
        heights.append(0.6 + 3.4 * min(height * view.aspect / width, 1.0))
    figure = Figure(figsize=(14, 7 + sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(result.title, fontsize=15)
    parts: Any = figure.subfigures(2, 1, height_ratios=(4 + sum(heights), 3.4))
    images, curves = parts
    axes = images.subplots(len(views) + 1, 4, height_ratios=(*heights, 4.0))
    quality, convergence = curves.subplots(1, 2)
    low, high = (float(torch.quantile(truth.flatten(), q)) for q in (0.005, 0.995))
    grey: dict[str, Any] = {"cmap": "gray", "vmin": low, "vmax": high, "interpolation": "nearest"}
    rows = (direct, red, oder)
    errors = [(views[0].pick(row.image) - views[0].pick(truth)).abs() for row in rows]
    largest = float(torch.quantile(errors[0].flatten(), 0.98))

    for k, (view, line) in enumerate(zip(views, axes[:-1], strict=True)):
        for axis, image in zip(line, (truth, *(row.image for row in rows)), strict=True):
            shown = axis.imshow(view.pick(image).numpy(), aspect=view.aspect, **grey)
            axis.set(title=view.name, xticks=[], yticks=[])
        if k == 0:
            line[0].set_title(f"Truth, {view.name}" if view.name else "Truth")
            for axis, row in zip(line[1:], rows, strict=True):
                axis.set_title(f"{row.name}\nPSNR {row.psnr:.2f} dB, SSIM {row.ssim:.3f}")
            images.colorbar(shown, ax=line, label=result.unit, shrink=0.9, pad=0.01)

    last = axes[-1]
    result.draw_data(last[0])
    for axis, row, error in zip(last[1:], rows, errors, strict=True):
        shown = axis.imshow(error.numpy(), cmap="inferno", vmin=0, vmax=largest, interpolation="nearest")
        axis.set(title=f"|{row.short} - truth|", xticks=[], yticks=[])
    images.colorbar(shown, ax=last, label="absolute error", shrink=0.9, pad=0.01, extend="max")

    # RED in a broad pale line under ODER's: the two often lie on each other.
    styles: tuple[dict[str, Any], ...] = (
        {"color": "tab:orange", "linewidth": 6, "alpha": 0.45},
        {"color": "tab:blue", "linewidth": 1.8},
    )
    for row, style in zip((red, oder), styles, strict=True):
        name = row.name if row.converged else f"{row.name} (not converged)"
        quality.plot(range(len(row.trace)), row.trace, label=name, **style)
        convergence.semilogy(*row.residuals, label=name, **style)
        # Steps are of different lengths, and residuals are as long as a step.
        convergence.axhline(row.tolerance, color=style["color"], linestyle=":")
    quality.axhline(direct.psnr, color="gray", linestyle=":", label=direct.name)
    quality.set(
        xlabel="iteration",
        ylabel="PSNR (dB)",
        title="Quality along the iterations (it may peak before the fixed point)",
    )
    convergence.set(
        xlabel="iteration",
        ylabel="|T(x) - x| / |T(x)|",
        title="Distance from the fixed point, all measurements (dotted: wanted)",
    )
    for axis in (quality, convergence):
        axis.grid(alpha=0.3)
        axis.legend()
    return figure
