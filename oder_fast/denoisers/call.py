"""A denoiser as a map of images, the same one for the length of a solve."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import Autocast, eager

Channels = Callable[[Tensor], Tensor]


class ImageDenoiser:
    """Call a denoiser on images: real and imaginary parts as channels, in its memory layout and precision.

    Args:
        denoiser: From ``(B, C, H, W)`` to the same, frozen.
        autocast: What it computes in.

    Attributes:
        calls: How often it has been called.
    """

    def __init__(self, denoiser: Channels, autocast: Autocast) -> None:
        self.denoiser = denoiser
        self.autocast = autocast
        self.calls = 0
        self.memory_format = memory_format(denoiser)
        self.rounding = float(torch.finfo(autocast.dtype).eps) if autocast.enabled else 0.0

    @property
    def requires_grad(self) -> bool:
        """Whether a weight needs a gradient; assumed of a mere function."""
        if not isinstance(self.denoiser, nn.Module):
            return True
        tensors = (*self.denoiser.parameters(), *self.denoiser.buffers())
        return any(tensor.requires_grad for tensor in tensors)

    def __call__(self, image: Tensor) -> Tensor:
        """Return the denoised image."""
        self.calls += 1
        channels = as_channels(image)
        if self.memory_format is not None:
            channels = in_layout(channels, self.memory_format)
        if channels.data_ptr() == image.data_ptr():
            # Iterates are not the denoiser's to change in place.
            channels = channels.clone()
        with self.autocast.resume():
            denoised = self.denoiser(channels)
        if not isinstance(denoised, Tensor) or denoised.shape != channels.shape:
            got = tuple(denoised.shape) if isinstance(denoised, Tensor) else type(denoised).__name__
            raise ValueError(
                f"DEQRED: denoiser must return the shape it got, {tuple(channels.shape)}, got {got}"
            )
        return from_channels(denoised.to(channels.dtype), image)

    @contextmanager
    def solving(self) -> Iterator[None]:
        """Forget what autocast has cast once a solve without gradients is over."""
        yield
        if self.autocast.enabled:
            torch.clear_autocast_cache()

    @contextmanager
    def linearizing(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Give the denoiser as it is evaluated for a graph that many products go through."""
        with eager(), self._recomputing():
            yield self

    def _recomputing(self) -> AbstractContextManager[Any]:
        modules = self.denoiser.modules() if isinstance(self.denoiser, nn.Module) else ()
        if not any(getattr(module, "recompute", False) for module in modules):
            return nullcontext()
        # Reaches into torch, and so is not touched unless it is asked for.
        from .rematerialize import Rematerialized

        return Rematerialized()

    def transposed(self, product: Callable[[Tensor], Tensor]) -> Transposed:
        """Return a transposed derivative, given as a product, in this one's place."""
        return Transposed(product, self.rounding)


class Transposed(ImageDenoiser):
    """The transposed derivative of a denoiser at an image."""

    def __init__(self, product: Callable[[Tensor], Tensor], rounding: float) -> None:
        self.product, self.rounding = product, rounding
        self.calls = 0

    @property
    def requires_grad(self) -> bool:
        """Its derivatives are refused."""
        return False

    def __call__(self, image: Tensor) -> Tensor:
        """Return the product."""
        self.calls += 1
        return self.product(image)


def memory_format(denoiser: Any) -> torch.memory_format | None:
    """Return the layout that a network is fastest in on a CPU, None where it does not matter.

    Convolutions run on channels that lie side by side, and torch reorders them for each layer otherwise; group and
    instance normalization are faster the other way.
    """
    if not isinstance(denoiser, nn.Module):
        return None
    modules = list(denoiser.modules())
    if not any(isinstance(module, nn.Conv2d) for module in modules):
        return None
    if any(isinstance(module, (nn.GroupNorm, nn.InstanceNorm2d, nn.LayerNorm)) for module in modules):
        return torch.contiguous_format
    return torch.channels_last


def in_layout(channels: Tensor, layout: torch.memory_format) -> Tensor:
    """Return images in a layout; of one channel, which has both, with the strides that tell convolutions."""
    channels = channels.contiguous(memory_format=layout)
    if channels.shape[1] == 1 and layout is torch.channels_last:
        return channels.permute(0, 2, 3, 1).flatten(2).unsqueeze(-1).permute(0, 3, 1, 2)
    return channels


def as_channels(image: Tensor) -> Tensor:
    """View images ``(B, H, W)`` or ``(B, C, H, W)`` as real ``(B, C', H, W)``."""
    if image.is_complex():
        pairs = torch.view_as_real(image.resolve_conj())
        # (B, H, W, 2) permuted is channels-last: no copy.
        return pairs.permute(0, 3, 1, 2) if image.ndim == 3 else pairs.permute(0, 1, 4, 2, 3).flatten(1, 2)
    return image.unsqueeze(1) if image.ndim == 3 else image


def from_channels(channels: Tensor, like: Tensor) -> Tensor:
    """View what `as_channels` made as images like `like` again."""
    if like.is_complex():
        if like.ndim == 3:
            return torch.view_as_complex(channels.permute(0, 2, 3, 1).contiguous())
        return torch.view_as_complex(
            channels.reshape(like.shape[0], -1, 2, *like.shape[2:]).permute(0, 1, 3, 4, 2).contiguous()
        )
    return channels.squeeze(1) if like.ndim == 3 else channels.contiguous()
