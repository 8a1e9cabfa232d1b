"""The layout that lets the next person find things, and the arrows between the layers."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from oder_fast._extras import APART, EXTRAS, NAMES

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "oder_fast"

# Which layers a layer may import; each may import its own modules, `_torch`, `_numpy` and `_extras`.
MAY_IMPORT = {
    "_torch": set(),
    "_numpy": set(),
    "_extras": set(),
    "reference": set(),
    "kernels": set(),
    "ops": {"reference", "kernels"},
    "operators": {"ops", "reference"},
    "denoisers": {"ops"},
    "fixed_point": set(),
    "red": {"fixed_point", "operators", "denoisers", "ops"},
    "deqred": {"red", "fixed_point", "operators", "denoisers"},
    "deepinv": {"operators", "denoisers"},
    "published": {"deqred", "red", "fixed_point"},
    "choice": {"deqred", "fixed_point", "operators", "denoisers"},
    "diagnosis": {"deqred", "red", "fixed_point", "operators", "denoisers"},
    "data": {"operators"},
    "viz": {"operators"},
    "training": {"deqred", "red", "denoisers", "data", "fixed_point", "operators", "viz"},
    "reconstruction": {"training", "denoisers", "data", "operators"},
    "pretrained": {"deqred", "denoisers"},
    "reproduce": {
        "viz",
        "training",
        "pretrained",
        "published",
        "deqred",
        "red",
        "fixed_point",
        "operators",
        "denoisers",
        "data",
    },
    "cli": {
        "_demo",
        "reproduce",
        "reconstruction",
        "training",
        "deqred",
        "red",
        "fixed_point",
        "operators",
        "denoisers",
        "data",
    },
    "_demo": {
        "viz",
        "pretrained",
        "choice",
        "training",
        "deqred",
        "red",
        "fixed_point",
        "operators",
        "denoisers",
        "data",
    },
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
    assert known <= MAY_IMPORT[layer] | {layer, "_torch", "_numpy", "_extras"}


# Layers that begin by asking for an extra; no other imports them before a user asks for one.
OF_EXTRAS = ("training", "reconstruction", "reproduce", "_demo", "deepinv")


def imports_at_once(node: ast.AST) -> set[str]:
    """Modules that are imported as soon as a file is: everywhere but in functions."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return set()
    names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
    if isinstance(node, ast.ImportFrom) and not node.level:
        names = {node.module or ""}
    return names.union(*map(imports_at_once, ast.iter_child_nodes(node)))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_packages_of_extras_are_imported_where_they_are_used(path):
    if layer_of(path) in OF_EXTRAS:
        return
    extras = (*EXTRAS.values(), *APART.values())
    optional = {*NAMES, *(module for modules in extras for module in modules), "bm3d", "scipy"}
    tree = ast.parse(path.read_text())
    assert not {name.split(".")[0] for name in imports_at_once(tree)} & optional
    relative = {
        layer
        for node in ast.iter_child_nodes(tree)
        if isinstance(node, ast.ImportFrom) and node.level
        for layer in [(node.module or "").split(".")[0], *(alias.name for alias in node.names)]
    }
    assert not relative & set(OF_EXTRAS)


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


@pytest.mark.parametrize(
    "command",
    [
        "ruff check .",
        "ruff format --check .",
        "mypy",
        "clang-format --dry-run --Werror csrc/* examples/*/csrc/*",
        "-W -b html docs build/docs",
    ],
)
def test_the_workflows_check_what_ci_checks(command):
    script = ROOT / ".ci/run"
    if not script.exists():
        pytest.skip("not a git checkout")
    assert re.search(rf"^[^#\n]*{re.escape(command)}$", script.read_text(), re.MULTILINE)
    workflows = "".join(path.read_text() for path in (ROOT / ".github/workflows").glob("*.yml"))
    assert re.search(rf"^ *- run: [^#\n]*{re.escape(command)}$", workflows, re.MULTILINE)
