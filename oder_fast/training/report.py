"""The final report of a run: one HTML file with curves, tables and pictures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data import atomic
from ..viz import new_figure
from .logs import SOLVED

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:left}"
    "img{max-width:100%}pre{background:#f5f5f5;padding:1em;overflow:auto}"
)
STAGES = ("pre-training", "training through the fixed point")


def write_report(
    path: Path,
    *,
    summary: Mapping[str, str],
    training: Sequence[Mapping[str, float]],
    validation: Sequence[Mapping[str, float]],
    picture: Path | None,
    configuration: str,
) -> None:
    """Write the report.

    Args:
        path: HTML file.
        summary: What came out, by name.
        training: Rows of ``training.csv``.
        validation: Rows of ``validation.csv``.
        picture: PNG of the last validation.
        configuration: As text.
    """
    parts = ["<h1>Training through a fixed point</h1>", _table([("", ""), *summary.items()])]
    for stage, name in enumerate(STAGES):
        # Batches that were left out have no loss.
        rows = [row for row in training if row["stage"] == stage and "loss" in row]
        seen = [row for row in validation if row["stage"] == stage]
        if rows:
            parts += [f"<h2>{name.capitalize()}</h2>", _image(_curves(rows, seen))]
        if seen:
            header = (
                "step",
                "loss",
                "PSNR (dB)",
                "SSIM",
                "PSNR of the start",
                "SSIM of the start",
                "iterations",
                "denoiser calls",
                "operator calls",
                "converged",
            )
            keys = ("step", "loss", "psnr", "ssim", "psnr_start", "ssim_start", *SOLVED)
            parts.append(_table([header, *[tuple(_number(row.get(k)) for k in keys) for row in seen]]))
    if picture is not None and picture.exists():
        parts += ["<h2>Images</h2>", _image(picture.read_bytes())]
    parts += ["<h2>Configuration</h2>", f"<pre>{html.escape(configuration)}</pre>"]
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>oder-fast train</title>'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )
    with atomic(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _table(rows: Sequence[tuple[Any, ...]]) -> str:
    header, *body = rows
    cells = "".join(f"<th>{html.escape(str(c))}</th>" for c in header)
    lines = ["<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in body]
    return f"<table><tr>{cells}</tr>{''.join(lines)}</table>"


def _image(png: bytes) -> str:
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _curves(training: Sequence[Mapping[str, float]], validation: Sequence[Mapping[str, float]]) -> bytes:
    """Draw loss, quality and the solver's work along the steps."""
    solved = [row for row in training if "denoiser_calls" in row]
    figure = new_figure(14, 3.6)
    loss, quality, work = figure.subplots(1, 3)
    steps, losses = [row["step"] for row in training], [row["loss"] for row in training]
    loss.semilogy(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="each step")
    loss.semilogy(steps, _smooth(losses), color="tab:blue", label="mean of the last steps")
    at = [row["step"] for row in validation]
    if validation:
        loss.semilogy(at, [row["loss"] for row in validation], "o-", color="tab:orange", label="validation")
        quality.plot(at, [row["psnr"] for row in validation], "o-", label="reconstruction")
        quality.plot(at, [row["psnr_start"] for row in validation], "o:", color="gray", label="start")
        quality.legend()
    loss.set(title="Loss", xlabel="step")
    loss.legend()
    quality.set(title="PSNR of the validation images (dB)", xlabel="step")
    if solved:
        where = [row["step"] for row in solved]
        for key, name in (
            ("denoiser_calls", "denoiser"),
            ("operator_calls", "operator"),
            ("adjoint_denoiser_calls", "denoiser, adjoint"),
            ("adjoint_operator_calls", "operator, adjoint"),
        ):
            if key in solved[0]:
                work.plot(where, [row[key] for row in solved], label=name)
        work.set(title="Calls in a solve", xlabel="step", ylim=(0, None))
        work.legend()
    else:
        work.plot(steps, [row["gradient_norm"] for row in training])
        work.set(title="Norm of the gradient", xlabel="step")
    for axis in (loss, quality, work):
        axis.grid(alpha=0.3)
    file = io.BytesIO()
    figure.savefig(file, dpi=90, format="png")
    return file.getvalue()


def _smooth(values: Sequence[float]) -> list[float]:
    """Return means over the last fiftieth of the run."""
    width = max(1, len(values) // 50)
    total, result = 0.0, []
    for k, value in enumerate(values):
        total += value - (values[k - width] if k >= width else 0.0)
        result.append(max(total, 0.0) / min(k + 1, width))
    return result
