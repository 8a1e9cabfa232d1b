"""Build backends for tests: CUDA ones for the host (csrc/cuda_host.h), so that their kernels run without a GPU."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
FLAGS += ["-Werror", "-Wno-unknown-pragmas"]
# By the name of a source after its stem.
LANGUAGE = {"_cuda.cu": ["-DODER_CUDA_HOST", "-x", "c++"], "_cpu.cpp": ["-fopenmp"]}


def build(
    change: Callable[[str, str], str] | None = None, *, source: Path = CSRC, kind: str = "_cuda.cu"
) -> ModuleType:
    """Build and import the module.

    Objects stay in build/host by the content of all sources, so that only what changed is compiled.

    Args:
        change: From the name and the text of a source to the text to compile in its place, to plant bugs.
        source: Where the operators are; headers and bindings are those of csrc.
        kind: How the names of their sources end.
    """
    sources = [*sorted(path.name for path in source.glob(f"*{kind}")), "bind.cpp"]
    texts = {path.name: path.read_text() for path in (*sorted(CSRC.glob("*")), *sorted(source.glob("*")))}
    if change is not None:
        texts = {name: change(name, text) for name, text in texts.items()}
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    compiler = os.environ.get("CXX", "g++")
    includes = [pybind11.get_include(), sysconfig.get_paths()["include"]]
    headers = {name: text for name, text in texts.items() if not name.endswith((".cu", ".cpp"))}
    common = repr((FLAGS, LANGUAGE[kind], compiler, pybind11.__version__, suffix, headers))
    keys = {name: hashlib.sha256((common + texts[name]).encode()).hexdigest()[:16] for name in sources}
    # pybind11 keeps modules by name: another build under the same name would only add overloads to the first.
    module_name = f"_host_{hashlib.sha256(''.join(keys.values()).encode()).hexdigest()[:16]}"
    cache = ROOT / "build" / "host"
    target = cache / f"{module_name}{suffix}"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            for name, text in texts.items():
                Path(folder, name).write_text(text)

            def run(command: list[str]) -> None:
                done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
                if done.returncode != 0:
                    raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")

            def compile_one(name: str) -> str:
                binding = name == "bind.cpp"
                kept = cache / f"{module_name if binding else keys[name]}.o"
                if not kept.exists():
                    # The bindings only pass arguments on: half the time of compiling them is optimization.
                    language = [f"-DODER_MODULE={module_name}", "-O0"] if binding else LANGUAGE[kind]
                    include = [f"-isystem{path}" for path in includes]
                    run([compiler, *FLAGS, *include, *language, "-c", name, "-o", f"{name}.o"])
                    os.replace(Path(folder, f"{name}.o"), kept)
                return str(kept)

            with ThreadPoolExecutor(2) as pool:
                objects = list(pool.map(compile_one, sources))
            run([compiler, "-shared", "-fopenmp", *objects, "-o", target.name])
            os.replace(Path(folder, target.name), target)
    spec = importlib.util.spec_from_file_location(module_name, target)
    if spec is None or spec.loader is None:
        raise ImportError(f"{target} is no module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
