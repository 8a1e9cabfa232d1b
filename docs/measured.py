"""Make tables of the records in benches/results, for pages of the site: ``python docs/measured.py`` prints them.

A page says ``<!-- table: NAME -->`` on a line of its own, where NAME is a file of benches/results:

- a JSON record, which ``benches/tables.py`` makes of a run of ``pytest --benchmark``; ``NAME of OPERATOR`` shows the
  rows whose operator begins so;
- a CSV file, whose first row names the columns.
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "benches" / "results"
MARK = re.compile(r"^<!-- table: (\S+)(?: of (.+))? -->$", re.MULTILINE)


def rows(header: list[str], cells: list[list[str]]) -> str:
    """Write a Markdown table."""
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in cells)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def of_record(data: dict[str, Any], operator: str = "") -> str:
    """Write a JSON record as a line on where it is from, and a table without columns that are empty."""
    said = [data["machine"]]
    if "processor" in data:
        said[0] += f" ({data['processor']})"
    said.append(", ".join(f"{name} {version}" for name, version in data["versions"].items()))
    if data.get("load"):
        least, most = data["load"]
        said.append(f"load {least:g} to {most:g}")
    said.append(data["date"])
    how = data.get("note") or (
        "Medians; peers timed in turn in the same run, after the results were found equal."
    )
    cells = [
        [
            f"`{row['op']}`",
            row["backend"],
            row["shape"],
            "" if row["ms"] is None else f"{row['ms']:.3g}",
            row["rate"],
            ", ".join(f"{name} {value:g}x" for name, value in row["ratio"].items()),
            row["note"],
        ]
        for row in data["rows"]
        if row["op"].startswith(operator)
    ]
    if not cells:
        raise ValueError(f"the record has no row of {operator}")
    names = ["operator", "backend", "case", "ms", "rate", "times as fast as", "note"]
    columns = [column for column in zip(names, *cells, strict=True) if any(column[1:])]
    header, *cells = map(list, zip(*columns, strict=True))
    return f"{'; '.join(said)}. {how}\n\n{rows(header, cells)}"


def of_csv(text: str) -> str:
    """Write a CSV file as a table, numbers to three digits."""

    def short(cell: str) -> str:
        try:
            return cell if float(cell).is_integer() else f"{float(cell):.3g}"
        except ValueError:
            return cell

    header, *cells = csv.reader(text.splitlines())
    return rows(header, [[short(cell) for cell in row] for row in cells])


def table(name: str, operator: str = "") -> str:
    """Return the table of a file of benches/results."""
    text = (RESULTS / name).read_text()
    return of_record(json.loads(text), operator) if name.endswith(".json") else of_csv(text)


def records_of(page: str) -> list[Path]:
    """Return the files that a page shows tables of."""
    return [RESULTS / mark[1] for mark in MARK.finditer(page)]


def put_tables(page: str) -> str:
    """Put the tables into the source of a page, in the place of their marks."""
    return MARK.sub(lambda mark: table(mark[1], mark[2] or ""), page)


if __name__ == "__main__":
    for path in sorted(path for path in RESULTS.iterdir() if path.suffix in (".json", ".csv")):
        print(f"{path.name}\n\n{table(path.name)}\n")
