"""Turn the JSON of `pytest --benchmark --benchmark-json RAW` into a record to commit; the site makes its tables of records.

Usage: python benches/tables.py [--counts] RAW [RAW ...] benches/results/NAME.json

--counts leaves out all times, rates and ratios, and so rows without a note: of a machine that had other work to do.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def record(*runs: dict) -> dict:
    """Keep the machine, the versions and the rows of runs on one machine."""
    extra = [b["extra_info"] for raw in runs for b in raw["benchmarks"] if "rows" in b["extra_info"]]
    machine = runs[0]["machine_info"]
    cpu = machine["cpu"]
    kind = {name: cpu[name] for name in ("family", "model") if name in cpu}
    loads = [e["load"] for e in extra if "load" in e]
    name = f"{cpu.get('brand_raw', machine['machine'])}, {cpu.get('count')} cores"
    return {
        "machine": ", ".join([*{e["gpu"] for e in extra if "gpu" in e}, name]),
        "processor": " ".join(f"{key} {value}" for key, value in kind.items()),
        # Of the least and the most busy minute: what else ran, besides the bench itself.
        "load": [min(loads), max(loads)] if loads else [],
        "system": f"{machine['system']} {machine['machine']}, Python {machine['python_version']}",
        "date": runs[0]["datetime"][:10],
        "versions": extra[0]["versions"],
        "build": extra[0]["build"],
        "rows": [row for e in extra for row in e["rows"]],
    }


def counts(data: dict) -> dict:
    """Leave out what depends on the load of the machine."""
    kept = [row | {"ms": None, "rate": "", "ratio": {}} for row in data["rows"] if row["note"]]
    return data | {"note": "Times are left out: the machine had other work to do.", "rows": kept}


def main() -> None:
    *options, _ = arguments = sys.argv[1:]
    *raws, target = (Path(path) for path in arguments if path != "--counts")
    data = record(*(json.loads(raw.read_text()) for raw in raws))
    if "--counts" in options:
        data = counts(data)
    target.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
