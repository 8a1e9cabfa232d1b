"""Group normalization with PReLU: the kernels, on a GPU or interpreted, and the U-Net that takes them."""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from oder_fast import BackendUnavailableError, UNet, bound_lipschitz
from oder_fast.denoisers import _fused
from oder_fast.ops import faces, group_norm_prelu
from oder_fast.testing import LAYERS, TOLERANCE, relative_error

pytest.importorskip("triton")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
LAST = torch.channels_last
FORMATS = pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["contiguous", "last"])
needs_gpu = pytest.mark.skipif(not GPU, reason="torch sees no CUDA device")
contract = importlib.import_module("oder_fast.ops.group_norm_prelu")
(CASE,) = LAYERS
SHAPES = pytest.mark.parametrize("shape", CASE.shapes, ids=lambda s: "-".join(map(str, s.values())))


def load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


operators = load("test_operators")


class Triton:
    """The face, as the fixture `face` describes faces."""

    name = backend = "triton"
    device = DEVICE
    dtypes = (torch.float32, torch.bfloat16, torch.float16)


def draw(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


# ------------------------------------------------------------------ the operator


@SHAPES
def test_values(shape, generator):
    operators.test_values_equal_the_reference(CASE, shape, Triton, generator)


# Of two numbers a group, which become 1 and -1, rounding alone has a gradient.
@pytest.mark.parametrize("shape", CASE.shapes[2:], ids=lambda s: "-".join(map(str, s.values())))
def test_gradients(shape, generator):
    for dtype in Triton.dtypes:
        args, _ = CASE.make_inputs(shape, dtype, DEVICE, generator)
        v = draw(*args[0].shape, seed=9).to(dtype)

        def vjp(args, backend, v):
            args = [a.detach().requires_grad_() if torch.is_tensor(a) else a for a in args]
            output = group_norm_prelu(*args, backend=backend)
            return torch.autograd.grad(output, [args[k] for k in CASE.differentiable], v.to(output.dtype))

        expected = vjp([operators.widen(a) for a in args], "reference", v)
        for one, other in zip(vjp(args, "triton", v), expected, strict=True):
            assert relative_error(one, other) < 20 * TOLERANCE[dtype], dtype
        # Sums give gradients that are expanded.
        for one, other in zip(
            vjp(args, "triton", v[:1, :1, :1, :1].expand_as(v)),
            vjp(args, "triton", v[:1, :1, :1, :1].repeat(v.shape)),
            strict=True,
        ):
            assert torch.equal(one, other)


def test_strides_and_empty_batches(generator):
    operators.test_any_view_of_memory_is_taken(CASE, CASE.shapes[2], Triton, generator)
    operators.test_empty_batch_gives_an_empty_result(CASE, CASE.shapes[2], Triton, generator)
    image, slope = draw(0, 4, 3, 3).requires_grad_(), draw(1).requires_grad_()
    group_norm_prelu(image, 2, None, None, slope, backend="triton").sum().backward()
    assert image.grad.shape == image.shape
    assert slope.grad.tolist() == [0.0]


def test_gradcheck_of_the_reference(generator):
    (image, groups, *rest), _ = CASE.make_inputs(CASE.tiny, torch.float64, "cpu", generator)
    inputs = [v.requires_grad_() for v in (image, *rest)]
    call = lambda image, *rest: group_norm_prelu(image, groups, *rest)  # noqa: E731
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@FORMATS
@pytest.mark.parametrize("parts", [1, 3, 512])
def test_several_parts_of_several_tiles(layout, parts, monkeypatch):
    """However an image is divided, and with more parts than are read at once."""
    blocks = 1 if layout == LAST else 4
    monkeypatch.setattr(contract, "TILE", 32)
    monkeypatch.setattr(contract, "PROGRAMS", parts * blocks)
    monkeypatch.setattr(importlib.import_module("oder_fast.kernels.group_norm_prelu"), "BLOCK", 8)
    image = draw(2, 4, 19, 11).contiguous(memory_format=layout)
    _, divided, share = contract.split(4, 19 * 11, layout == LAST)
    assert (divided == 1) == (parts == 1)
    assert (divided - 1) * share < 19 * 11 <= divided * share
    compare(image, 2, draw(4), draw(4), draw(4))


def compare(image, groups, weight, bias, slope, tolerance=2e-6):
    """Values, vjp and derivatives of the vjp against the reference in float64."""
    given = [v for v in (image, weight, bias, slope) if v is not None]
    v = draw(*image.shape, seed=9)

    def derivatives(kind, backend):
        inputs = [g.detach().to(kind).requires_grad_() for g in given]
        rest = iter(inputs)
        arguments = [None if g is None else next(rest) for g in (image, weight, bias, slope)]
        output = group_norm_prelu(arguments[0], groups, *arguments[1:], backend=backend)
        assert backend == "reference" or output.stride() == image.stride()
        first = torch.autograd.grad(output, inputs, v.to(kind), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        return [output, *first], second

    (got, got_second), (expected, expected_second) = (
        derivatives(kind, backend)
        for kind, backend in ((torch.float32, "triton"), (torch.float64, "reference"))
    )
    for one, other in zip(got, expected, strict=True):
        assert relative_error(one, other) < tolerance
    for one, other in zip(got_second, expected_second, strict=True):
        assert relative_error(one, other) < 20 * tolerance


@pytest.mark.parametrize("absent", ["weight", "bias", "both", "neither"])
def test_derivatives_with_and_without_weight_and_bias(absent):
    weight = None if absent in ("weight", "both") else draw(6)
    bias = None if absent in ("bias", "both") else draw(6, seed=1)
    compare(draw(2, 6, 7, 5), 2, weight, bias, draw(6, seed=2))


def test_one_channel():
    compare(draw(3, 1, 5, 7), 1, draw(1), draw(1, seed=1), draw(1, seed=2))


@FORMATS
def test_a_large_mean_does_not_cancel(layout):
    """Statistics as exact as the numbers themselves, which float32 keeps to 2^-11 at 10^4."""
    for image in (draw(1, 4, 70, 61) + 1e4, draw(1, 4, 70, 61)):
        image[0, 1] -= 2e4
        # Large numbers where the sums begin.
        image[0, 2, 0, 0] = 3e4
        image = image.contiguous(memory_format=layout)
        weight, bias, slope = draw(4), draw(4), draw(1)
        expected = group_norm_prelu(image.double(), 4, weight, bias, slope, backend="reference")
        got = group_norm_prelu(image, 4, weight, bias, slope, backend="triton")
        assert relative_error(got, expected) < 2e-6


@np.errstate(all="ignore")
def test_numbers_that_are_none_stay_in_their_group():
    image = draw(2, 4, 6, 5)
    clean = group_norm_prelu(image, 2, None, None, draw(1), backend="triton")
    for value in (torch.nan, torch.inf):
        image[1, 2, 3, 1] = value
        got = group_norm_prelu(image, 2, None, None, draw(1), backend="triton")
        assert bool(got[1, 2:].isnan().all())
        assert torch.equal(got[0], clean[0])
        assert torch.equal(got[1, :2], clean[1, :2])


def test_bits_do_not_depend_on_other_images_or_on_the_gradients_that_are_wanted():
    image, weight, bias, slope = draw(3, 4, 71, 61), draw(4), draw(4), draw(1)
    v = draw(*image.shape, seed=3)

    def vjp(image, v, *trained):
        image = image.clone().requires_grad_()
        output = group_norm_prelu(image, 2, weight, bias, slope, backend="triton")
        return output, *torch.autograd.grad(output, [image, *trained], v)

    output, grad = vjp(image, v)
    alone = vjp(image[1:2], v[1:2])
    assert torch.equal(alone[0], output[1:2])
    assert torch.equal(alone[1], grad[1:2])
    weight.requires_grad_()
    assert torch.equal(vjp(image, v, weight)[1], grad)
    (alone,) = torch.autograd.grad(
        group_norm_prelu(image, 2, weight, bias, slope, backend="triton"), weight, v
    )
    assert torch.equal(alone, vjp(image, v, weight)[2])


def test_gradients_in_half_precision_have_the_dtypes_of_their_inputs():
    image = draw(2, 4, 5, 6).bfloat16().requires_grad_()
    weight, bias, slope = draw(4).requires_grad_(), draw(4).half().requires_grad_(), draw(1).requires_grad_()
    output = group_norm_prelu(image, 2, weight, bias, slope, backend="triton")
    assert output.dtype == torch.bfloat16
    for grad, v in zip(
        torch.autograd.grad(output.float().sum(), [image, weight, bias, slope]),
        [image, weight, bias, slope],
        strict=True,
    ):
        assert grad.dtype == v.dtype
        assert grad.shape == v.shape


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_several_gradients_at_once():
    image, slope = draw(2, 4, 5, 6).requires_grad_(), draw(1)
    output = group_norm_prelu(image, 2, None, None, slope, backend="triton")
    v = draw(3, *output.shape)
    each = [torch.autograd.grad(output, image, one, retain_graph=True)[0] for one in v]
    (together,) = torch.autograd.grad(output, image, v, is_grads_batched=True)
    assert torch.equal(together, torch.stack(each))


def test_third_derivatives():
    found = []
    for kind, backend in ((torch.float32, "triton"), (torch.float64, "reference")):
        image, slope = (v.to(kind).requires_grad_() for v in (draw(1, 4, 3, 4), draw(1)))
        total = group_norm_prelu(image, 2, None, None, slope, backend=backend).pow(3).sum()
        for _ in range(3):
            (grad,) = torch.autograd.grad(total, image, create_graph=True)
            total = grad.square().sum()
        found.append(grad)
    assert relative_error(*found) < 1e-4


def test_slopes_computed_from_the_image():
    """Gradients by one way are not counted by the other as well."""
    found = []
    for kind, backend in ((torch.float32, "triton"), (torch.float64, "reference")):
        image = draw(1, 4, 3, 4).to(kind).requires_grad_()
        output = group_norm_prelu(
            image, 2, None, image.mean((0, 2, 3)), image.amax((0, 2, 3)), backend=backend
        )
        (grad,) = torch.autograd.grad(output.square().sum(), image, create_graph=True)
        found.append([grad, *torch.autograd.grad(grad.square().sum(), image)])
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other) < 1e-5


def test_registration(generator):
    (image, groups, *rest), _ = CASE.make_inputs(CASE.tiny, torch.float32, DEVICE, generator)
    for source, wanted in (
        (image.contiguous(memory_format=LAST), (True, True)),
        (image, (True, False)),
        (image.mT, (False, True)),
    ):
        inputs = [v.detach().clone().requires_grad_() for v in (source, *rest)]
        torch.library.opcheck(contract.OPERATOR.default, (*inputs, groups, 1e-5, "triton"))
        _, mean, rstd = contract.OPERATOR(*inputs, groups, 1e-5, "triton")
        given = (draw(*source.shape).requires_grad_(), *inputs, mean, rstd, groups, 1e-5)
        torch.library.opcheck(contract.OPERATOR_BACKWARD.default, (*given, *wanted, "triton"))


def test_compiles_without_a_graph_break(generator):
    args, _ = CASE.make_inputs(CASE.shapes[3], torch.float32, DEVICE, generator)
    call = lambda *args: group_norm_prelu(*args, backend="triton")  # noqa: E731
    torch._dynamo.reset()
    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(*args), call(*args))


X, P = torch.zeros(2, 4, 3, 3), torch.ones(4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: group_norm_prelu(3.0, 2, P, P, P), TypeError, "group_norm_prelu: image must be a torch.Tensor"),
        (lambda: group_norm_prelu(X[0], 2, P, P, P), ValueError, "image must have 4 dimensions"),
        (lambda: group_norm_prelu(X + 0j, 2, P, P, P), TypeError, "image must be floating-point, got torch.complex64"),
        (lambda: group_norm_prelu(X, 3, P, P, P), ValueError, "groups must divide the 4 channels of image, got 3"),
        (lambda: group_norm_prelu(X, 0, P, P, P), ValueError, "groups must divide the 4 channels of image, got 0"),
        (lambda: group_norm_prelu(X[:1, :, :1, :1], 4, P, P, P), ValueError, "more than one number"),
        (lambda: group_norm_prelu(X, 2, P, P, P, 0.0), ValueError, "eps must be a finite number above 0"),
        (lambda: group_norm_prelu(X, 2, P[:3], P, P), ValueError, "weight must have 4 elements, got 3"),
        (lambda: group_norm_prelu(X, 2, None, P.int(), P), TypeError, "bias must be floating-point"),
        (lambda: group_norm_prelu(X, 2, P, P, P[:2]), ValueError, "slope must have 1 or 4 elements, got 2"),
        (lambda: group_norm_prelu(X, 2, P, P, 0.25), TypeError, "slope must be a torch.Tensor, got float"),
        (lambda: group_norm_prelu(X, 2, P.to("meta"), P, P), ValueError, "weight must be on the device of image"),
        (lambda: group_norm_prelu(X, 2, P, P, P, backend="cuda"), BackendUnavailableError, "has no such face"),
        (lambda: group_norm_prelu(X.double(), 2, P, P, P, backend="triton"), BackendUnavailableError, "no kernel for"),
    ],
)  # fmt: skip
def test_messages(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", ["cpu", "cuda", "reference"])
def test_the_environment_chooses_among_the_faces_that_there_are(name, monkeypatch):
    monkeypatch.setenv("ODER_FAST_BACKEND", name)
    assert faces.resolve("auto", X.device, X.dtype, contract.FACES) == "reference"
    assert torch.equal(group_norm_prelu(X + 1, 2, P, P, P), F.prelu(F.group_norm(X + 1, 2, P, P), P))


# ------------------------------------------------------------------ networks


@pytest.fixture
def taken(monkeypatch):
    """Make the kernels run on CPU tensors too, and count how often a network calls them."""
    calls = []
    if not GPU:
        monkeypatch.setenv("ODER_FAST_BACKEND", "triton")
    monkeypatch.setattr(_fused, "FEWEST", 0)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    real = _fused.group_norm_prelu
    monkeypatch.setattr(_fused, "group_norm_prelu", lambda *a: calls.append(1) or real(*a))
    return calls


def unet(layout=torch.contiguous_format):
    torch.manual_seed(0)
    network = UNet((4, 8)).eval().to(DEVICE, memory_format=layout)
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return network


def gradients(network, image):
    leaf = image.clone().requires_grad_()
    output = network(leaf)
    v = torch.linspace(-1, 2, output.numel(), device=DEVICE).reshape(output.shape).cos().to(output.dtype)
    return output, *torch.autograd.grad(output, [leaf, *network.parameters()], v)


def test_small_features_are_left_to_torch(taken, monkeypatch):
    network, image = unet(), draw(2, 1, 9, 12)
    monkeypatch.setattr(_fused, "FEWEST", 4 * 10 * 12)  # of an image at the first level, after its extension
    network(image)
    assert len(taken) == 2
    network(image.repeat(4, 1, 1, 1)[:, :, :8])
    assert len(taken) == 2


def test_a_triton_that_cannot_compile_is_done_without(taken, monkeypatch):
    def fails(*_):
        raise RuntimeError("Failed to find C compiler.\nSee there")

    network, image = unet(), draw(2, 1, 9, 12)
    monkeypatch.setattr(_fused, "_broken", [])
    with monkeypatch.context() as patch:
        patch.setenv("ODER_FAST_BACKEND", "reference")
        expected = network(image)
    monkeypatch.setattr(_fused, "group_norm_prelu", fails)
    with pytest.warns(UserWarning, match=r"^group_norm_prelu: Failed to find C compiler\.; the U-Net takes"):
        assert torch.equal(network(image), expected)
    assert torch.equal(network(image), expected)


@FORMATS
def test_the_unet_by_kernels_is_the_unet(layout, taken, monkeypatch):
    network, image = unet(layout), draw(2, 1, 9, 12)
    got = gradients(network, image)
    assert len(taken) == 3
    monkeypatch.setenv("ODER_FAST_BACKEND", "reference")
    expected = gradients(network, image)
    assert len(taken) == 3
    for one, other in zip(got, expected, strict=True):
        assert relative_error(one, other) < 1e-4


def test_the_unet_by_kernels_under_autocast(taken, monkeypatch):
    network, image = unet(), draw(2, 1, 8, 12)
    inner = []
    network.encoder1.enc1conv2.register_forward_pre_hook(lambda module, args: inner.append(args[0].dtype))

    def run(autocast=True):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            return gradients(network, image)

    got = run()
    assert len(taken) == 3
    assert inner == [torch.bfloat16]
    monkeypatch.setenv("ODER_FAST_BACKEND", "reference")
    plain, exact = run(), run(False)
    assert [v.dtype for v in got] == [v.dtype for v in plain]
    found, plain, exact = (torch.cat([v.float().flatten() for v in run]) for run in (got, plain, exact))
    assert relative_error(found, exact) < 2 * relative_error(plain, exact) + 0.01


def test_modules_that_are_more_than_their_forward_are_called(taken):
    network, image = unet(), draw(1, 1, 8, 8)
    block, seen = network.encoder1, []
    expected = network(image)
    for hook in (
        lambda m: m.register_forward_hook(lambda *a: seen.append(1)),
        lambda m: m.register_forward_pre_hook(lambda *a: seen.append(1)),
        lambda m: m.register_full_backward_hook(lambda *a: seen.append(1)),
    ):
        for module in (block.enc1norm1, block.enc1relu1):
            handle = hook(module)
            taken.clear()
            seen.clear()
            network(image).sum().backward()
            assert len(taken) == 2
            assert len(seen) == 1
            handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda *a: None)
    taken.clear()
    network(image)
    handle.remove()
    assert not taken
    block.enc1relu1.forward = lambda x: 0 * x
    assert not torch.allclose(network(image), expected)
    del block.enc1relu1.forward
    block.enc1norm1 = nn.InstanceNorm2d(4).to(DEVICE)
    taken.clear()
    network(image)
    assert len(taken) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_transforms_and_compilers_see_the_functions_of_torch(taken):
    network, image = unet(), draw(2, 1, 8, 8)
    with torch.no_grad():
        torch.func.vmap(lambda x: network(x[None])[0])(image)
        torch.func.jvp(network, (image,), (image,))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(image, image)
            assert torch.autograd.forward_ad.unpack_dual(network(dual)).tangent is not None
    torch.func.grad(lambda x: network(x).sum())(image)
    torch._dynamo.reset()
    torch.compile(network, fullgraph=True, backend="aot_eager")(image)
    assert not taken


@pytest.mark.skipif(GPU, reason="CPU tensors are what this is about")
def test_where_there_is_no_kernel_the_bits_are_those_of_the_modules(monkeypatch):
    network, image = unet(), draw(2, 1, 9, 12)
    plain = copy.deepcopy(network)
    for name, module in list(plain.named_children()):
        if isinstance(module, nn.Sequential):
            setattr(plain, name, nn.Sequential(OrderedDict(module.named_children())))
    assert plain.state_dict().keys() == network.state_dict().keys()
    expected = gradients(plain, image)
    # A face that the environment names is not there for these: the network does not mind.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in (None, "triton"):
        if name is not None:
            monkeypatch.setenv("ODER_FAST_BACKEND", name)
        for one, other in zip(gradients(network, image), expected, strict=True):
            assert torch.equal(one, other)
    assert bound_lipschitz(network) == pytest.approx(bound_lipschitz(plain))


# ------------------------------------------------------------------ what only a GPU tells


@needs_gpu
@FORMATS
@pytest.mark.parametrize("dtype", Triton.dtypes)
def test_large_features_and_equal_bits(layout, dtype):
    for shape in ((1, 32, 512, 512), (2, 64, 181, 203), (1, 512, 32, 32)):
        image = draw(*shape).to(dtype).contiguous(memory_format=layout)
        weight, bias, slope = draw(shape[1]), draw(shape[1]), draw(1)
        v = draw(*shape, seed=1).to(dtype)

        def run(kind, backend):
            inputs = [t.detach().to(kind or t.dtype).requires_grad_() for t in (image, weight, bias, slope)]
            output = group_norm_prelu(inputs[0], 4, *inputs[1:], backend=backend)
            return output, *torch.autograd.grad(output, inputs, v.to(output.dtype))

        got, again, expected = run(None, "triton"), run(None, "triton"), run(torch.float64, "reference")
        assert all(map(torch.equal, got, again))
        for one, other in zip(got, expected, strict=True):
            assert relative_error(one, other) < 20 * TOLERANCE[dtype]


@needs_gpu
def test_captured_in_a_graph():
    image, slope = draw(2, 8, 33, 20).requires_grad_(), draw(1).requires_grad_()
    v = draw(*image.shape)

    def call():
        output = group_norm_prelu(image, 4, None, None, slope, backend="triton")
        return output, *torch.autograd.grad(output, [image, slope], v)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for value in captured:
        value.detach().fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, captured, expected))


@needs_gpu
@FORMATS
def test_more_numbers_than_32_bits_count(layout):
    """2^31 + 2^17 of them in one image; the last channel and the last row are looked at."""
    shape = (1, 4, 2**15 + 2, 2**14)
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    image = torch.zeros(shape, dtype=torch.bfloat16, device="cuda").contiguous(memory_format=layout)
    image[..., ::2] = 1.0
    image[:, -1] *= 3
    image.requires_grad_()
    slope = torch.full((1,), 0.5, device="cuda")
    output = group_norm_prelu(image, 4, None, None, slope, backend="triton")
    for part in (output[0, 0, 0], output[0, -1, -1], output[0, -1, 0]):
        assert torch.allclose(part[::2].float(), torch.ones((), device="cuda"), atol=1e-2)
        assert torch.allclose(part[1::2].float(), torch.full((), -0.5, device="cuda"), atol=1e-2)
    v = torch.zeros_like(output)
    v[0, -1, -1, -2:] = 1
    (grad,) = torch.autograd.grad(output, image, v)
    assert torch.allclose(
        grad[0, -1, -1, -2:].float(), torch.tensor([2 / 3, 1 / 3], device="cuda"), atol=1e-2
    )
    assert float(grad[0, :-1].abs().max()) == 0
