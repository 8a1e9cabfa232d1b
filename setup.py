"""Build the backends by ninja: C++ (ODER_FAST_CPU=1|0), CUDA where nvcc and a driver are (ODER_FAST_CUDA=auto|1|0)."""

from __future__ import annotations

import ctypes
import filecmp
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
STEMS = sorted(path.name.removesuffix("_cpu.cpp") for path in (ROOT / "csrc").glob("*_cpu.cpp"))
X86_ISAS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}
GPU_ARCHITECTURES = ("80", "90", "100")
CXXFLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# GCC sees uninitialised values in its own AVX-512 headers.
GCC_FLAGS = ["-fopenmp", "-Wno-maybe-uninitialized"]
# Clang's OpenMP is another runtime, libomp. Beside torch's libgomp, on Linux, functions of both have the same names; a
# second libomp beside torch's, on macOS, ends the process. What clang compiles runs on one thread.
CLANG_FLAGS = ["-Wno-unknown-pragmas"]


def first_line(command: list[str]) -> str:
    """Return the first line a compiler says of itself."""
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().splitlines()
    return out[0] if out else ""


def find_cxx() -> str | None:
    """Return the C++ compiler, None where nothing is to be compiled."""
    wanted = os.environ.get("ODER_FAST_CPU", "1")
    if wanted not in ("1", "0"):
        raise SystemExit(f"ODER_FAST_CPU must be 1 or 0, got {wanted!r}")
    if wanted == "0":
        if os.environ.get("ODER_FAST_CUDA") == "1":
            raise SystemExit("ODER_FAST_CUDA=1 needs the C++ compiler that ODER_FAST_CPU=0 does without")
        return None
    cxx = os.environ.get("CXX", "g++")
    if shutil.which(cxx) is None:
        raise SystemExit(
            f"oder-fast: the C++17 compiler {cxx} is not on the PATH; install it, name another by CXX, "
            "or set ODER_FAST_CPU=0 to install without compiled kernels"
        )
    return cxx


def has_driver() -> bool:
    """Tell whether an NVIDIA driver is here: libcuda.so.1 comes with it alone, and into containers too."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def find_nvcc() -> tuple[str | None, str]:
    """Return the path of the nvcc to compile CUDA with, None to leave it out, and the reason for either."""
    wanted = os.environ.get("ODER_FAST_CUDA", "auto")
    if wanted not in ("auto", "1", "0"):
        raise SystemExit(f"ODER_FAST_CUDA must be auto, 1 or 0, got {wanted!r}")
    if wanted == "0":
        return None, "ODER_FAST_CUDA=0"
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None) or shutil.which("nvcc")
    if wanted == "1":
        if nvcc is None:
            raise SystemExit("ODER_FAST_CUDA=1, but nvcc is neither on the PATH nor under CUDA_HOME")
        return nvcc, "ODER_FAST_CUDA=1"
    if nvcc is None:
        return None, "nvcc is neither on the PATH nor under CUDA_HOME"
    if not has_driver():
        return None, "nvcc is here, but no NVIDIA driver (libcuda.so.1); ODER_FAST_CUDA=1 insists"
    return nvcc, "nvcc and an NVIDIA driver (libcuda.so.1) are here"


class NinjaBuild(build_ext):
    """Compile every backend into a module without torch: raw pointers through pybind11."""

    def run(self) -> None:
        cxx = find_cxx()
        if cxx is None:
            why = "ODER_FAST_CPU=0"
            print(f"oder-fast: compiles nothing: {why}", flush=True)
            left_out = {"built": False, "reason": why}
            self._place([], {"cpu": left_out, "cuda": left_out})
        else:
            self._place(*self._compile(cxx))

    def _compile(self, cxx: str) -> tuple[list[Path], dict[str, dict[str, object]]]:
        """Return the modules, and what build_info tells of them."""
        tag = f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        build = ROOT / "build" / tag
        build.mkdir(parents=True, exist_ok=True)
        include = build / "include"
        self._keep_headers(Path(pybind11.get_include()), include)
        compiler = first_line([cxx, "--version"])
        openmp = "clang" not in compiler
        cxxflags = CXXFLAGS + (GCC_FLAGS if openmp else CLANG_FLAGS)
        nvcc, reason = find_nvcc()
        told = f"compiles CUDA with {nvcc}" if nvcc else "leaves CUDA out"
        print(f"oder-fast: {told}: {reason}", flush=True)
        isas = X86_ISAS if platform.machine() in ("x86_64", "AMD64") else {"baseline": []}
        headers = [f"-I{ROOT / 'csrc'}", f"-isystem{include}", f"-isystem{sysconfig.get_paths()['include']}"]
        text = [
            "ninja_required_version = 1.5",
            "rule cxx\n  command = $compiler -MMD -MF $out.d $flags -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc\n  description = $out",
            "rule nvcc\n  command = $compiler -MD -MF $out.d $flags -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc\n  description = $out",
            "rule link\n  command = $compiler $flags $in -o $out $libs\n  description = $out",
        ]
        modules: dict[str, Path] = {}

        def module(name: str, objects: list[str], compiler: str, flags: list[str], libs: list[str]) -> None:
            modules[name] = build / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
            text.append(
                f"build {modules[name].name}: link {' '.join(objects)}\n  compiler = {compiler}\n"
                f"  flags = {shlex.join(flags)}\n  libs = {' '.join(libs)}"
            )

        def compile_one(rule: str, source: str, output: str, compiler: str, flags: list[str]) -> str:
            text.append(
                f"build {output}: {rule} {ROOT / 'csrc' / source}\n  compiler = {compiler}\n"
                f"  flags = {shlex.join(flags)}"
            )
            return output

        # The bindings stay baseline code: they tell which instruction sets may run.
        def bind(name: str) -> str:
            flags = [*cxxflags, "-O1", f"-DODER_MODULE={name}", *headers]
            return compile_one("cxx", "bind.cpp", f"bind{name}.o", cxx, flags)

        # Python brings its own symbols: the linker of macOS has to be told.
        link = ["-shared", *(["-fopenmp"] if openmp else [])]
        link += ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        for isa, machine in isas.items():
            objects = [
                compile_one("cxx", f"{stem}_cpu.cpp", f"{stem}_{isa}.o", cxx, cxxflags + machine + headers)
                for stem in STEMS
            ]
            module(f"_cpu_{isa}", [*objects, bind(f"_cpu_{isa}")], cxx, link, [])
        info: dict[str, dict[str, object]] = {
            "cpu": {"built": True, "compiler": compiler, "openmp": openmp, "isas": list(isas)},
            "cuda": {"built": nvcc is not None, "reason": reason},
        }
        if nvcc is not None:
            known = subprocess.run(
                [nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True
            ).stdout
            targets = [a for a in GPU_ARCHITECTURES if f"sm_{a}" in known.split()]
            last = targets[-1]
            archs = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in targets]
            archs.append(f"-gencode=arch=compute_{last},code=compute_{last}")
            flags = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-cudart=static", *archs]
            flags.append(f"-I{ROOT / 'csrc'}")
            objects = [
                compile_one("nvcc", f"{stem}_cuda.cu", f"{stem}_cuda.o", nvcc, flags) for stem in STEMS
            ]
            module("_cuda", [*objects, bind("_cuda")], nvcc, ["-shared", "-cudart=static"], [])
            version = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
            info["cuda"] |= {
                "compiler": next(line for line in version.splitlines() if "release" in line).strip(),
                "architectures": [f"sm_{a}" for a in targets] + [f"compute_{last}"],
            }
        (build / "build.ninja").write_text("\n".join(text) + "\n")
        subprocess.run([os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(build)], check=True)
        return list(modules.values()), info

    def _place(self, modules: list[Path], info: dict[str, dict[str, object]]) -> None:
        """Put the modules into the package, and take away those that an earlier build left there."""
        target = (
            ROOT / "oder_fast" if self.inplace or self.editable_mode else Path(self.build_lib) / "oder_fast"
        )
        target.mkdir(parents=True, exist_ok=True)
        for path in modules:
            self._install(path, target / path.name)
        built = {path.name.split(".")[0] for path in modules}
        for stale in (*target.glob("_cuda.*.so"), *target.glob("_cpu_*.so")):
            if stale.name.split(".")[0] not in built:
                stale.unlink()
        (target / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n")

    @staticmethod
    def _keep_headers(source: Path, target: Path) -> None:
        """Copy pybind11 where its path and times stay the same: build isolation moves it at every build."""
        for header in source.rglob("*.h"):
            copy = target / header.relative_to(source)
            if not (copy.exists() and filecmp.cmp(header, copy, shallow=False)):
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(header, copy)

    @staticmethod
    def _install(source: Path, target: Path) -> None:
        """Replace by rename: a running process keeps the module it has mapped."""
        temporary = target.with_name(target.name + ".new")
        shutil.copyfile(source, temporary)
        os.replace(temporary, target)

    def get_outputs(self) -> list[str]:
        return [str(p) for p in (Path(self.build_lib) / "oder_fast").glob("_c*.so")]


setup(
    package_dir={"oder_fast.kernels": "kernels", "oder_fast": "oder_fast"},
    packages=[
        "oder_fast.kernels",
        *(
            ".".join(p.parent.relative_to(ROOT).parts)
            for p in sorted((ROOT / "oder_fast").rglob("__init__.py"))
        ),
    ],
    package_data={"oder_fast": ["weights/*"]},
    ext_modules=[Extension("oder_fast._cpu_baseline", [])],
    cmdclass={"build_ext": NinjaBuild},
)
