"""How Sphinx builds the documentation: ``sphinx-build -W -b html docs build/docs``, without a network."""

from __future__ import annotations

import io
import os
import re
import sys
from contextlib import redirect_stdout, suppress
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

# The examples of the gallery take as long on one thread, and threads that wait on busy cores take far longer.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Of the help that commands print.
os.environ["COLUMNS"] = "100"
os.environ["NO_COLOR"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "benches"))
sys.path.insert(0, str(Path(__file__).parent))

import torch
from docutils import nodes
from docutils.parsers.rst import Directive
from measured import put_tables, records_of

from oder_fast.cli import main as cli_main
from without_torchvision import import_deepinv

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

project = "oder_fast"
author = "the authors of oder_fast"
copyright = "the authors of oder_fast, MIT licence"
release = version = metadata.version("oder-fast")

# Links into the documentation of others, where LINKS is 1: their inventories come from the network, and Sphinx warns
# where that cannot be reached.
LINKED = {
    "python": "https://docs.python.org/3",
    "numpy": "https://numpy.org/doc/stable",
    "scipy": "https://docs.scipy.org/doc/scipy",
    "torch": "https://docs.pytorch.org/docs/stable",
}
intersphinx_mapping = {name: (url, None) for name, url in LINKED.items() if os.environ.get("LINKS") == "1"}
intersphinx_timeout = 20

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_gallery.gen_gallery",
]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["gallery", "_templates", "Thumbs.db", ".DS_Store"]
templates_path = ["_templates"]

html_theme = "furo"
html_title = f"oder_fast {release}"
html_static_path: list[str] = []
html_copy_source = False

myst_enable_extensions = ["dollarmath", "deflist", "colon_fence"]
myst_heading_anchors = 3
# Links to files that are no pages, as those of the code host, stay links.
myst_links_external_new_tab = False

# Docstrings name the functions and classes they speak of in single backquotes.
default_role = "py:obj"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
autosummary_generate = True
# An extra that the site can do without. Where it is installed, it is imported without torchvision, which no page needs.
HAS_DEEPINV = import_deepinv() is not None
autodoc_mock_imports = [] if HAS_DEEPINV else ["deepinv"]
autodoc_default_options = {"members": True, "show-inheritance": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"

PACKAGES = (
    "oder_fast",
    "oder_fast.operators",
    "oder_fast.denoisers",
    "oder_fast.fixed_point",
    "oder_fast.data",
    "oder_fast.ops",
    "oder_fast.training",
    "oder_fast.reconstruction",
)

# Examples that are shown but not run: those of deepinv without it, and that of a scan whose file is not here.
NOT_RUN = [
    name for name, runs in {"deepinv_": HAS_DEEPINV, "ct_tooth": "TOOTH" in os.environ}.items() if not runs
]
sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "auto_gallery",
    "filename_pattern": rf"plot_(?!{'|'.join(NOT_RUN) or '$'})",
    "within_subsection_order": "gallery_order.ByReading",
    "abort_on_example_error": True,
    "doc_module": ("oder_fast",),
    "backreferences_dir": "auto_gallery/backreferences",
    "download_all_examples": False,
    "remove_config_comments": True,
    "image_scrapers": ("matplotlib",),
    "reset_modules": ("matplotlib",),
    "show_signature": False,
    "nested_sections": False,
    "write_computation_times": False,
}


def public_names() -> dict[str, str]:
    """Return where each public name is documented: the first package that exports it."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        for name in import_module(package).__all__:
            found.setdefault(name, f"{package}.{name}")
    return found


NAMES = public_names()


def resolve(app: Any, env: Any, node: Any, content: Any) -> Any:
    """Find what a docstring means by a name of another package: ``ParallelBeamCT`` in one of ``oder_fast.data``."""
    if node.get("refdomain") != "py" or node.get("reftype") not in ("obj", "class", "func", "exc"):
        return None
    head, *rest = node["reftarget"].removeprefix("oder_fast.").split(".")
    name = next((part for part in (head, *rest) if part in NAMES), None)
    if name is None:
        return None
    members = node["reftarget"].partition(name)[2]
    domain, where = env.get_domain("py"), node.get("refdoc")
    found = domain.objects.get(NAMES[name] + members) or domain.objects.get(NAMES[name])
    if found is None:
        return None
    reference = nodes.reference("", "", content, internal=True)
    reference["refuri"] = app.builder.get_relative_uri(where, found.docname) + "#" + found.node_id
    return reference


def link_to_gallery(app: Any, docname: str, source: list[str]) -> None:
    """Let links to the scripts of the gallery, as the code host shows them, lead to their pages."""
    source[0] = re.sub(r"\]\(gallery/(plot_\w+)\.py\)", r"](auto_gallery/\1.rst)", source[0])
    source[0] = source[0].replace("](gallery)", "](auto_gallery/index.rst)")


def show_records(app: Any, docname: str, source: list[str]) -> None:
    """Put tables of measurements in their places."""
    for record in records_of(source[0]):
        app.env.note_dependency(str(record))
    source[0] = put_tables(source[0])


class CommandHelp(Directive):
    """Show what ``oder-fast NAME ... --help`` prints, each in a section of its own."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Return the text as it is printed."""
        command = self.arguments[0].split()[1:]
        out = io.StringIO()
        with redirect_stdout(out), suppress(SystemExit):
            cli_main([*command, "--help"])
        return [nodes.literal_block(out.getvalue(), out.getvalue(), language="text")]


def skip(app: Any, what: str, name: str, obj: Any, skipped: bool, options: Any) -> bool | None:
    """Leave out the fields of named tuples, which the docstring of the class tells of."""
    if type(obj).__name__ == "_tuplegetter":
        return True
    return None


def setup(app: Any) -> None:
    """Register what is above."""
    app.connect("missing-reference", resolve)
    app.connect("source-read", link_to_gallery)
    app.connect("source-read", show_records)
    app.add_directive("command-help", CommandHelp)
    app.connect("autodoc-skip-member", skip)
