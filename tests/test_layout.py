"""The layout that lets the next person find things, and the arrows between the layers."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "oder_fast"

# Which layers a layer may import; each may import its own modules, `_torch` and `_numpy`.
MAY_IMPORT = {
    "_torch": set(),
    "_numpy": set(),
    "reference": set(),
    "kernels": set(),
    "ops": {"reference", "kernels"},
    "operators": {"ops"},
    "denoisers": {"ops"},
    "fixed_point": set(),
    "red": {"fixed_point", "operators", "denoisers", "ops"},
    "deqred": {"red", "fixed_point", "operators", "denoisers"},
    "published": {"deqred", "red", "fixed_point"},
    "diagnosis": {"deqred", "red", "fixed_point", "operators", "denoisers"},
    "data": {"operators"},
    "training": {"deqred", "red", "denoisers", "data", "fixed_point", "operators"},
    "reconstruction": {"training", "denoisers", "data", "operators"},
    "cli": {
        "_demo",
        "reconstruction",
        "training",
        "deqred",
        "red",
        "fixed_point",
        "operators",
        "denoisers",
        "data",
    },
    "_demo": {"training", "deqred", "red", "fixed_point", "operators", "denoisers", "data"},
}


def layer_of(path: Path) -> str:
    if path.is_relative_to(ROOT / "kernels"):
        return "kernels"
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported_layers(path: Path) -> set[str]:
    """Layers of oder_fast that a file imports, wherever in the file."""
    inside = ROOT / "kernels" if path.is_relative_to(ROOT / "kernels") else PACKAGE
    package = ["oder_fast", *path.relative_to(inside).parts[:-1]]
    if inside != PACKAGE:
        package.insert(1, "kernels")
    layers = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "oder_fast" and len(parts) > 1:
                layers.add(parts[1])
            assert parts[0] != "kernels", f"{path}: a bare `kernels` is a second copy"
    return layers


FILES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").glob("*.py")])


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down_only(path):
    layer = layer_of(path)
    if layer == "__init__":
        return
    # Names that oder_fast/__init__.py exports (version, build_info) belong to no layer.
    known = {name for name in imported_layers(path) if name in MAY_IMPORT}
    assert known <= MAY_IMPORT[layer] | {layer, "_torch", "_numpy"}


def test_transforms_are_called_in_the_one_safe_way():
    for path in PACKAGE.rglob("*.py"):
        calls = [
            ast.unparse(n.func) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)
        ]
        direct = [c for c in calls if re.fullmatch(r"torch\.fft\.\w*fft[2n]?", c)]
        assert not direct, f"{path}: oder_fast._torch.fft calls {direct}"


def tracked() -> list[str]:
    if shutil.which("git") is None:
        pytest.skip("git is not on the PATH")
    run = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if run.returncode != 0:
        pytest.skip("not a git checkout")
    return run.stdout.split()


@pytest.mark.parametrize(
    ("stem", "needed"),
    [
        (stem, pattern.format(stem))
        for stem in sorted(path.stem for path in (PACKAGE / "reference").glob("[a-z]*.py"))
        for pattern in (
            "csrc/{}_cpu.cpp",
            "csrc/{}_cuda.cu",
            "kernels/{}.py",
            "oder_fast/reference/{}.py",
            "oder_fast/ops/{}.py",
            "tests/test_{}.py",
            "benches/bench_{}.py",
        )
    ],
)
def test_every_operator_has_its_backends_test_and_bench(stem, needed):
    assert needed in tracked()


def test_torch_headers_are_not_needed_to_build():
    for source in (ROOT / "csrc").iterdir():
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", source.read_text()), source
    assert "torch" not in re.search(r"requires = \[(.*?)\]", (ROOT / "pyproject.toml").read_text())[1]
