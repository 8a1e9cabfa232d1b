"""What an experiment tells: rows for a table, claims that hold or do not, and one figure."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.files import atomic


@dataclass(frozen=True)
class Claim:
    """A number that the experiment measured, and the range in which it was expected.

    Attributes:
        text: What is claimed.
        value: As measured.
        low: Least value with which it holds.
        high: Largest value with which it holds.
    """

    text: str
    value: float
    low: float = float("-inf")
    high: float = float("inf")

    @property
    def holds(self) -> bool:
        """Whether the value lies in the range; NaN does not."""
        return self.low <= self.value <= self.high

    def __str__(self) -> str:
        """Return the line that is printed."""
        ends = [f"at least {self.low:.4g}"] * (self.low > float("-inf"))
        ends += [f"at most {self.high:.4g}"] * (self.high < float("inf"))
        return f"{'PASS' if self.holds else 'FAIL'}  {self.text}: {self.value:.4g} ({' and '.join(ends)})"


@dataclass(frozen=True)
class Report:
    """The result of an experiment.

    Attributes:
        name: Of its files.
        rows: Of the table, each with the same columns.
        claims: In the order in which they are printed.
        figure: A `matplotlib` figure.
        remarks: Sentences on what the numbers mean.
    """

    name: str
    rows: Sequence[Mapping[str, Any]]
    claims: Sequence[Claim]
    figure: Any
    remarks: Sequence[str] = ()

    def write(self, folder: Path) -> list[Path]:
        """Write ``NAME.csv``, ``NAME.png`` and ``NAME.txt``, each whole or not at all.

        Args:
            folder: Made where it does not exist.

        Returns:
            The files.

        Raises:
            OSError: Where it cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        table, figure, text = (folder / f"{self.name}.{suffix}" for suffix in ("csv", "png", "txt"))
        with atomic(table) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(self.rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        with atomic(figure) as temporary:
            self.figure.savefig(temporary, dpi=120, format="png")
        with atomic(text) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in self.lines()))
        return [table, figure, text]

    def lines(self) -> list[str]:
        """Return a line for each claim, and the remarks."""
        return [*map(str, self.claims), *self.remarks]


def power_law(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return the exponent of the power law through points, by least squares of the logarithms."""
    x, y = (np.log(np.asarray(numbers, dtype=np.float64)) for numbers in (sizes, values))
    return float(np.polynomial.Polynomial.fit(x, y, 1).convert().coef[1])
