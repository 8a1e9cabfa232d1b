"""What only a GPU tells of its faces, beside the operator tests, which take them too: skipped without one."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

import oder_fast
from oder_fast import (
    DEQRED,
    Anderson,
    Average,
    CartesianMRI,
    Decay,
    Implicit,
    JacobianFree,
    Nesterov,
    NotCapturedWarning,
    ParallelBeamCT,
    Picard,
    UNet,
)
from oder_fast.data import birdcage_maps, random_lines
from oder_fast.fixed_point import graphs
from oder_fast.testing import CASES, TOLERANCE, relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


def load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


operators, host = load("test_operators"), load("test_gpu_faces")
FACES = pytest.mark.parametrize("backend", ["cuda", "triton"])
TILES = {"radon": host.TILED, "fourier": host.FOURIER_TILED, "diffraction": host.DIFFRACTION_TILED, "red": ()}
TILED = [
    pytest.param(case, shape, id=f"{case.name}-{k}")
    for case in CASES
    for k, shape in enumerate(TILES[case.name.partition("_")[0]])
]
EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@FACES
@pytest.mark.parametrize(("case", "shape"), TILED)
def test_values_where_there_are_several_tiles(case, shape, backend, generator):
    for dtype in filter(case.takes, (torch.float32, torch.bfloat16, torch.complex64)):
        args, options = case.make_inputs(shape, dtype, "cuda", generator)
        got = operators.results(case.function(*args, **options, backend=backend))
        wide = {k: operators.widen(v) for k, v in options.items()}
        expected = operators.results(case.function(*map(operators.widen, args), **wide, backend="reference"))
        for one, other in zip(got, expected, strict=True):
            assert relative_error(one, other) < TOLERANCE[dtype], dtype


@FACES
@EACH
def test_bits_are_equal_from_run_to_run(case, backend, generator):
    args, options = case.make_inputs(case.large[0], case.dtype, "cuda", generator)
    first, *others = (operators.results(case.function(*args, **options, backend=backend)) for _ in range(4))
    for other in others:
        assert all(map(torch.equal, first, other))


@FACES
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


@FACES
def test_more_numbers_than_32_bits_count(backend):
    """2^31 + 37 of them, in bfloat16: 4 GiB an image."""
    n = 2**31 + 37
    if torch.cuda.mem_get_info()[0] < 6 * 2 * n:
        pytest.skip("needs 24 GiB of GPU memory")
    one = torch.ones((), dtype=torch.float64, device="cuda")
    image = torch.full((1, n), 3.0, dtype=torch.bfloat16, device="cuda")
    image[0, -41:] = 5.0
    updated = oder_fast.red_update(image, image, image, 0.5 * one, one, backend=backend).image
    expected = torch.full((41,), 2.5, device="cuda")
    assert torch.equal(updated[0, -41:].float(), expected)
    assert torch.equal(updated[0, :41].float(), torch.full((41,), 1.5, device="cuda"))
    assert bool((updated[0, :-41] == 1.5).all())


@FACES
@pytest.mark.parametrize("minibatch_size", [None, 8])
def test_a_solve_and_its_gradient_equal_those_of_the_cpu(minibatch_size, backend, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    convolutions = (torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Conv2d(4, 1, 3, padding=1))
    denoiser = torch.nn.Sequential(convolutions[0], torch.nn.Tanh(), convolutions[1])
    truth = torch.rand(2, 32, 32)
    found = []
    for device, face in (("cpu", "cpu"), ("cuda", backend)):
        ct = ParallelBeamCT(32, 24, backend=face).to(device)
        # Moving a network moves its gradients too, in place.
        denoiser.zero_grad()
        denoiser.to(device)
        y = ct(truth.to(device))
        model = DEQRED(
            ct,
            denoiser,
            tau=20.0,
            minibatch_size=minibatch_size,
            solver=Nesterov(3000, 1e-6),
            on_failure="raise",
        )
        solution = model(y)
        solution.square().mean().backward()
        found.append([solution.detach().cpu(), *(p.grad.cpu() for p in denoiser.parameters())])
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other) < 1e-3


# ------------------------------------------------------------------ solves by CUDA graphs


@pytest.fixture
def replays(monkeypatch):
    """The number of replays."""
    count, capture = [0], graphs.Side.capture

    def counting(self, *args):
        replay, result = capture(self, *args)

        def counted():
            count[0] += 1
            replay()

        return counted, result

    monkeypatch.setattr(graphs.Side, "capture", counting)
    return count


def denoiser(channels=1):
    torch.manual_seed(0)
    return UNet(channels=(8, 16), in_channels=channels).cuda()


def solved(operator, y, network, seed, **options):
    """All that a solve and its gradient leave, of two calls between which the weights change."""
    network = copy.deepcopy(network)
    generator = None if seed is None else torch.Generator("cuda").manual_seed(seed)
    torch.manual_seed(1)
    options = {"tau": 0.3 * operator.norm_squared(), "on_failure": "ignore"} | options
    model = DEQRED(operator, network, generator=generator, **options)
    found, reasons = [], []
    for _ in range(2):
        network.zero_grad()
        solution = model(y, return_solution=True)
        solution.value.abs().square().mean().backward()
        found += [solution.value.detach(), solution.residuals, solution.iterations]
        found += [s.value for s in solution.adjoint] + [s.residuals for s in solution.adjoint]
        found += [p.grad.clone() for p in network.parameters()]
        reasons += [s.fallback_reason for s in (solution, *solution.adjoint)]
        with torch.no_grad():
            for p in network.parameters():
                p.mul_(0.95)
    return [*found, torch.rand(3, device="cuda", generator=generator)], reasons


def assert_same_bits_by_graphs(replays, *args, **options):
    # NaN stands in the residuals of images that had converged before.
    eager, _ = solved(*args, **options)
    assert replays == [0]
    found, reasons = solved(*args, cuda_graph=True, **options)
    assert reasons == [None] * len(reasons)
    assert replays[0] > 20
    for one, other in zip(eager, found, strict=True):
        assert torch.equal(one.nan_to_num(-1.0), other.nan_to_num(-1.0))


GRAPHED = [
    pytest.param({"solver": Picard(40, 1e-4)}, id="Picard"),
    pytest.param({"solver": Nesterov(40, 1e-4)}, id="Nesterov"),
    pytest.param({"solver": Nesterov(40, check_every=None)}, id="untested"),
    pytest.param({"differentiation": JacobianFree(), "solver": Nesterov(60, 1e-6)}, id="Jacobian-free"),
    pytest.param({"differentiation": Implicit(warm_start=True), "solver": Picard(40, 1e-4)}, id="warm"),
    pytest.param({"minibatch_size": 8, "solver": Nesterov(60, 1e-5)}, id="reduced variance"),
    *(
        pytest.param(
            {"minibatch_size": 8, "variance_reduction": False, "solver": Nesterov(60, 1e-6, tail=tail)},
            id=f"minibatches, {tail}",
        )
        for tail in (None, Average(), Decay())
    ),
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@FACES
@pytest.mark.parametrize("options", GRAPHED)
@pytest.mark.parametrize("seed", [None, 7])
def test_graphs_give_the_bits_of_the_solve_without(options, seed, backend, replays):
    ct = ParallelBeamCT(32, 24, backend=backend).cuda()
    y = ct(torch.rand(2, 32, 32, generator=torch.Generator().manual_seed(0)).cuda())
    assert_same_bits_by_graphs(replays, ct, y, denoiser(), seed, **options)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("minibatch_size", [None, 2])
def test_graphs_of_complex_images(minibatch_size, replays):
    maps, mask = birdcage_maps(4, (32, 32)), random_lines(32, acceleration=2, center_fraction=0.2)
    mri = CartesianMRI(maps, mask).cuda()
    y = mri(torch.rand(2, 32, 32, dtype=torch.complex64).cuda())
    assert_same_bits_by_graphs(replays, mri, y, denoiser(2), 7, minibatch_size=minibatch_size)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_graphs_under_autocast(replays):
    ct = ParallelBeamCT(32, 24).cuda()
    y = ct(torch.rand(2, 32, 32).cuda())
    with torch.autocast("cuda", torch.bfloat16):
        assert_same_bits_by_graphs(replays, ct, y, denoiser(), 7, minibatch_size=8)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_graphs_of_anderson(replays):
    """Where the small systems it solves can be captured; else it says so, and the bits are equal all the same."""
    ct = ParallelBeamCT(32, 24).cuda()
    y = ct(torch.rand(2, 32, 32).cuda())
    options = {"solver": Anderson(40, 1e-6), "differentiation": JacobianFree()}
    eager, _ = solved(ct, y, denoiser(), None, **options)
    found, reasons = solved(ct, y, denoiser(), None, cuda_graph=True, **options)
    assert all(torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0)) for a, b in zip(eager, found, strict=True))
    assert replays[0] > 20 or "captured" in reasons[0]


@pytest.mark.filterwarnings("ignore::oder_fast.NotConvergedWarning")
def test_a_capture_that_fails_leaves_nothing_behind(replays):
    """Neither in torch's generator nor in its memory; the next solve is captured."""
    ct = ParallelBeamCT(32, 24).cuda()
    y, network = ct(torch.rand(2, 32, 32).cuda()), denoiser().eval()
    options = {"tau": 0.3 * ct.norm_squared(), "minibatch_size": 8, "solver": Nesterov(40, 1e-5)}

    class Waits(torch.nn.Module):
        def forward(self, x):
            return network(x) * (1.0 if float(x.sum()) < 1e30 else 2.0)

    with torch.no_grad():
        torch.manual_seed(0)
        expected = DEQRED(ct, Waits(), **options)(y)
        torch.manual_seed(0)
        with pytest.warns(NotCapturedWarning, match="cannot be captured"):
            found = DEQRED(ct, Waits(), cuda_graph=True, **options)(y)
        assert torch.equal(found, expected)
        assert torch.rand(3, device="cuda").isfinite().all()
        assert replays == [0]
        solution = DEQRED(ct, network, cuda_graph=True, **options)(y, return_solution=True)
        assert solution.fallback_reason is None
        assert replays[0] > 10


@pytest.mark.filterwarnings("ignore::oder_fast.NotConvergedWarning")
def test_graphs_of_later_solves_find_memory_where_the_first_had_it():
    ct = ParallelBeamCT(128, 24).cuda()
    y, network = ct(torch.rand(2, 128, 128).cuda()), denoiser()
    model = DEQRED(ct, network, tau=0.3 * ct.norm_squared(), solver=Nesterov(30, 1e-6), cuda_graph=True)
    reserved = []
    for _ in range(8):
        network.zero_grad()
        model(y).square().mean().backward()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] == reserved[2]
