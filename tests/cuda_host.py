"""Build the CUDA faces for the host (csrc/cuda_host.h), so that the tests can run their kernels."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

CSRC = Path(__file__).resolve().parents[1] / "csrc"
SOURCES = ("radon_cuda.cu", "red_update_cuda.cu", "bind_cuda.cpp")
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
FLAGS += ["-Werror", "-Wno-unknown-pragmas"]


def build(replace: dict[str, str] | None = None) -> ModuleType:
    """Build and import the module; `replace` plants changes in a copy of the kernels.

    Objects are kept in a cache folder by the content of all sources, so that only what changed is compiled.
    """
    texts = {path.name: path.read_text() for path in sorted(CSRC.glob("*")) if path.is_file()}
    for old, new in (replace or {}).items():
        found = [name for name, text in texts.items() if old in text]
        if len(found) != 1 or texts[found[0]].count(old) != 1:
            raise ValueError(f"{old!r} must occur once, found in {found}")
        texts[found[0]] = texts[found[0]].replace(old, new)
    compiler = os.environ.get("CXX", "g++")
    headers = {name: text for name, text in texts.items() if not name.endswith((".cu", ".cpp"))}
    cache = Path(tempfile.gettempdir()) / f"oder-fast-host-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    common = repr((FLAGS, compiler, pybind11.__version__, sysconfig.get_config_var("EXT_SUFFIX"), headers))
    keys = {name: hashlib.sha256((common + texts[name]).encode()).hexdigest()[:16] for name in SOURCES}
    key = hashlib.sha256("".join(keys.values()).encode()).hexdigest()[:16]
    target = cache / key / f"_cuda_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            for name, text in texts.items():
                (Path(folder) / name).write_text(text)

            def compile_one(name: str) -> str:
                object_file = cache / f"{keys[name]}.o"
                if not object_file.exists():
                    fresh = Path(folder) / f"{name}.o"
                    paths = (pybind11.get_include(), sysconfig.get_paths()["include"])
                    binding = name.startswith("bind")
                    language = ["-O1", "-DODER_MODULE=_cuda_host"] if binding else ["-x", "c++"]
                    include = [f"-isystem{path}" for path in paths]
                    command = [compiler, *FLAGS, *include, *language, "-c", name, "-o", fresh.name]
                    subprocess.run(command, cwd=folder, check=True)
                    os.replace(fresh, object_file)
                return str(object_file)

            with ThreadPoolExecutor(2) as pool:
                objects = list(pool.map(compile_one, SOURCES))
            fresh = Path(folder) / target.name
            subprocess.run([compiler, "-shared", *objects, "-o", str(fresh)], check=True)
            target.parent.mkdir(exist_ok=True)
            shutil.move(fresh, target)
    spec = importlib.util.spec_from_file_location("_cuda_host", target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
