"""Turn the JSON of `pytest --benchmark --benchmark-json RAW` into a record to commit, and all records into
docs/performance.md.

Usage: python benches/tables.py RAW benches/results/NAME.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

START, END = "<!-- measured -->", "<!-- end of measured -->"


def record(raw: dict) -> dict:
    """Keep the machine, the versions and the rows."""
    extra = [b["extra_info"] for b in raw["benchmarks"] if "rows" in b["extra_info"]]
    machine = raw["machine_info"]
    cpu = f"{machine['cpu'].get('brand_raw', machine['machine'])}, {machine['cpu'].get('count')} cores"
    return {
        "machine": ", ".join([*{e["gpu"] for e in extra if "gpu" in e}, cpu]),
        "system": f"{machine['system']} {machine['machine']}, Python {machine['python_version']}",
        "date": raw["datetime"][:10],
        "versions": extra[0]["versions"],
        "build": extra[0]["build"],
        "rows": [row for e in extra for row in e["rows"]],
    }


def table(data: dict) -> str:
    """Write the rows as a Markdown table."""
    lines = [
        f"{data['machine']}; torch {data['versions']['torch']}; {data['date']}. Medians; peers timed in turn in "
        "the same run, after the results were found equal.",
        "",
        "| operator | backend | case | ms | rate | times as fast as | note |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        ratio = ", ".join(f"{name} {value:g}x" for name, value in row["ratio"].items())
        time = "" if row["ms"] is None else f"{row['ms']:.3g}"
        lines.append(
            f"| `{row['op']}` | {row['backend']} | {row['shape']} | {time} | {row['rate']} | {ratio} | {row['note']} |"
        )
    return "\n".join(lines)


def main() -> None:
    raw, target = map(Path, sys.argv[1:3])
    data = record(json.loads(raw.read_text()))
    target.write_text(json.dumps(data, indent=1) + "\n")
    root = Path(__file__).resolve().parents[1]
    results = [json.loads(path.read_text()) for path in sorted((root / "benches" / "results").glob("*.json"))]
    page = root / "docs" / "performance.md"
    before, rest = page.read_text().split(START)
    after = rest.split(END)[1]
    tables = "\n\n".join(map(table, results))
    page.write_text(f"{before}{START}\n{tables}\n{END}{after}")


if __name__ == "__main__":
    main()
