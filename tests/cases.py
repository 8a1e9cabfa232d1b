"""What tests and benches share: the registry of operators, tolerances, and the adjoint test."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from oder_fast import ops
from oder_fast._torch import fft
from oder_fast.operators import DiffractionTomography, _matrices
from oder_fast.reference import diffraction

# Relative L2 to the reference in float64, of a result or a gradient, by dtype of storage.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.complex128: 1e-12,
    torch.float32: 2e-6,
    torch.complex64: 2e-6,
    # Eight and eleven bits of storage; sums are float32.
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}


@dataclass(frozen=True)
class OpCase:
    """One operator with everything needed to test and to time it.

    Attributes:
        name: Name of the function in `oder_fast.ops`.
        make_inputs: From shape, dtype, device and generator to positional and keyword arguments.
        shapes: What to test: dicts that `make_inputs` understands.
        differentiable: Positions of the arguments that gradients flow to.
        adjoint: From the same arguments to the function that is the operator's exact transpose in its first
            argument, for linear operators.
        real: Whether it takes real images.
        complex: Whether it takes complex ones.
        large: Shapes too slow for interpreted kernels: vector and tile boundaries of the C++ backend, at least one with
            work for several threads.
        tiny: A shape for finite differences.
    """

    name: str
    make_inputs: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]
    shapes: Sequence[dict[str, Any]]
    differentiable: tuple[int, ...]
    adjoint: Callable[..., Callable[[Tensor], Tensor]] | None = None
    real: bool = True
    complex: bool = False
    large: Sequence[dict[str, Any]] = ({"image": (2, 130, 70)},)
    tiny: dict[str, Any] = field(default_factory=lambda: {"image": (1, 3, 4)})

    def takes(self, dtype: torch.dtype) -> bool:
        """Tell whether it takes images of a dtype."""
        return self.complex if dtype.is_complex else self.real

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which it is used most."""
        return torch.float32 if self.real else torch.complex64

    @property
    def function(self) -> Callable[..., Any]:
        """The operator as users call it."""
        function: Callable[..., Any] = getattr(ops, self.name)
        return function


def _spread(value: Tensor) -> Tensor:
    wide = value.repeat_interleave(2, -1)
    # Between the values what would be seen: NaN, an index out of range, the opposite.
    if value.dtype in (torch.int32, torch.int64, torch.bool):
        wide[..., 1::2] = ~value if value.dtype == torch.bool else 10**9
    else:
        wide[..., 1::2] = torch.nan
    return wide[..., ::2]


def _offset(value: Tensor) -> Tensor:
    memory = value.new_zeros(value.numel() + 1)
    memory[1:] = value.flatten()
    return memory[1:].reshape(value.shape)


# Tensors that torch shows otherwise than they lie in memory, by name: from a tensor to such a view, its equal where not
# noted; None where there is none.
VIEWS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "spread": lambda v: _spread(v) if v.ndim else None,
    "transposed": lambda v: v.mT.contiguous().mT if v.ndim > 1 else None,
    "expanded (other values)": lambda v: v[..., :1].expand_as(v) if v.ndim else None,
    "offset": _offset,
    "conjugated": lambda v: v.conj().resolve_conj().conj() if v.is_complex() else None,
    "negated": lambda v: torch._neg_view(-v) if v.is_floating_point() or v.is_complex() else None,
    "imaginary part": lambda v: (
        torch.complex(torch.zeros_like(v), -v).conj().imag
        if v.dtype in (torch.float32, torch.float64)
        else None
    ),
}


def viewed(view: Callable[[Tensor], Tensor | None], value: Any) -> Any:
    """Return the view of a tensor where there is one; other arguments and tensors as they are."""
    result = view(value) if isinstance(value, Tensor) else None
    return value if result is None else result


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Return the relative L2 error; where nothing is expected, the norm of what came."""
    kind = torch.complex128 if expected.is_complex() else torch.float64
    result, expected = result.detach().to(kind), expected.detach().to(kind)
    difference, scale = (result - expected).norm(), expected.norm()
    return float(difference / scale) if scale > 0 else float(difference)


def dot_test(
    forward: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor], x: Tensor, y: Tensor
) -> float:
    """Return abs(<A x, y> - <x, A^H y>) / (norm(A x) norm(y)), sums in double precision.

    Where one of x and y is real, the real parts are compared: the operator is linear over the reals.
    """
    kind = torch.complex128 if x.is_complex() or y.is_complex() else torch.float64
    ax, ahy = forward(x).to(kind), adjoint(y).to(kind)
    left = (ax * y.to(kind).conj()).sum()
    right = (x.to(kind) * ahy.conj()).sum()
    if x.is_complex() != y.is_complex():
        left, right = left.real, right.real
    scale = ax.norm() * y.to(kind).norm()
    return float((left - right).abs() / scale) if scale > 0 else float((left - right).abs())


def angles_over(n: int, span: float = math.pi, start: float = 0.0) -> Tensor:
    """Return n angles evenly over `span` from `start`."""
    return start + torch.arange(n, dtype=torch.float64) * (span / n)


Ellipses = Sequence[tuple[float, float, float, float, float, float]]
# Not symmetric in any axis: a mirrored or turned convention cannot pass.
ELLIPSES = ((1.0, 0, 0, 95, 110, 0.0), (-0.4, 25, 40, 30, 18, 0.5), (0.7, -45, -30, 12, 35, -0.3))


def ellipse_sinogram(ellipses: Ellipses, angles: Tensor, detector: Tensor) -> Tensor:
    """Return the exact Radon transform (V, D) of filled ellipses (value, x, y, a, b, tilt)."""
    result = torch.zeros(len(angles), len(detector), dtype=torch.float64)
    for value, x, y, a, b, tilt in ellipses:
        for v, theta in enumerate(angles.tolist()):
            squared = (a * math.cos(theta - tilt)) ** 2 + (b * math.sin(theta - tilt)) ** 2
            t = detector - x * math.cos(theta) - y * math.sin(theta)
            result[v] += 2 * value * a * b / squared * (squared - t**2).clamp(min=0).sqrt()
    return result


def ellipse_image(ellipses: Ellipses, n: int, oversampling: int = 8) -> Tensor:
    """Return filled ellipses averaged over each of n x n pixels."""
    m = n * oversampling
    axis = (torch.arange(m, dtype=torch.float64) + 0.5) / oversampling - n / 2
    x, y = axis[None, :], -axis[:, None]
    image = torch.zeros(m, m, dtype=torch.float64)
    for value, cx, cy, a, b, tilt in ellipses:
        u = (x - cx) * math.cos(tilt) + (y - cy) * math.sin(tilt)
        w = -(x - cx) * math.sin(tilt) + (y - cy) * math.cos(tilt)
        image += value * ((u / a) ** 2 + (w / b) ** 2 <= 1)
    return image.reshape(n, oversampling, n, oversampling).mean((1, 3))


def in_turn(
    candidates: dict[str, Callable[[], object]], seconds: float = 1.5, rounds: int = 5
) -> dict[str, float]:
    """Median seconds of each candidate, timed in turn; at least `rounds` rounds, about `seconds` in all.

    Before each timed call comes an untimed one of the same candidate: in a solver's loop too it finds its own data
    in the caches, not that of a peer.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}

    def run(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < rounds:
        for name, call in candidates.items():
            run(call)
            times[name].append(run(call))
    return {name: statistics.median(t) for name, t in times.items()}


# Sizes around the tiles and vectors of every backend; every detector that changes the path through a kernel.
RADON_SHAPES = (
    {"image": (1, 5, 7), "angles": angles_over(1), "bins": 1},
    {"image": (2, 16, 16), "angles": angles_over(8, 2 * math.pi), "bins": 23},
    {"image": (3, 17, 33), "angles": angles_over(7, start=0.1), "bins": 40, "offset": 0.3},
    {"image": (1, 1, 19), "angles": angles_over(5), "bins": 16},
    {"image": (1, 23, 1), "angles": angles_over(5, start=-1.0), "bins": 17},
    {"image": (1, 31, 29), "angles": angles_over(4), "bins": 60, "spacing": 0.7},
    {"image": (1, 13, 18), "angles": angles_over(6), "bins": 64, "spacing": 0.3, "offset": 1.0},
    {"image": (1, 20, 20), "angles": angles_over(6), "bins": 9, "spacing": 2.2},
    {"image": (2, 12, 15), "angles": angles_over(5), "bins": 20, "spacing": 0.5, "pixel": 0.5},
    {"image": (1, 11, 11), "angles": angles_over(3), "bins": 6, "offset": 40.0},
    {"image": (1, 10, 12), "angles": angles_over(5, start=0.2), "bins": 8, "spacing": 30.0},
    {"image": (2, 7, 9), "angles": angles_over(4, start=0.2), "bins": 40, "spacing": 1e-3, "offset": 0.4},
    {"image": (1, 9, 9), "angles": torch.tensor([math.pi / 4, 3 * math.pi / 4, math.pi / 2]), "bins": 13},
)
# What only vector and tile boundaries of the C++ backend meet; too slow for interpreted kernels.
RADON_LARGE_SHAPES = (
    {"image": (5, 65, 67), "angles": angles_over(9), "bins": 95},
    {"image": (1, 130, 70), "angles": angles_over(70), "bins": 150, "spacing": 0.8, "offset": -2.0},
    {"image": (1, 128, 200), "angles": angles_over(6), "bins": 60, "spacing": 3.0},
)


def _detector(shape: dict[str, Any]) -> ops.Detector:
    return ops.Detector(
        shape["bins"], shape.get("spacing", 1.0), shape.get("offset", 0.0), shape.get("pixel", 1.0)
    )


def _draw(size: Sequence[int], dtype: torch.dtype, device: str, generator: torch.Generator) -> Tensor:
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(*size, dtype=wide, generator=generator).to(device=device, dtype=dtype)


def _forward_inputs(
    shape: dict[str, Any], dtype: torch.dtype, device: str, generator: torch.Generator
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    image = _draw(shape["image"], dtype, device, generator)
    return (image, shape["angles"].to(device), _detector(shape)), {}


def _adjoint_inputs(
    shape: dict[str, Any], dtype: torch.dtype, device: str, generator: torch.Generator
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    batch, height, width = shape["image"]
    sinogram = _draw((batch, len(shape["angles"]), shape["bins"]), dtype, device, generator)
    return (sinogram, shape["angles"].to(device), _detector(shape), (height, width)), {}


def _gradient_inputs(
    shape: dict[str, Any], dtype: torch.dtype, device: str, generator: torch.Generator
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    (sinogram, angles, detector, _), _ = _adjoint_inputs(shape, dtype, device, generator)
    views = torch.randperm(len(angles), generator=generator)[: max(1, len(angles) // 2)].to(device)
    return (_draw(shape["image"], dtype, device, generator), sinogram, angles, detector, views), {}


def _red_inputs(
    shape: dict[str, Any], dtype: torch.dtype, device: str, generator: torch.Generator
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    size = shape["image"]
    image, fidelity_grad = (_draw(size, dtype, device, generator) for _ in range(2))
    momentum = torch.rand(size[0], dtype=torch.float64, generator=generator).to(device)
    previous, denoised = (_draw(size, dtype, device, generator) for _ in range(2))
    step_size, tau = (torch.tensor(v, dtype=torch.float64, device=device) for v in (0.01, 1.3))
    options = {"previous": previous, "momentum": momentum, "nonnegative": not dtype.is_complex}
    return (image, fidelity_grad, denoised, step_size, tau), options


RADON: dict[str, Any] = {
    "large": RADON_LARGE_SHAPES,
    "tiny": {"image": (1, 3, 4), "angles": torch.tensor([0.3, 2.0]), "bins": 5},
}

# Every radix and sizes around vectors and tiles; lines along both axes, points; maps and sampling shared or not.
FOURIER_SHAPES = (
    {"image": (1, 5, 7), "coils": 1},
    {"image": (2, 12, 9), "coils": 2, "axis": -1, "own": True},
    {"image": (2, 15, 14), "coils": 3, "points": True},
    {"image": (3, 16, 17), "coils": 2, "points": True, "own": True},
    {"image": (1, 1, 19), "coils": 2},
    {"image": (1, 1, 19), "coils": 1, "axis": -1},
    {"image": (2, 21, 1), "coils": 2, "own": True},
    {"image": (1, 22, 23), "coils": 1, "points": True},
    {"image": (1, 26, 8), "coils": 2, "axis": -2},
    {"image": (2, 33, 40), "coils": 4, "axis": -1},
)
FOURIER_LARGE_SHAPES = (
    {"image": (2, 64, 70), "coils": 3},
    {"image": (5, 70, 96), "coils": 2, "axis": -1, "own": True},
    {"image": (2, 61, 128), "coils": 2, "points": True},
    {"image": (1, 320, 37), "coils": 2},
    {"image": (1, 20, 368), "coils": 2, "axis": -1},
)
FOURIER: dict[str, Any] = {
    "real": False,
    "complex": True,
    "large": FOURIER_LARGE_SHAPES,
    "tiny": {"image": (1, 3, 4), "coils": 2, "axis": -1},
}


def _fourier_scan(
    shape: dict[str, Any], dtype: torch.dtype, device: str, generator: torch.Generator
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return coil maps, sampling and options; with "own", those of each image are its own."""
    (batch, *size), axis = shape["image"], shape.get("axis", -2)
    own = batch if shape.get("own") else 1
    maps = _draw((own, shape["coils"], *size), dtype, device, generator)
    if shape.get("points"):
        return maps, (torch.rand(own, *size, generator=generator) < 0.4).to(device), {}
    n = size[axis]
    lines = torch.stack([torch.randperm(n, generator=generator)[: max(1, n // 3)] for _ in range(own)])
    if own > 1 and lines.shape[1] > 1:
        lines[0, -1] = -1
    return maps, lines.to(device), {"axis": axis}


def _fourier_forward_inputs(
    shape: dict[str, Any], dtype: torch.dtype, device: str, generator: torch.Generator
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    maps, sampling, options = _fourier_scan(shape, dtype, device, generator)
    return (_draw(shape["image"], dtype, device, generator), maps, sampling), options


def _fourier_adjoint_inputs(
    shape: dict[str, Any], dtype: torch.dtype, device: str, generator: torch.Generator
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    (image, *scan), options = _fourier_forward_inputs(shape, dtype, device, generator)
    like = ops.fourier_forward(image, *scan, **options, backend="reference")
    return (_draw(like.shape, dtype, device, generator), *scan), options


def _fourier_gradient_inputs(
    shape: dict[str, Any], dtype: torch.dtype, device: str, generator: torch.Generator
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    (samples, *scan), options = _fourier_adjoint_inputs(shape, dtype, device, generator)
    n = shape["coils"]
    coils = torch.randperm(n, generator=generator)[: max(1, n // 2)].to(device)
    return (_draw(shape["image"], dtype, device, generator), samples, *scan, coils), options


# Odd and even sizes, one slice and many, two groups of images; slices unevenly spaced, transfer functions stored.
DIFFRACTION_SHAPES = (
    {"image": (1, 1, 5, 7), "lights": 1},
    {"image": (2, 3, 16, 16), "lights": 4},
    {"image": (1, 4, 17, 20), "lights": 5, "uneven": True},
    {"image": (2, 2, 12, 9), "lights": 3, "stored": True},
    {"image": (3, 9, 8, 33), "lights": 2},
)
DIFFRACTION_LARGE_SHAPES = (
    {"image": (5, 2, 40, 70), "lights": 6},
    {"image": (1, 25, 64, 61), "lights": 7},
    {"image": (1, 3, 33, 128), "lights": 3, "stored": True},
    {"image": (2, 2, 46, 57), "lights": 3},
)
DIFFRACTION: dict[str, Any] = {
    "real": False,
    "complex": True,
    "large": DIFFRACTION_LARGE_SHAPES,
    "tiny": {"image": (1, 2, 4, 5), "lights": 3},
}


def _diffraction_scan(
    shape: dict[str, Any], dtype: torch.dtype, device: str, generator: torch.Generator
) -> tuple[Any, ...]:
    """Return transfer, depths, support and optics of illuminations in all directions."""
    _, n, height, width = shape["image"]
    lights = shape["lights"]
    angle = 2 * math.pi * torch.rand(lights, dtype=torch.float64, generator=generator)
    sine = 0.3 * torch.rand(lights, dtype=torch.float64, generator=generator).sqrt()
    depths = -4 + 2.5 * torch.arange(n, dtype=torch.float64)
    if shape.get("uneven"):
        depths = depths + torch.rand(n, dtype=torch.float64, generator=generator)
    idt = DiffractionTomography(
        (height, width),
        depths,
        sine[:, None] * torch.stack((angle.cos(), angle.sin()), -1),
        pixel_size=0.42,
        wavelength=0.6,
        numerical_aperture=0.32,
        medium_index=1.33,
        thickness=2.5,
    )
    transfer = idt.transfer
    if shape.get("stored"):
        drawn = _draw((lights, n, height, width), torch.complex128, "cpu", generator)
        transfer = torch.where(diffraction.pupils(idt.support, width)[:, None], drawn, 0).to(dtype)
    return transfer.to(device), idt.depths.to(device), idt.support.to(device), idt.optics


def _diffraction_forward_inputs(
    shape: dict[str, Any], dtype: torch.dtype, device: str, generator: torch.Generator
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (
        _draw(shape["image"], dtype, device, generator),
        *_diffraction_scan(shape, dtype, device, generator),
    ), {}


def _diffraction_adjoint_inputs(
    shape: dict[str, Any], dtype: torch.dtype, device: str, generator: torch.Generator
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    batch, _, *size = shape["image"]
    intensities = _draw((batch, shape["lights"], *size), dtype.to_real(), device, generator)
    return (intensities, *_diffraction_scan(shape, dtype, device, generator)), {}


def _half(intensities: Tensor, dtype: torch.dtype) -> Tensor:
    return intensities.new_empty(*intensities.shape[:3], intensities.shape[3] // 2 + 1, dtype=dtype)


def _diffraction_gradient_inputs(
    shape: dict[str, Any], dtype: torch.dtype, device: str, generator: torch.Generator
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    (intensities, *scan, optics), _ = _diffraction_adjoint_inputs(shape, dtype, device, generator)
    spectra = fft(torch.fft.rfftn, intensities) if intensities.numel() else _half(intensities, dtype)
    n = shape["lights"]
    illuminations = torch.randperm(n, generator=generator)[: max(1, n // 2)].to(device)
    return (_draw(shape["image"], dtype, device, generator), spectra, *scan, illuminations, optics), {}


def _diffraction_gram_inputs(
    shape: dict[str, Any], dtype: torch.dtype, device: str, generator: torch.Generator
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    image = _draw(shape["image"], dtype, device, generator)
    even = {**shape, "stored": False, "uneven": False}
    transfer, depths, support, optics = _diffraction_scan(even, dtype, device, generator)
    auto, pairs = _matrices.gram_matrices(_matrices.Scan(transfer, depths, support, optics, image.shape[-1]))
    spectrum = _draw(shape["image"], dtype, device, generator)
    return (image, auto.to(dtype), pairs.to(dtype), spectrum), {}


# Tails of tiles, one tile and one number a channel, several parts; one group, one channel a group, widths that are no
# power of two; more channels than a tile has.
CASES = (
    OpCase(
        "diffraction_forward",
        _diffraction_forward_inputs,
        DIFFRACTION_SHAPES,
        (0,),
        lambda image, *scan, **o: lambda y: ops.diffraction_adjoint(y, *scan, **o),
        **DIFFRACTION,
    ),
    OpCase(
        "diffraction_adjoint",
        _diffraction_adjoint_inputs,
        DIFFRACTION_SHAPES,
        (0,),
        lambda y, *scan, **o: lambda x: ops.diffraction_forward(x, *scan, **o),
        **DIFFRACTION,
    ),
    # Half a spectrum is not free: gradients in it are tested through the intensities.
    OpCase("diffraction_gradient", _diffraction_gradient_inputs, DIFFRACTION_SHAPES, (0,), **DIFFRACTION),
    OpCase("diffraction_gram", _diffraction_gram_inputs, DIFFRACTION_SHAPES, (0, 3), **DIFFRACTION),
    OpCase(
        "radon_forward",
        _forward_inputs,
        RADON_SHAPES,
        (0,),
        lambda image, *scan, **o: lambda y: ops.radon_adjoint(y, *scan, image.shape[1:], **o),
        **RADON,
    ),
    OpCase(
        "radon_adjoint",
        _adjoint_inputs,
        RADON_SHAPES,
        (0,),
        lambda y, angles, detector, _, **o: lambda x: ops.radon_forward(x, angles, detector, **o),
        **RADON,
    ),
    OpCase("radon_backproject", _adjoint_inputs, RADON_SHAPES, (0,), **RADON),
    OpCase("radon_gradient", _gradient_inputs, RADON_SHAPES, (0, 1), **RADON),
    OpCase(
        "red_update",
        _red_inputs,
        tuple({"image": s} for s in ((1, 1), (3, 5, 7), (2, 1, 33, 65), (1, 127, 129), (4, 4096), (3,))),
        (0, 1, 2, 3, 4),
        complex=True,
    ),
    OpCase(
        "fourier_forward",
        _fourier_forward_inputs,
        FOURIER_SHAPES,
        (0,),
        lambda _, *scan, **o: lambda y: ops.fourier_adjoint(y, *scan, **o),
        **FOURIER,
    ),
    OpCase(
        "fourier_adjoint",
        _fourier_adjoint_inputs,
        FOURIER_SHAPES,
        (0,),
        lambda _, *scan, **o: lambda x: ops.fourier_forward(x, *scan, **o),
        **FOURIER,
    ),
    OpCase("fourier_gradient", _fourier_gradient_inputs, FOURIER_SHAPES, (0, 1), **FOURIER),
)
