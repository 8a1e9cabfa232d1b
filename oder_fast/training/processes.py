"""What several processes of one run agree on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn


class LostProcessError(RuntimeError):
    """Another process of the run has ended, or did not answer in time."""


def rank() -> int:
    """Return this process's number; 0 where there is one alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def process_group(device: torch.device, timeout: float) -> Iterator[None]:
    """Join the other processes where ``torchrun`` started this one: NCCL on GPUs, Gloo on CPUs.

    Args:
        device: Of this process.
        timeout: Seconds that processes wait for each other.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield
    finally:
        dist.destroy_process_group()


def pick_device(name: str) -> torch.device:
    """Return the device of this process; ``"auto"`` is the GPU of its local rank, where there is one.

    Raises:
        ValueError: For a device that is not here.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if name == "auto":
        name = f"cuda:{local % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {name!r} is not here: {str(error).splitlines()[0]}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LostProcessError(
            f"rank {rank()} lost contact with another of the {world_size()} ranks: look in their output for the one "
            "that ended or hangs, mend it, and go on with --resume (resume=True)"
        ) from error


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the sum over all processes.

    Raises:
        LostProcessError: Where another one is gone.
    """
    if world_size() > 1:
        with _together():
            dist.all_reduce(values)
    return values


def any_process(flag: bool, device: torch.device) -> bool:
    """Return whether a flag is set in any process.

    Raises:
        LostProcessError: Where another process is gone.
    """
    if world_size() == 1:
        return flag
    return bool(sum_over_processes(torch.tensor(float(flag), device=device)) > 0)


def average_gradients(parameters: Sequence[nn.Parameter], buffers: Iterable[Tensor]) -> None:
    """Replace gradients, and buffers such as running statistics, by their mean over all processes, in one message.

    After the backward pass and not within it, where its adjoint solve may fail in one process and leave the others
    waiting.

    Raises:
        LostProcessError: Where another process is gone.
    """
    if world_size() == 1:
        return
    floats = [b for b in buffers if b.is_floating_point()]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    values = [*gradients, *floats]
    flat = sum_over_processes(torch.cat([v.flatten() for v in values])) / world_size()
    means = flat.split([v.numel() for v in values])
    for parameter, mean in zip(parameters, means[: len(parameters)], strict=True):
        parameter.grad = mean.view_as(parameter).clone()
    for buffer, mean in zip(floats, means[len(parameters) :], strict=True):
        buffer.copy_(mean.view_as(buffer))


def same_everywhere(module: nn.Module) -> None:
    """Give all processes the parameters and buffers of the first one.

    Raises:
        LostProcessError: Where another process is gone.
    """
    if world_size() > 1:
        with _together(), torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor, 0)


def wait_for_all() -> None:
    """Wait until all processes are here.

    Raises:
        LostProcessError: Where another one is gone.
    """
    if world_size() > 1:
        with _together():
            dist.barrier()
