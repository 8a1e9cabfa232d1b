"""The demonstration: few noisy views of one slice, reconstructed by FBP, RED and ODER."""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data import (
    add_gaussian_noise,
    atomic,
    patches,
    psnr,
    random_ellipses,
    read_image,
    save_npz,
    ssim,
)
from .denoisers import DnCNN
from .deqred import DEQRED
from .fixed_point import Implicit, Nesterov, NotConvergedWarning
from .operators import ParallelBeamCT
from .training import train_denoiser, train_fixed_point

FILTERS = ("ramp", "shepp-logan", "cosine", "hann")
FILES = ("figure.png", "arrays.npz", "denoiser.pt")
SMALLEST = 16

# Without biases a network denoises an image twice as bright, and twice as noisy, as well as the original.
NETWORK: dict[str, Any] = {"depth": 6, "width": 32, "bias": False}
# Training images are small, and seen through the fixed point from proportionally fewer views: the streaks are
# those of the scan, at a fraction of the cost.
PATCH = 64
SIGMA = (0.0, 0.03)
# Weight of the prior at 50 dB for each view (the normal operator grows with their number); it follows the
# amplitude of the noise.
TAU_PER_VIEW = 1.0
SOLVER = Nesterov(max_iterations=300, tolerance=1e-5)
TRAINING_SOLVER = Nesterov(max_iterations=100, tolerance=3e-5)
ADJOINT_SOLVER = Nesterov(max_iterations=60, tolerance=1e-2)


class BadInputError(ValueError):
    """Something the user gave cannot be worked with."""


@dataclass(frozen=True)
class Settings:
    """What the user chose; see the command's help."""

    input: Path | None
    array: str | None
    output: Path
    views: int
    minibatch: int | None
    snr: float
    steps: int
    fixed_point_steps: int
    seed: int
    threads: int


@dataclass
class Row:
    """One line of the table.

    Attributes:
        psnr_inside: PSNR within the largest circle: FBP errs most where the frame cuts through the body.
        trace: PSNR of the point at each iteration.
        residuals: Iterations at which the full map's residual was taken, and its values.
    """

    name: str
    image: Tensor
    psnr: float
    psnr_inside: float
    ssim: float
    seconds: float
    iterations: int | None = None
    trace: list[float] | None = None
    residuals: tuple[list[int], list[float]] | None = None


def run(settings: Settings) -> None:
    """Do it all; write the three files at the end.

    Raises:
        BadInputError: Before anything long starts.
        DivergenceError: Where a fixed point cannot be found.
    """
    minibatch = settings.minibatch or max(1, settings.views // 3)
    if minibatch > settings.views:
        raise BadInputError(
            f"--minibatch must be at most the number of views, {settings.views}, got {minibatch}"
        )
    truth, source = _read_truth(settings)
    folder = settings.output
    created = _make_writable(folder)
    try:
        # One by default: the networks are small, and threads that wait for each other on busy cores take
        # ten times as long.
        torch.set_num_threads(settings.threads)
        results = _compute(settings, truth, source, minibatch)
        _write(folder, *results)
    except BaseException:
        if created:
            with suppress(OSError):
                folder.rmdir()
        raise


def _read_truth(settings: Settings) -> tuple[Tensor, str]:
    """Return the image scaled to [0, 1], and what to call it."""
    if settings.input is None:
        from pydicom import examples

        path, source = examples.get_path("ct"), "the CT slice pydicom.examples.ct"
    else:
        path, source = settings.input, str(settings.input)
    try:
        image, _ = read_image(path, settings.array)
    except OSError as error:
        raise BadInputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise BadInputError(f"cannot read {error}") from error
    if min(image.shape) < SMALLEST:
        raise BadInputError(
            f"{path}: the image must have at least {SMALLEST} rows and columns, got {tuple(image.shape)}"
        )
    image = image - image.min().clamp(max=0)
    if image.min() == image.max():
        raise BadInputError(f"{path}: all pixels have the same value")
    return image / image.max(), source


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


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _training_images(truth: Tensor) -> list[Tensor]:
    """Return photographs and an MR slice that come with scikit-image and pydicom, scaled to [0, 1].

    Nothing of the slice to be reconstructed is among them: an image equal to it is left out.
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


def _draw_images(n: int, images: list[Tensor], generator: torch.Generator | None) -> Tensor:
    """Draw phantoms and three times as many patches, shape (n, PATCH, PATCH)."""
    phantoms = random_ellipses(n - 3 * n // 4, PATCH, generator, texture=0.01)
    drawn = torch.randint(len(images), (3 * n // 4,), generator=generator).tolist()
    cut = torch.cat([patches(images[k], PATCH, 1, generator) for k in drawn])
    brightness = 0.3 + 0.7 * torch.rand(len(cut), 1, 1, generator=generator)
    return torch.cat((phantoms, brightness * cut))


def _model(
    settings: Settings, ct: ParallelBeamCT, denoiser: DnCNN, minibatch: int | None, solver: Nesterov
) -> DEQRED:
    return DEQRED(
        ct,
        denoiser,
        tau=TAU_PER_VIEW * ct.n_blocks * 10 ** ((50 - settings.snr) / 20),
        minibatch_size=minibatch,
        solver=solver,
        differentiation=Implicit(solver=ADJOINT_SOLVER),
        nonnegative=True,
        generator=torch.Generator().manual_seed(settings.seed + 2),
        on_failure="ignore",
    )


def _train(settings: Settings, truth: Tensor, minibatch: int) -> DnCNN:
    images = _training_images(truth)
    generator = torch.Generator().manual_seed(settings.seed + 1)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        denoiser = DnCNN(**NETWORK)
    denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def clean(g: torch.Generator | None) -> Tensor:
        return _draw_images(8, images, g)[:, None].contiguous(memory_format=torch.channels_last)

    _say("1/3 Training the denoiser on noise")
    train_denoiser(
        denoiser, clean, steps=settings.steps, sigma=SIGMA, learning_rate=2e-3, generator=generator
    )

    views = max(1, round(settings.views * PATCH / max(truth.shape)))
    ct = ParallelBeamCT(PATCH, views)
    size = max(1, round(minibatch * views / settings.views))
    model = _model(settings, ct, denoiser, size, TRAINING_SOLVER)

    def scans(g: torch.Generator | None) -> tuple[Tensor, Tensor]:
        drawn = _draw_images(4, images, g)
        return add_gaussian_noise(ct(drawn), settings.snr, g), drawn

    _say("2/3 Training it through the fixed point")
    with warnings.catch_warnings():
        # A gradient good to a few per cent is good enough for Adam.
        warnings.simplefilter("ignore", NotConvergedWarning)
        train_fixed_point(
            model, scans, steps=settings.fixed_point_steps, learning_rate=5e-4, generator=generator
        )
    return denoiser


def _compute(
    settings: Settings, truth: Tensor, source: str, minibatch: int
) -> tuple[str, list[Row], Tensor, Tensor, DnCNN]:
    height, width = truth.shape
    views, seed = settings.views, settings.seed
    ct = ParallelBeamCT((height, width), views)
    sinogram = add_gaussian_noise(ct(truth[None]), settings.snr, torch.Generator().manual_seed(seed))
    setting = f"{height} x {width} pixels, {views} views, {settings.snr:g} dB"
    _say(f"Truth: {source}. Scan: {setting}; {minibatch} views a step in ODER.")
    _say("The denoiser learns from random ellipses, photographs (scikit-image) and an MR slice (pydicom).")
    denoiser = _train(settings, truth, minibatch)
    _say("3/3 Reconstructing")
    rows = [_fbp(ct, sinogram, truth, name) for name in FILTERS]
    for name, size in (
        (f"RED, all {views} views a step", None),
        (f"ODER, {minibatch} of {views} views a step", minibatch),
    ):
        rows.append(_solve(name, _model(settings, ct, denoiser, size, SOLVER), sinogram, truth))
    return setting, rows, truth, sinogram[0], denoiser


def _quality(image: Tensor, truth: Tensor) -> tuple[float, float, float]:
    """Return PSNR, PSNR within the largest circle, SSIM."""
    height, width = truth.shape
    i, j = torch.arange(height)[:, None] - (height - 1) / 2, torch.arange(width) - (width - 1) / 2
    inside = i**2 + j**2 <= (min(height, width) / 2) ** 2
    return psnr(image, truth), psnr(image[inside], truth[inside], 1.0), ssim(image, truth)


def _fbp(ct: ParallelBeamCT, sinogram: Tensor, truth: Tensor, name: Any) -> Row:
    start = time.perf_counter()
    image = ct.fbp(sinogram, filter=name)[0].clamp(min=0)
    seconds = time.perf_counter() - start
    return Row(f"FBP, {name}", image, *_quality(image, truth), seconds)


def _solve(name: str, model: DEQRED, sinogram: Tensor, truth: Tensor) -> Row:
    assert isinstance(model.denoiser, DnCNN)
    trace: list[float] = []

    def record(_: Any, arguments: tuple[Tensor, ...]) -> None:
        error = (arguments[0][0, 0] - truth).square().mean()
        trace.append(float(-10 * torch.log10(error / (truth.max() - truth.min()) ** 2)))

    hook = model.denoiser.register_forward_pre_hook(record)
    start = time.perf_counter()
    with torch.no_grad():
        solution = model(sinogram, return_solution=True)
    seconds = time.perf_counter() - start
    hook.remove()
    image = solution.value[0]
    residuals = solution.residual_iterations.tolist(), solution.residuals[:, 0].tolist()
    iterations = int(solution.iterations[0])
    return Row(name, image, *_quality(image, truth), seconds, iterations, trace, residuals)


def _write(
    folder: Path, setting: str, rows: list[Row], truth: Tensor, sinogram: Tensor, denoiser: DnCNN
) -> None:
    """Print the table; write figure, arrays and weights, each whole or not at all."""
    fbp = max(rows[: len(FILTERS)], key=lambda row: row.psnr)
    red, oder = rows[len(FILTERS) :]
    width = max(len(row.name) for row in rows)
    print(f"{'method':{width}}  PSNR (dB)   SSIM  seconds  iterations")
    for row in rows:
        iterations = "-" if row.iterations is None else row.iterations
        print(f"{row.name:{width}}  {row.psnr:9.2f}  {row.ssim:.3f}  {row.seconds:7.3f}  {iterations:>10}")
    print(
        f"ODER is {oder.psnr - fbp.psnr:+.2f} dB from the best FBP ({fbp.name[5:]}) "
        f"and {oder.psnr - red.psnr:+.2f} dB from RED."
    )
    inner = oder.psnr_inside - max(row.psnr_inside for row in rows[: len(FILTERS)])
    print(
        f"Within the largest circle, away from the edges of the frame, it is {inner:+.2f} dB from the best FBP."
    )
    figure = _figure(f"Sparse-view CT: {setting}", truth, sinogram, fbp, red, oder)
    with atomic(folder / "figure.png") as temporary:
        figure.savefig(temporary, dpi=120)
    save_npz(
        folder / "arrays.npz",
        truth=truth,
        sinogram=sinogram,
        fbp=fbp.image,
        red=red.image,
        oder=oder.image,
    )
    with atomic(folder / "denoiser.pt") as temporary:
        torch.save({"arguments": NETWORK, "state_dict": denoiser.state_dict()}, temporary)
    print("Wrote " + ", ".join(str(folder / name) for name in FILES))


def _figure(title: str, truth: Tensor, sinogram: Tensor, fbp: Row, red: Row, oder: Row) -> Any:
    """Draw images, error maps on one scale, and what happened along the iterations."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 11), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=15)
    parts: Any = figure.subfigures(2, 1, height_ratios=(2, 0.9))
    images, curves = parts
    axes = images.subplots(2, 4)
    quality, convergence = curves.subplots(1, 2)
    low, high = (float(torch.quantile(truth.flatten(), q)) for q in (0.005, 0.995))
    grey: dict[str, Any] = {"cmap": "gray", "vmin": low, "vmax": high, "interpolation": "nearest"}
    rows = (fbp, red, oder)
    errors = [(row.image - truth).abs() for row in rows]
    largest = float(torch.quantile(errors[0].flatten(), 0.98))

    shown = axes[0, 0].imshow(truth.numpy(), **grey)
    axes[0, 0].set_title("Truth")
    for axis, row in zip(axes[0, 1:], rows, strict=True):
        axis.imshow(row.image.numpy(), **grey)
        axis.set_title(f"{row.name}\nPSNR {row.psnr:.2f} dB, SSIM {row.ssim:.3f}")
    images.colorbar(shown, ax=axes[0], label="attenuation / largest", shrink=0.9, pad=0.01)

    axes[1, 0].imshow(sinogram.numpy(), cmap="gray", aspect="auto", interpolation="nearest")
    axes[1, 0].set_title("Measured sinogram")
    axes[1, 0].set_xlabel("detector bin")
    axes[1, 0].set_ylabel("view")
    for axis, row, error in zip(axes[1, 1:], rows, errors, strict=True):
        shown = axis.imshow(error.numpy(), cmap="inferno", vmin=0, vmax=largest, interpolation="nearest")
        axis.set_title(f"|{row.name.split(',')[0]} - truth|")
    images.colorbar(shown, ax=axes[1], label="absolute error", shrink=0.9, pad=0.01, extend="max")
    for axis in (*axes[0], *axes[1, 1:]):
        axis.set_xticks([])
        axis.set_yticks([])

    for row, style in ((red, "-"), (oder, "--")):
        assert row.trace
        assert row.residuals
        quality.plot(range(len(row.trace)), row.trace, style, linewidth=2, label=row.name)
        convergence.semilogy(*row.residuals, style, linewidth=2, label=row.name)
    quality.axhline(fbp.psnr, color="gray", linestyle=":", label=f"best {fbp.name}")
    quality.set(xlabel="iteration", ylabel="PSNR (dB)", title="Quality along the iterations")
    convergence.set(
        xlabel="iteration", ylabel="|T(x) - x| / |T(x)|", title="Distance from the fixed point, all views"
    )
    for axis in (quality, convergence):
        axis.grid(alpha=0.3)
        axis.legend()
    return figure
