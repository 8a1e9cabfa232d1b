"""Graphs in which cheap layers are computed again: the same derivatives, and less that is kept."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from oder_fast import DnCNN, DRUNet, UNet
from oder_fast.denoisers import Rematerialized, rematerialize


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


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_derivatives_are_those_of_the_plain_graph(name, layout):
    network = make(name).to(memory_format=layout)
    image = torch.randn(2, 1, 16, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain, ours = (derivatives(network, image, flag) for flag in (False, True))
    for a, b in zip(plain, ours, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-11, atol=1e-11 * float(a.detach().abs().max()))


@pytest.mark.parametrize("dimensions", [1, 3])
def test_other_dimensions(dimensions):
    conv, transposed = (getattr(nn, f"{kind}{dimensions}d") for kind in ("Conv", "ConvTranspose"))
    network = nn.Sequential(
        conv(1, 4, 3, stride=2), nn.GroupNorm(2, 4), nn.PReLU(4), transposed(4, 1, 3, stride=2)
    ).double()
    image = torch.randn(2, 1, *[7] * dimensions, dtype=torch.float64)
    for a, b in zip(*(derivatives(network, image, flag) for flag in (False, True)), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-11, atol=1e-11 * float(a.detach().abs().max()))


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


def test_features_changed_in_place_after_their_use_are_found():
    conv = nn.Conv2d(2, 1, 1)
    leaf = torch.randn(1, 1, 4, 4, requires_grad=True)
    with Rematerialized():
        half = leaf * 2
        output = conv(torch.cat((half, half), 1))
        half.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
