"""Every example in the README and in docs/ runs, in the order typed; the site leaves out no page, example or name."""

import ast
import csv
import importlib
import json
import re
import runpy
import warnings
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest

import tables
from without_torchvision import import_deepinv

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
GALLERY = sorted((DOCS / "gallery").glob("*.py"))
# What needs files, several processes or a run of hours says so beside the word python.
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


# Their examples take seconds each.
LONG = ("choosing", "deepinv", "fixed_points", "idt", "mri")


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=[pytest.mark.exhaustive] if page.stem in LONG else [])
        for page in PAGES
        if BLOCK.search(page.read_text())
    ],
)
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch):
    if page.stem == "deepinv" and import_deepinv() is None:
        pytest.skip("deepinv is not installed: see CONTRIBUTING.md")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "example"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for block in BLOCK.findall(page.read_text()):
            exec(compile(block, f"{page.name}: {block.splitlines()[0]}", "exec"), names)


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def toctree(page: Path) -> set[str]:
    """Pages that a page's tables of contents name, without the suffix."""
    blocks = re.findall(r"^```\{toctree\}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return {line for line in lines if line and not line.startswith(":")}


def test_the_site_shows_every_page():
    pages = {path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.glob("*.md")} - {"index"}
    assert toctree(DOCS / "index.md") == pages | {"api/index", "auto_gallery/index"}
    assert toctree(DOCS / "api/index.md") == {path.stem for path in (DOCS / "api").glob("*.md")} - {"index"}


def test_the_gallery_shows_every_example_with_a_title_and_pictures():
    order = runpy.run_path(str(DOCS / "gallery_order.py"))["ORDER"]
    assert sorted(order) == [path.name for path in GALLERY]
    for path in GALLERY:
        tree = ast.parse(path.read_text())
        lines = (ast.get_docstring(tree) or "").splitlines()
        assert len(lines) > 3, path
        assert lines[1] == "=" * len(lines[0]), path
        assert "plt.show()" in path.read_text(), path


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("path", [p for p in GALLERY if "deepinv" in p.stem], ids=lambda path: path.stem)
def test_examples_that_the_site_does_without_run(path, monkeypatch):
    """The site shows them without running them where deepinv is not installed."""
    if import_deepinv() is None:
        pytest.skip("deepinv is not installed: see CONTRIBUTING.md")
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.get_fignums()))
    runpy.run_path(str(path))
    plt.close("all")
    assert shown[-1], "no figure"


PUBLIC = (
    "",
    ".operators",
    ".denoisers",
    ".fixed_point",
    ".data",
    ".ops",
    ".training",
    ".reconstruction",
    ".viz",
)


@pytest.mark.parametrize("package", [f"oder_fast{name}" for name in PUBLIC])
def test_every_public_name_has_an_entry(package):
    entries: dict[str, set[str]] = {}
    for page in (DOCS / "api").glob("*.md"):
        text, module = page.read_text(), "oder_fast"
        module = next(iter(re.findall(r"currentmodule:: (\S+)", text)), module)
        for name in re.findall(r"^   ([\w.]+)$", text, re.MULTILINE):
            entries.setdefault(name.rpartition(".")[2], set()).add(f"{module}.{name}")
        entries |= {name: set() for name in re.findall(r"`([A-Z]+)` is the mapping", text)}
    missing = set(importlib.import_module(package).__all__) - entries.keys()
    assert not missing, f"docs/api has no entry for {missing}"
    for name, places in entries.items():
        assert len(places) <= 1, f"{name} is documented twice: {places}"
        for place in places:
            where, _, what = place.rpartition(".")
            if where == "oder_fast.deepinv" and import_deepinv() is None:
                continue
            assert hasattr(importlib.import_module(where), what), place


# Where messages of solves are made, and words of them that the page on convergence must explain.
MESSAGES = {
    "fixed_point/solvers.py": (
        "grew far beyond its start",
        "became NaN or infinite",
        "are within the relative distance",
        "no residual was taken in",
        "are not within the relative distance",
        "may not allow that tolerance: raise it",
        "it is the minibatches' noise",
        "the map hardly contracts",
        "raise max_iterations or the tolerance",
        "more would do",
        "raise the minibatch size or lower check_every",
    ),
    "fixed_point/differentiation.py": (
        "Implicit, adjoint solve:",
        "The gradient is the Jacobian-free one",
        "second derivatives through the fixed point are not available",
    ),
    "red.py": ("lower tau, or take a denoiser that contracts", "the inner solve ran out of steps: raise tau"),
    "diagnosis.py": (
        "is determined by neither the data nor D",
        "T contracts there",
        "But D expands there",
        "T hardly contracts there",
        "T expands there",
        "Leave step_size to its default first",
        "x - D(x) is monotone there",
        "x - D(x) is not monotone there",
        "at the start, for the solve diverges",
    ),
    "denoisers/lipschitz.py": (
        "Nonexpansive here",
        "Expansive here, but x - D(x) is strongly monotone",
        "Expansive here, and x - D(x) is not monotone",
    ),
    "choice.py": ("the score still falls", "the score hardly depends on", "the solves diverge for every"),
    "operators/base.py": (
        "A_adjoint is not the adjoint of A",
        "the operator is zero, or sees nothing of the image",
        "has the largest magnitude",
    ),
    "operators/parallel.py": ("gave up:", "lost contact with another", "must be the same on all ranks"),
    "training/trainer.py": (
        "backs off: the batch is left out",
        "which did not help: the denoiser does not contract",
    ),
}


@pytest.mark.parametrize(
    ("source", "words"), [(source, words) for source, those in MESSAGES.items() for words in those]
)
def test_what_a_solve_says_has_its_paragraph(source, words):
    page = " ".join((DOCS / "convergence.md").read_text().replace("\n> ", " ").split())
    assert words in page
    # Where the message changes, so must the page. Strings are parsed, as long ones go over several lines.
    tree = ast.parse((ROOT / "oder_fast" / source).read_text())
    said = "".join(
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    assert words in said or words in " ".join(ast.unparse(tree).split())


def test_the_paper_cites_what_its_bibliography_has():
    text, entries = (ROOT / "paper.md").read_text(), (ROOT / "paper.bib").read_text()
    keys = re.findall(r"^@\w+\{(\w+),$", entries, re.MULTILINE)
    assert len(keys) == len(set(keys)) > 10
    assert set(re.findall(r"(?<![\w`.])@(\w+)", text)) == set(keys)
    (figure,) = re.findall(r"\]\((docs/images/\S+)\)", text)
    assert (ROOT / figure).exists()
    for record in re.findall(r"`([\w/-]+\.(?:json|csv|txt))`", text):
        assert any((folder / record).exists() for folder in (ROOT, ROOT / "benches/results")), record


RESULTS = ROOT / "benches" / "results"


def measured():
    return SimpleNamespace(**runpy.run_path(str(DOCS / "measured.py")))


def cells(table):
    """Rows of a Markdown table, by the names of its columns."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows]


@pytest.mark.parametrize(
    "path", sorted([*RESULTS.glob("*.json"), *RESULTS.glob("*.csv")]), ids=lambda path: path.name
)
def test_a_record_becomes_a_table(path):
    found = cells(measured().table(path.name))
    if path.suffix == ".csv":
        header, *rows = csv.reader(path.read_text().splitlines())
        last = header[-1]
        assert list(found[0]) == header
        assert [float(row[last]) for row in found] == pytest.approx(
            [float(row[-1]) for row in rows], rel=5e-3
        )
        return
    record = json.loads(path.read_text())
    for row, shown in zip(record["rows"], found, strict=True):
        assert shown["operator"] == f"`{row['op']}`"
        if row["ms"] is not None:
            assert float(shown["ms"]) == pytest.approx(row["ms"], rel=5e-3)
        assert all(name in shown["times as fast as"] for name in row["ratio"])
        assert row["note"].replace("|", "\\|") == shown.get("note", "")


def test_pages_take_their_tables_from_records():
    """Each JSON record is shown, marks name what is there, and no page has a row of a record typed in."""
    script = measured()
    shown = {record for page in PAGES for record in script.records_of(page.read_text())}
    assert all(record.exists() for record in shown)
    assert set(RESULTS.glob("*.json")) <= shown
    for page in PAGES:
        source = page.read_text()
        assert source.count("<!-- table:") == len(script.records_of(source)), page
        assert "<!-- table:" not in script.put_tables(source)
        assert "| `radon_forward` | cpu" not in source, page
    with pytest.raises(ValueError, match="no row"):
        script.of_record({"machine": "", "versions": {}, "date": "", "rows": []}, "radon")


def test_a_run_of_the_benches_becomes_a_record():
    row = {"op": "radon", "backend": "cpu", "shape": "1", "ms": 1.0, "rate": "", "ratio": {}, "note": "a|b"}
    extra = {"rows": [row], "versions": {"torch": "2"}, "build": {}, "load": 1.5}
    cpu = {"brand_raw": "A processor", "count": 2, "family": 25, "model": 17}
    run = {
        "benchmarks": [{"extra_info": extra}, {"extra_info": {}}],
        "machine_info": {"cpu": cpu, "machine": "x86_64", "system": "Linux", "python_version": "3.11"},
        "datetime": "2026-11-28T12:00:00",
    }
    record = tables.record(run, run)
    assert record["rows"] == [row, row]
    table = measured().of_record(record)
    assert table.startswith(
        "A processor, 2 cores (family 25 model 17); torch 2; load 1.5 to 1.5; 2026-11-28. "
    )
    shown = {"operator": "`radon`", "backend": "cpu", "case": "1", "ms": "1", "note": "a\\|b"}
    assert cells(table) == [shown, shown]
    counted = measured().of_record(tables.counts(record))
    assert "Times are left out" in counted
    assert "ms" not in cells(counted)[0]


def test_images_of_pages_are_small_and_shown():
    text = "".join(page.read_text() for page in PAGES)
    for path in (DOCS / "images").iterdir():
        assert f"images/{path.name})" in text, path
        assert path.suffix == ".png", path
        assert path.stat().st_size < 150_000, path
