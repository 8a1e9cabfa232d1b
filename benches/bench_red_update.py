"""The RED update: bound by memory, so the yardstick is the rate at which this machine streams.

Bytes: point, gradient and denoised read, the update written: 16 a pixel in float32; with momentum the last
iterate is read and the extrapolated point written: 24.
"""

from __future__ import annotations

import pytest
import torch

import oder_fast
from oder_fast.testing import in_turn, relative_error

SHAPE = (1, 2048, 2048)  # 16 MB


@pytest.mark.parametrize("momentum", [False, True], ids=["plain", "momentum"])
def test_red_update(report, face, one_thread, generator, momentum):
    x, g, d, last, out = (torch.randn(SHAPE, generator=generator) for _ in range(5))
    options = {"previous": last, "momentum": 0.5} if momentum else {}

    buffers = oder_fast.red_update(x, g, d, 0.1, 1.5, **options, backend=face.backend)

    def ours():
        return oder_fast.red_update(x, g, d, 0.1, 1.5, **options, backend=face.backend)

    def into():
        return oder_fast.red_update(x, g, d, 0.1, 1.5, **options, out=buffers, backend=face.backend)

    def eager():
        new = (x - 0.1 * (g + 1.5 * (x - d))).clamp(min=0)
        extrapolated = new + 0.5 * (new - last) if momentum else new
        return new, extrapolated, (new - x).square().sum((1, 2)), new.square().sum((1, 2))

    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    expected = oder_fast.red_update(x.double(), g.double(), d.double(), 0.1, 1.5, **wide, backend="reference")
    error = max(relative_error(a, b) for a, b in zip(ours(), expected, strict=True))
    assert error < 1e-6
    report.benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
    times = in_turn(
        {
            "ours": ours,
            "into": into,
            "eager": eager,
            "copy": lambda: out.copy_(x),
            "add": lambda: torch.add(x, g, out=out),
        },
        seconds=4,
    )
    size = x.numel() * 4
    stream = max(2 * size / times["copy"], 3 * size / times["add"])
    moved = (6 if momentum else 4) * size
    for name, what in (("ours", ""), ("into", ", into memory given")):
        rate = moved / times[name]
        report.add(
            "red_update",
            face.name,
            "1 x 2048x2048" + (", momentum" if momentum else "") + what,
            times[name],
            rate=f"{rate / 1e9:.1f} GB/s",
            peers={"eager PyTorch": times["eager"]},
            note=f"{100 * rate / stream:.0f} % of the rate of a stream ({stream / 1e9:.1f} GB/s)",
            error=error,
        )
