"""Every example in the README and in docs/ runs, in the order typed."""

import re
import warnings
from pathlib import Path

import pytest

from without_torchvision import import_deepinv

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What needs files, several processes or a run of hours says so beside the word python.
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


# Their examples take seconds each.
LONG = ("deepinv", "fixed_points", "idt", "mri")


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
