"""The operator in examples/diagonal, which a new one starts as a copy of, passes what every operator must."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest
import torch
from cases import OpCase, _draw
from test_gpu_backends import HostBuild, cuda_host, operators

import oder_fast
from oder_fast import DEQRED, TotalVariation
from oder_fast.ops import backends

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = ROOT / "examples" / "diagonal"


@pytest.fixture(scope="module")
def copied():
    """As if its Python files had been copied to their places."""
    for folder in ("reference", "ops", "operators", "kernels"):
        place = TEMPLATE if folder == "kernels" else TEMPLATE / "oder_fast"
        importlib.import_module(f"oder_fast.{folder}").__path__.append(str(place / folder))
    oder_fast.ops.diagonal = importlib.import_module("oder_fast.ops.diagonal").diagonal
    yield importlib.import_module("oder_fast.operators.diagonal")
    del oder_fast.ops.diagonal
    for folder in ("reference", "ops", "operators", "kernels"):
        importlib.import_module(f"oder_fast.{folder}").__path__.pop()


@pytest.fixture(params=[*(pytest.param(b, marks=pytest.mark.exhaustive) for b in ("cpu", "cuda")), "triton"])
def build(request, copied):
    """Its C++ backend, its CUDA backend on the host, and its Triton backend interpreted."""
    if request.param == "triton":
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("with a GPU the Triton kernels run there, compiled")
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(backends._BACKENDS, "triton", backends._Triton())
            yield HostBuild("triton")
        return
    kind = "_cpu.cpp" if request.param == "cpu" else "_cuda.cu"
    module = cuda_host.build(source=TEMPLATE / "csrc", kind=kind)
    with backends.use_module(request.param, module):
        yield HostBuild(request.param)


def inputs(shape, dtype, device, generator):
    image, mask = (_draw(size, dtype, device, generator) for size in (shape["image"], shape["image"][1:]))
    return (image, mask), {}


CASE = OpCase(
    "diagonal",
    inputs,
    [{"image": size} for size in ((1, 1, 1), (3, 7, 9), (2, 33, 65))],
    (0,),
    lambda image, mask, **options: lambda y: oder_fast.ops.diagonal(y, mask, **options),
)


@pytest.mark.parametrize("shape", CASE.shapes, ids=lambda s: "x".join(map(str, s["image"])))
def test_values_and_transpose(shape, build, generator):
    operators.test_values_equal_the_reference(CASE, shape, build, generator)
    operators.test_adjoint_is_the_exact_transpose(CASE, shape, build, generator)


def test_derivatives_and_views_of_memory(build, generator):
    shape = CASE.shapes[1]
    operators.test_gradients_equal_those_of_the_reference(CASE, shape, build, generator)
    operators.test_any_view_of_memory_is_taken(CASE, shape, build, generator)
    operators.test_empty_batch_gives_an_empty_result(CASE, shape, build, generator)


@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")
def test_transforms_of_torch_func(build, generator):
    operators.test_transforms_of_torch_func(CASE, CASE.shapes[1], build, generator)


def test_red_fixed_point(build, copied, generator):
    mask = 0.5 + torch.rand(12, 10, generator=generator)
    operator = copied.Diagonal(mask, backend=build.backend)
    y = operator(torch.rand(2, 12, 10, generator=generator))
    denoiser, tau = TotalVariation(0.05), 0.1
    solution = DEQRED(denoiser, tau=tau, normalize=False)(y, operator, return_solution=True)
    x = solution.value
    assert solution.converged.all()
    weight = tau * operator.norm_squared()
    residual = operator.adjoint(operator(x) - y) + weight * (x - denoiser(x[:, None])[:, 0])
    assert residual.norm() < 1e-2 * operator.adjoint(y).norm()


def test_files_go_to_places_that_the_build_looks_into():
    """Copied over the repository, it has no file that is there already, and its stem names every one."""
    files = [
        path.relative_to(TEMPLATE)
        for path in TEMPLATE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    assert len(files) == 6
    for file in files:
        assert file.stem in ("diagonal", "diagonal_cpu", "diagonal_cuda")
        assert (ROOT / file.parent).is_dir()
        assert not (ROOT / file).exists()
