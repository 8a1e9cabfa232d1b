"""What only a GPU tells of its backends, beside the operator tests, which take them too: skipped without one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from cases import CASES, TOLERANCE, relative_error

import oder_fast
from oder_fast import DEQRED, Anderson, GradientStep, Implicit, Nesterov, ParallelBeamCT, ProximalStep

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


def load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


operators, host = load("test_operators"), load("test_gpu_backends")
BUILDS = pytest.mark.parametrize("backend", ["cuda", "triton"])
TILES = {"radon": host.TILED, "fourier": host.FOURIER_TILED, "diffraction": host.DIFFRACTION_TILED, "red": ()}
TILED = [
    pytest.param(case, shape, id=f"{case.name}-{k}")
    for case in CASES
    for k, shape in enumerate(TILES[case.name.partition("_")[0]])
]
EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@BUILDS
@pytest.mark.parametrize(("case", "shape"), TILED)
def test_values_where_there_are_several_tiles(case, shape, backend, generator):
    for dtype in filter(case.takes, (torch.float32, torch.bfloat16, torch.complex64)):
        args, options = case.make_inputs(shape, dtype, "cuda", generator)
        got = operators.results(case.function(*args, **options, backend=backend))
        wide = {k: operators.widen(v) for k, v in options.items()}
        expected = operators.results(case.function(*map(operators.widen, args), **wide, backend="reference"))
        for one, other in zip(got, expected, strict=True):
            assert relative_error(one, other) < TOLERANCE[dtype], dtype


@BUILDS
@EACH
def test_bits_are_equal_from_run_to_run(case, backend, generator):
    args, options = case.make_inputs(case.large[0], case.dtype, "cuda", generator)
    first, *others = (operators.results(case.function(*args, **options, backend=backend)) for _ in range(4))
    for other in others:
        assert all(map(torch.equal, first, other))


@BUILDS
@EACH
def test_operators_are_captured_in_a_graph(case, backend, generator):
    """So nothing in them waits for the device, and all they launch is on the current stream."""
    args, options = case.make_inputs(case.shapes[2], case.dtype, "cuda", generator)

    def call():
        return operators.results(case.function(*args, **options, backend=backend))

    expected = call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for value in captured:
        value.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, captured, expected))


@BUILDS
def test_more_numbers_than_32_bits_count(backend):
    """2^31 + 37 of them, in bfloat16: 4 GiB an image."""
    n = 2**31 + 37
    if torch.cuda.mem_get_info()[0] < 6 * 2 * n:
        pytest.skip("needs 24 GiB of GPU memory")
    one = torch.ones((), dtype=torch.float64, device="cuda")
    image = torch.full((1, n), 3.0, dtype=torch.bfloat16, device="cuda")
    image[0, -41:] = 5.0
    updated = oder_fast.ops.red_update(image, image, image, 0.5 * one, one, backend=backend).image
    expected = torch.full((41,), 2.5, device="cuda")
    assert torch.equal(updated[0, -41:].float(), expected)
    assert torch.equal(updated[0, :41].float(), torch.full((41,), 1.5, device="cuda"))
    assert bool((updated[0, :-41] == 1.5).all())


@BUILDS
@pytest.mark.parametrize(
    ("step", "solver"),
    [
        pytest.param(ProximalStep(), Anderson(200, 1e-4), id="proximal"),
        pytest.param(GradientStep(), Anderson(1000, 1e-4), id="gradient"),
        pytest.param(GradientStep(minibatch_size=8), Nesterov(3000, 1e-4), id="minibatches"),
    ],
)
def test_a_solve_and_its_gradient_equal_those_of_the_cpu(step, solver, backend, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    convolutions = (torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Conv2d(4, 1, 3, padding=1))
    denoiser = torch.nn.Sequential(convolutions[0], torch.nn.Tanh(), convolutions[1])
    truth = torch.rand(2, 32, 32)
    model = DEQRED(
        denoiser, tau=0.1, step=step, solver=solver, differentiation=Implicit(solver), on_failure="raise"
    )
    found = []
    for device, chosen in (("cpu", "cpu"), ("cuda", backend)):
        ct = ParallelBeamCT(32, 24, backend=chosen).to(device)
        # Moving a network moves its gradients too, in place.
        model.zero_grad()
        model.to(device)
        image = model(ct(truth.to(device)), ct)
        image.square().mean().backward()
        found.append([image.detach().cpu(), *(p.grad.cpu() for p in denoiser.parameters())])
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other) < 1e-3
