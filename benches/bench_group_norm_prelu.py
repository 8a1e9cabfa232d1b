"""GroupNorm and PReLU of a U-Net, one operator against torch's two modules: bound by memory, so bytes are what counts.

Only on a GPU: on CPUs the operator is torch's own. A channels-last image is what convolutions like best, and what torch's
GroupNorm on CUDA copies to contiguous memory and leaves there, so that the next convolution copies it back; that copy is
counted with the modules, as a network pays for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from gpu import Work, add_row, machine, needs_gpu, rotated, time_in_turn
from oder_fast.ops import group_norm_prelu
from oder_fast.testing import TOLERANCE, relative_error

GROUPS = 4
# The first level of the official U-Net at the paper's CT setting, and the second of a batch.
SHAPES = ((1, 32, 512, 512), (8, 64, 256, 256))
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


def forward_work(numbers: int, l2: int) -> list[Work]:
    """_group_norm_moments_kernel and _group_norm_prelu_kernel; what merges the statistics takes a few thousand numbers.

    The image is read for its statistics, read again and written: 12 bytes a number in float32, 8 where the L2 cache holds it
    from the first to the second kernel.

    | at | image | through memory | floor on an H200 |
    |---|---|---|---|
    | 1 x 32 x 512 x 512 | 34 MB, held | 67 MB | 15.6 us |
    | 8 x 64 x 256 x 256 | 134 MB | 403 MB | 93.6 us |

    About 8 operations a number for the statistics and 7 for the rest: a tenth of the time. Torch's two modules read and write
    3 and 2 times; channels last 2 more before them and 2 after, 36 bytes a number: a count, no measurement.
    """
    size = 4.0 * numbers
    again = size if size > l2 else 0.0
    return [Work(size, 8.0 * numbers), Work(size + again, 7.0 * numbers)]


def backward_work(numbers: int, l2: int) -> list[Work]:
    """_group_norm_sums_kernel and _group_norm_gradient_kernel, for the gradients of the image and of the parameters.

    Image and gradient are read for the sums, read again, and the gradient of the image is written: 20 bytes a number in
    float32, 12 where the L2 cache holds both. On an H200 39.0 us for 1 x 32 x 512 x 512, whose two images of 34 MB exceed the
    cache, and 156 us for 8 x 64 x 256 x 256.
    """
    size = 8.0 * numbers
    again = size if size > l2 else 0.0
    return [Work(size, 12.0 * numbers), Work(size / 2 + again, 14.0 * numbers)]


@dataclass
class Layer:
    """Features, the gradient that comes back, and the two modules."""

    image: Tensor
    gradient: Tensor
    norm: nn.GroupNorm
    activation: nn.PReLU

    def forward(self, backend: str | None) -> Tensor:
        """Return features in the format of the image, by a face or, with None, by the modules."""
        if backend is None:
            output: Tensor = self.activation(self.norm(self.image))
            return output.contiguous(memory_format=self.layout)
        parameters = self.norm.weight, self.norm.bias, self.activation.weight
        return group_norm_prelu(self.image, GROUPS, *parameters, backend=backend)

    def step(self, backend: str | None) -> list[Tensor]:
        """Return the features and all gradients."""
        inputs = [self.image, *self.norm.parameters(), *self.activation.parameters()]
        output = self.forward(backend)
        first, *others = torch.autograd.grad(output, inputs, self.gradient)
        return [output, first.contiguous(memory_format=self.layout), *others]

    @property
    def layout(self) -> torch.memory_format:
        return torch.contiguous_format if self.image.is_contiguous() else torch.channels_last


def on_gpu(shape: tuple[int, ...], layout: torch.memory_format) -> Layer:
    """Return a layer with weights of its own."""
    torch.manual_seed(0)
    image, gradient = (torch.randn(shape, device="cuda").contiguous(memory_format=layout) for _ in range(2))
    norm, activation = nn.GroupNorm(GROUPS, shape[1]).cuda(), nn.PReLU().cuda()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return Layer(image.requires_grad_(), gradient, norm, activation)


def wide(layer: Layer) -> Layer:
    """Return the layer in float64."""
    modules = (nn.GroupNorm(GROUPS, layer.image.shape[1]), nn.PReLU())
    for module, other in zip(modules, (layer.norm, layer.activation), strict=True):
        module.load_state_dict(other.state_dict())
        module.to("cuda", torch.float64)
    return Layer(layer.image.detach().double().requires_grad_(), layer.gradient.double(), *modules)


@needs_gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gpu_group_norm_prelu(report, shape, layout):
    layer = on_gpu(shape, LAYOUTS[layout])
    expected = wide(layer).step("reference")
    errors = {
        name: max(relative_error(a, b) for a, b in zip(layer.step(name), expected, strict=True))
        for name in ("triton", None)
    }
    assert errors["triton"] < 20 * TOLERANCE[torch.float32], errors
    report.benchmark.pedantic(lambda: None)
    numbers, l2 = layer.image.numel(), machine().l2
    name = f"{' x '.join(map(str, shape))}, {layout}"
    sets = rotated(layer, 4.0 * numbers)

    def forward(backend):
        def call(k):
            with torch.no_grad():
                return sets[k].forward(backend)

        return call

    ours = {"triton": forward("triton"), "call by call": forward("triton"), "torch": forward(None)}
    times = time_in_turn(ours, len(sets), eager=["call by call"])
    add_row(
        report, "group_norm_prelu", name, times, forward_work(numbers, l2), errors["triton"], face="triton"
    )
    both = {
        "triton": lambda k: sets[k].step("triton"),
        "torch": lambda k: sets[k].step(None),
    }
    times = time_in_turn(both, len(sets))
    work = [*forward_work(numbers, l2), *backward_work(numbers, l2)]
    add_row(
        report,
        "group_norm_prelu",
        f"{name}, with all gradients",
        times,
        work,
        errors["triton"],
        face="triton",
    )
