"""Launch the GPU kernels once and nothing much besides, for tools that watch them.

    PYTHONPATH=tests compute-sanitizer python benches/launch_kernels.py small
    PYTHONPATH=tests ncu --profile-from-start off python benches/launch_kernels.py paper

`small` runs every operator's CUDA backend at the shapes of the operator tests and at those that need several tiles. `paper`
runs each operator at the paper's sizes, on the CUDA backend and then on the Triton one; only the second of two calls of each
lies between the profiler's start and stop.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch
from cases import CASES, angles_over

import bench_diffraction
import bench_fourier
import bench_radon
import oder_fast
from oder_fast import ops
from oder_fast.ops import Detector, backends


def tiled_shapes() -> dict[str, tuple[dict, ...]]:
    """Return the shapes of tests/test_gpu_backends.py that need several tiles, by the first word of the operators."""
    path = Path(__file__).resolve().parents[1] / "tests" / "test_gpu_backends.py"
    spec = importlib.util.spec_from_file_location("test_gpu_backends", path)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {
        "radon": module.TILED,
        "fourier": module.FOURIER_TILED,
        "diffraction": module.DIFFRACTION_TILED,
        "red": (),
    }


def small(backend: str, device: str, large: bool = True) -> int:
    """Run all operators at small shapes and look at every number; return how many runs there were."""
    generator, runs = torch.Generator().manual_seed(0), 0
    more = tiled_shapes() if large else {}
    for case in CASES:
        shapes = (*case.shapes, *(case.large if large else ()), *more.get(case.name.partition("_")[0], ()))
        for shape, dtype in itertools.product(shapes, filter(case.takes, backends.DTYPES[backend])):
            args, options = case.make_inputs(shape, dtype, device, generator)
            result = case.function(*args, **options, backend=backend)
            for value in [result] if isinstance(result, torch.Tensor) else result:
                if not bool(torch.isfinite(value).all()):
                    raise SystemExit(f"{case.name} {shape} {dtype}: not finite")
            runs += 1
    return runs


def paper(backend: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Give each operator at the paper's sizes."""
    generator = torch.Generator().manual_seed(0)
    batch, size, n_bins, n_views, n_used = bench_radon.SCANS[0]
    angles = angles_over(n_views).cuda()
    views = torch.randperm(n_views, generator=generator)[:n_used].cuda()
    x = torch.rand(batch, size, size, generator=generator).cuda()
    y = torch.rand(batch, n_views, n_bins, generator=generator).cuda()
    yield "radon_forward", lambda: oder_fast.ops.radon_forward(x, angles, Detector(n_bins), backend=backend)
    yield (
        "radon_adjoint",
        lambda: oder_fast.ops.radon_adjoint(y, angles, Detector(n_bins), (size, size), backend=backend),
    )
    yield (
        "radon_gradient",
        lambda: oder_fast.ops.radon_gradient(x, y, angles, Detector(n_bins), views, backend=backend),
    )
    for points in (False, True):
        mri = bench_fourier.on_gpu(bench_fourier.Scan(*bench_fourier.CASES[0], points))
        mri.operator.backend = backend
        yield f"fourier_gradient of {'points' if points else 'lines'}", mri.ours
    idt = bench_diffraction.on_gpu(bench_diffraction.CASES[0])
    idt.operator.backend = backend
    yield "diffraction_gradient", idt.ours
    yield (
        "diffraction_gram",
        lambda: ops.diffraction_gram(idt.image, *idt.matrices, idt.right, backend=backend),
    )
    images = torch.randn(4, 8, size, size, generator=generator).cuda()
    step_size, tau = (torch.tensor(v, dtype=torch.float64, device="cuda") for v in (0.1, 1.5))
    momentum = torch.full((8,), 0.5, dtype=torch.float64, device="cuda")
    yield (
        "red_update",
        lambda: oder_fast.ops.red_update(
            *images[:3], step_size, tau, previous=images[3], momentum=momentum, backend=backend
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sizes", choices=("small", "paper"))
    if parser.parse_args().sizes == "small":
        print(f"{small('cuda', 'cuda')} runs")
        return
    for backend in ("cuda", "triton"):
        for name, call in paper(backend):
            call()
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            call()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            print(backend, name)


if __name__ == "__main__":
    main()
