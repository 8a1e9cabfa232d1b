"""Graphs in which cheap layers are computed again: the same derivatives, and less that is kept."""

from __future__ import annotations

import copy
import gc
import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from oder_fast import DEQRED, DnCNN, DRUNet, JacobianFree, ParallelBeamCT, Picard, UNet
from oder_fast.denoisers import rematerialize
from oder_fast.denoisers.rematerialize import Rematerialized


class Dense(nn.Module):
    """Concatenation twice over, and features that change in place before they are used."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(1, 4, 3), nn.Conv2d(5, 4, 3), nn.Conv2d(9, 1, 1)

    def forward(self, x):
        inner = x[..., 1:-1, 1:-1]
        features = torch.cat((inner, F.leaky_relu(self.first(x), 0.2)), 1)
        normed = F.group_norm(self.second(features), 2)
        both = torch.cat((features[..., 1:-1, 1:-1], normed), 1)
        normed.mul_(3)
        return self.last(F.relu(both))


class Checkpointing(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(1, 4, 3), nn.PReLU(), nn.Conv2d(4, 4, 3))
        self.outer = nn.Sequential(nn.GroupNorm(2, 4), nn.PReLU(4), nn.Conv2d(4, 1, 1))

    def forward(self, x):
        return self.outer(checkpoint(self.inner, x, use_reentrant=False))


class Transforming(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.GroupNorm(1, 2), nn.PReLU())

    def forward(self, x):
        energy = torch.func.grad(lambda image: self.conv(image).square().sum())
        return torch.func.vmap(lambda image: self.conv(image[None])[0])(energy(x))


class GradientStep(nn.Module):
    """A denoiser that is a gradient itself."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.PReLU(), nn.Conv2d(4, 2, 3), nn.SiLU()
        )

    def forward(self, x):
        with torch.enable_grad():
            image = x if x.requires_grad else x.detach().requires_grad_()
            (step,) = torch.autograd.grad(self.conv(image).square().sum(), image, create_graph=True)
        return x - 0.1 * step


NETWORKS = {
    "UNet": lambda: UNet((4, 8, 16)),
    "UNet without spectral norms": lambda: UNet((4, 8), spectral_norm=False),
    "DnCNN": lambda: DnCNN(4, 8),
    "DRUNet": lambda: DRUNet((4, 8), blocks=2),
    "dense": Dense,
    "strides": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1),
        nn.GroupNorm(2, 4, affine=False),
        nn.LeakyReLU(0.1),
        nn.Conv2d(4, 6, (3, 2), stride=(1, 3), dilation=2, groups=2, bias=False),
        nn.PReLU(6),
        nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, groups=2),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(4, 2, 2, dilation=3, stride=2, output_padding=2),
    ),
    "pooling": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3, padding="same", padding_mode="circular"),
        nn.GroupNorm(4, 4),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, padding=1, ceil_mode=True),
        nn.Conv2d(4, 1, 3, padding="same"),
        nn.MaxPool2d((2, 1)),
        nn.Upsample(scale_factor=2),
    ),
    "checkpointing": Checkpointing,
    "transforming": Transforming,
    "gradient step": GradientStep,
}


def make(name):
    torch.manual_seed(0)
    return NETWORKS[name]().double().eval()


def evaluate(network, image, rematerialized):
    leaf = image.clone().requires_grad_()
    if not rematerialized:
        return leaf, network(leaf)
    with Rematerialized():
        return leaf, network(leaf)


def derivatives(network, image, rematerialized):
    leaf, output = evaluate(network, image, rematerialized)
    v = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).reshape(output.shape).cos()
    (alone,) = torch.autograd.grad(output, leaf, v, retain_graph=True)
    inputs = [leaf, *network.parameters()]
    first = torch.autograd.grad(output, inputs, v, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs, allow_unused=True)
    return [
        output,
        alone,
        *first,
        *(torch.zeros_like(i) if s is None else s for i, s in zip(inputs, second, strict=True)),
    ]


def assert_same(plain, ours):
    # Some gradients are 0 but for what rounding makes of the others.
    largest = [max(float(t.detach().abs().max()) for t in part) for part in (plain[:2], plain[2:])]
    for k, (a, b) in enumerate(zip(plain, ours, strict=True)):
        torch.testing.assert_close(b, a, rtol=1e-11, atol=1e-11 * largest[k >= 2])


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_derivatives_are_those_of_the_plain_graph(name, layout):
    network = make(name).to(memory_format=layout)
    image = torch.randn(2, 1, 16, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert_same(*(derivatives(network, image, flag) for flag in (False, True)))


@pytest.mark.parametrize("dimensions", [1, 3])
def test_other_dimensions(dimensions):
    conv, transposed = (getattr(nn, f"{kind}{dimensions}d") for kind in ("Conv", "ConvTranspose"))
    network = nn.Sequential(
        conv(1, 4, 3, stride=2), nn.GroupNorm(2, 4), nn.PReLU(4), transposed(4, 1, 3, stride=2)
    ).double()
    image = torch.randn(2, 1, *[7] * dimensions, dtype=torch.float64)
    assert_same(*(derivatives(network, image, flag) for flag in (False, True)))


def test_under_autocast():
    network = make("UNet").float()
    image = torch.randn(2, 1, 16, 20)

    def gradients(rematerialized):
        with torch.autocast("cpu", torch.bfloat16):
            leaf, output = evaluate(network, image, rematerialized)
        v = torch.ones_like(output)
        alone = torch.autograd.grad(output, leaf, v, retain_graph=True)
        return output.dtype, [*alone, *torch.autograd.grad(output, [leaf, *network.parameters()], v)]

    (dtype, plain), (ours_dtype, ours) = gradients(False), gradients(True)
    assert dtype == ours_dtype
    for a, b in zip(plain, ours, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() <= 0.03 * a.norm() + 1e-6


def kept_bytes(network, output):
    """Bytes that the graph keeps beyond the weights."""
    kept, seen, stack = {}, set(), [output.grad_fn]
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack.extend(following for following, _ in node.next_functions)
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        for tensor in (*saved, *getattr(node, "saved_tensors", ())):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                kept[storage.data_ptr()] = storage.nbytes()
    return sum(n for pointer, n in kept.items() if pointer not in weights)


@pytest.mark.parametrize(
    ("name", "share"), [("UNet without spectral norms", 0.5), ("DnCNN", 1.0), ("DRUNet", 1.0)]
)
def test_less_is_kept(name, share):
    network = make(name)
    image = torch.randn(1, 1, 64, 64, dtype=torch.float64)
    plain, ours = (kept_bytes(network, evaluate(network, image, flag)[1]) for flag in (False, True))
    assert 0 < ours <= share * plain


def test_nothing_is_computed_again_for_a_vjp_in_the_image(monkeypatch):
    network = make("UNet")
    computed = []
    real = rematerialize._compute
    leaf, output = evaluate(network, torch.randn(1, 1, 16, 16, dtype=torch.float64), True)
    monkeypatch.setattr(rematerialize, "_compute", lambda *a: computed.append(1) or real(*a))
    torch.autograd.grad(output, leaf, torch.ones_like(output), retain_graph=True)
    assert not computed
    output.sum().backward()
    assert computed


def test_the_graph_is_freed_with_its_output(monkeypatch):
    layers = []
    real = rematerialize._apply
    monkeypatch.setattr(
        rematerialize, "_apply", lambda layer, *a: layers.append(weakref.ref(layer)) or real(layer, *a)
    )
    gc.disable()
    try:
        leaf, output = evaluate(make("UNet"), torch.randn(1, 1, 16, 16, dtype=torch.float64), True)
        output.sum().backward()
        assert any(layer() is not None for layer in layers)
        del leaf, output
        assert not any(layer() is not None for layer in layers)
    finally:
        gc.enable()


# ------------------------------------------------------------------ what the plain graph allows


class Recurrent(nn.Module):
    """Parts of a concatenation change in place after it, from its own consumer too."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = (
            nn.Conv2d(1, 4, 1),
            nn.Conv2d(5, 4, 3, padding=1),
            nn.Conv2d(4, 1, 1),
        )

    def forward(self, x):
        features = self.first(x)
        for _ in range(3):
            features += 0.1 * torch.tanh(self.inner(torch.cat((features, x), 1)))
        return self.last(F.relu(features, inplace=True))


class NoiseMap(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1)
        self.map = None

    def forward(self, x):
        if self.map is None:
            self.map = torch.full_like(x, 0.1)
        if not self.map.is_inference():
            self.map.fill_(0.1)
        return x - self.conv(torch.cat((x, self.map), axis=1)).tanh()


def gradients(network, image, rematerialized, after=lambda: None):
    leaf, output = evaluate(network, image, rematerialized)
    after()
    return torch.autograd.grad(output.sum(), [leaf, *(p for p in network.parameters() if p.requires_grad)])


IMAGE = torch.randn(1, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def assert_allowed(network, **options):
    for a, b in zip(
        *(gradients(network.double(), IMAGE, flag, **options) for flag in (False, True)), strict=True
    ):
        torch.testing.assert_close(b, a, rtol=1e-11, atol=1e-12)


def test_parts_of_a_concatenation_may_change():
    assert_allowed(Recurrent())
    network = NoiseMap()
    assert_allowed(network, after=lambda: network.map.zero_())


def test_constants_made_in_inference_mode():
    network = NoiseMap().double()
    with torch.inference_mode():
        network(IMAGE)
    assert network.map.is_inference()
    assert_allowed(network)


def test_the_graph_of_a_concatenation_that_its_consumer_changes_is_freed(monkeypatch):
    layers = []
    real = rematerialize._apply
    monkeypatch.setattr(
        rematerialize, "_apply", lambda layer, *a: layers.append(weakref.ref(layer)) or real(layer, *a)
    )
    evaluate(Recurrent().double(), IMAGE, True)
    assert layers
    assert not any(layer() is not None for layer in layers)


def test_infinite_gradients_stop_at_a_relu():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU())
    network.forward = lambda x: nn.Sequential.forward(network, x).sqrt()
    found = gradients(network.double(), IMAGE, True)
    assert all(bool(g.isfinite().all()) for g in found)
    assert_allowed(network)


@pytest.mark.parametrize("slope", [1e8, -2.0, 0.3])
def test_any_slope(slope):
    conv = nn.Conv2d(1, 4, 3)
    assert_allowed(nn.Sequential(conv, nn.GroupNorm(2, 4), nn.LeakyReLU(slope)))
    prelu = nn.PReLU(4, init=slope)
    assert_allowed(nn.Sequential(conv, nn.GroupNorm(2, 4), prelu, nn.Conv2d(4, 1, 1), nn.PReLU(init=slope)))


def test_biases_alone_are_trained_and_changed():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 1, 1))
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.endswith("3.bias"))

    def change():
        with torch.no_grad():
            network[3].bias.add_(1)

    assert_allowed(network, after=change)


def test_a_function_mode_of_the_user():
    class Halved(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.conv2d:
                args = (args[0], args[1] * 0.5, *args[2:])
            return func(*args, **(kwargs or {}))

    network = nn.Conv2d(1, 1, 3).double()
    with Halved():
        assert_allowed(network)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: F.conv2d(input=x, weight=w, stride=np.int64(1), padding=np.int64(1)),
        lambda x, w: torch.conv2d(x, w, None, [1, 1], (1,)),
        lambda x, w: F.max_pool2d(F.conv2d(x, w), np.int64(2)),
        lambda x, w: F.conv2d(x[:, :0], w[:, :0], padding=1) + x,
        lambda x, w: F.conv2d(torch.concat([x, x], axis=-1), w),
        lambda x, w: F.leaky_relu(F.group_norm(input=F.conv2d(x, w), num_groups=1), 0.2, False),
        lambda x, w: F.max_pool2d(F.conv2d(x, w), 5, 1, 2),
    ],
)
def test_arguments_in_any_form(call):
    weight = torch.randn(1, 1, 3, 3, dtype=torch.float64)
    found = []
    for rematerialized in (False, True):
        leaf, w = IMAGE.clone().requires_grad_(), weight.clone().requires_grad_()
        with Rematerialized() if rematerialized else nullcontext():
            output = call(leaf, w)
        found += torch.autograd.grad(output.sum(), [leaf, w])
    torch.testing.assert_close(found[2:], found[:2])


def test_errors_are_those_of_the_function():
    with Rematerialized(), pytest.raises(RuntimeError, match="expected stride to be"):
        torch.conv2d(torch.ones(1, 1, 5, 5, requires_grad=True), torch.ones(1, 1, 3, 3), None, (1, 1, 1))


def test_several_gradients_at_once():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.PReLU(), nn.Conv2d(4, 1, 1)).double()
    leaf, output = evaluate(network, IMAGE, True)
    v = torch.randn(3, *output.shape, dtype=torch.float64)
    (together,) = torch.autograd.grad(output, leaf, v, is_grads_batched=True, retain_graph=True)
    for one, each in zip(together, v, strict=True):
        torch.testing.assert_close(one, torch.autograd.grad(output, leaf, each, retain_graph=True)[0])


def test_a_solve_computes_again_where_the_network_asks_for_it(monkeypatch):
    entered = []
    monkeypatch.setattr(
        rematerialize.Rematerialized,
        "__enter__",
        lambda self, enter=rematerialize.Rematerialized.__enter__: entered.append(1) or enter(self),
    )
    ct = ParallelBeamCT(16, 8)
    y = ct(torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0)))
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        network = UNet((4, 8), recompute=recompute)
        assert copy.deepcopy(network).recompute is recompute
        # Inside another module, too.
        model = DEQRED(
            nn.Sequential(network),
            tau=0.01,
            solver=Picard(3),
            differentiation=JacobianFree(),
            on_failure="ignore",
        )
        model(y, ct).square().sum().backward()
        found.append([p.grad for p in network.parameters()])
        assert bool(entered) is recompute
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
