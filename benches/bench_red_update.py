"""The RED update: bound by memory, so the yardstick is the rate at which this machine streams.

Bytes: point, gradient and denoised read, the update written: 16 a pixel in float32; with momentum the last
iterate is read and the extrapolated point written: 24.
"""

from __future__ import annotations

import pytest
import torch
from cases import TOLERANCE, in_turn, relative_error

import oder_fast
from gpu import Work, add_row, copy_rate, machine, matmul_rate, needs_gpu, rotated, time_in_turn

SHAPE = (1, 2048, 2048)  # 16 MB


@pytest.mark.parametrize("momentum", [False, True], ids=["plain", "momentum"])
def test_red_update(report, build, one_thread, generator, momentum):
    x, g, d, last, out = (torch.randn(SHAPE, generator=generator) for _ in range(5))
    options = {"previous": last, "momentum": 0.5} if momentum else {}

    def ours():
        return oder_fast.ops.red_update(x, g, d, 0.1, 1.5, **options, backend=build.backend)

    def eager():
        new = (x - 0.1 * (g + 1.5 * (x - d))).clamp(min=0)
        extrapolated = new + 0.5 * (new - last) if momentum else new
        return new, extrapolated, (new - x).square().sum((1, 2)), new.square().sum((1, 2))

    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    expected = oder_fast.ops.red_update(
        x.double(), g.double(), d.double(), 0.1, 1.5, **wide, backend="reference"
    )
    error = max(relative_error(a, b) for a, b in zip(ours(), expected, strict=True))
    assert error < 1e-6
    report.benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
    times = in_turn(
        {
            "ours": ours,
            "eager": eager,
            "copy": lambda: out.copy_(x),
            "add": lambda: torch.add(x, g, out=out),
        },
        seconds=4,
    )
    size = x.numel() * 4
    stream = max(2 * size / times["copy"], 3 * size / times["add"])
    moved = (6 if momentum else 4) * size
    rate = moved / times["ours"]
    report.add(
        "red_update",
        build.name,
        "1 x 2048x2048" + (", momentum" if momentum else ""),
        times["ours"],
        rate=f"{rate / 1e9:.1f} GB/s",
        peers={"eager PyTorch": times["eager"]},
        note=f"{100 * rate / stream:.0f} % of the rate of a stream ({stream / 1e9:.1f} GB/s)",
        error=error,
    )


# ------------------------------------------------------------------ on a GPU

SHAPES = ((1, 512, 512), (8, 512, 512), (64, 1024, 1024))


def update_work(pixels: int, momentum: bool) -> list[Work]:
    """red_update_kernel; red_finish_kernel after it adds up a few partial sums.

    With momentum four images are read and two written, 24 bytes a pixel in float32 for 18 operations; without, 16 bytes
    for 10. On an H200 with momentum: 1.5 us for 512 x 512, 11.7 us for 8 of them, 375 us for 64 x 1024 x 1024. Memory
    binds: arithmetic takes a twentieth of it. Hence one pass for step, momentum, projection and norms, 16 bytes an
    access, and nothing through shared memory but the sums of a block. The smallest is launches more than anything.
    """
    return [Work((24.0 if momentum else 16.0) * pixels, (18.0 if momentum else 10.0) * pixels)]


@needs_gpu
def test_gpu_ceilings(report):
    """What the shares of floors are relative to, measured in the same run."""
    report.benchmark.pedantic(lambda: None)
    report.add(
        "copy", "torch", "2 GiB", None, rate=f"{copy_rate() / 1e12:.2f} TB/s", note=f"floors take {machine()}"
    )
    report.add("float32 product", "torch", "8192 x 8192", None, rate=f"{matmul_rate() / 1e12:.1f} TFLOP/s")


@needs_gpu
@pytest.mark.parametrize("momentum", [False, True], ids=["plain", "momentum"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gpu_red_update(report, shape, momentum):
    torch.manual_seed(0)
    step_size, tau = (torch.tensor(v, dtype=torch.float64, device="cuda") for v in (0.1, 1.5))
    weights = torch.full(shape[:1], 0.5, dtype=torch.float64, device="cuda")
    work = update_work(torch.Size(shape).numel(), momentum)
    sets = rotated(tuple(torch.randn(4, *shape, device="cuda")), work[0].bytes)

    def call(k, backend, kind=torch.float32):
        x, g, d, last = (v.to(kind) for v in sets[k])
        options = {"previous": last, "momentum": weights} if momentum else {}
        return oder_fast.ops.red_update(x, g, d, step_size, tau, **options, nonnegative=True, backend=backend)

    def eager(k):
        x, g, d, last = sets[k]
        new = (x - step_size * (g + tau * (x - d))).clamp(min=0)
        extrapolated = new + 0.5 * (new - last) if momentum else new
        return new, extrapolated, (new - x).square().sum((1, 2)), new.square().sum((1, 2))

    ours = {backend: lambda k, backend=backend: call(k, backend) for backend in ("cuda", "triton")}
    expected = call(0, "reference", torch.float64)
    errors = {
        name: max(relative_error(a, b) for a, b in zip(run(0), expected, strict=True))
        for name, run in ours.items()
    }
    assert max(errors.values()) < TOLERANCE[torch.float32], errors
    report.benchmark.pedantic(lambda: None)
    candidates = ours | {"call by call": ours["cuda"], "torch": eager}
    times = time_in_turn(candidates, len(sets), eager=["call by call"])
    name = " x ".join(map(str, shape)) + (", momentum" if momentum else "")
    add_row(report, "red_update", name, times, work, errors["cuda"])
