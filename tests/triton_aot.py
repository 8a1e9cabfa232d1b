"""Compile every Triton kernel ahead of time for sm_90, and print what it takes; run without TRITON_INTERPRET."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

import triton
from oder_fast.kernels import radon, red_update
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

INTEGERS = dict.fromkeys(
    ("n_views", "n_used", "height", "width", "n_bins", "reach", "n_partials", "n"), "i32"
)
TYPES = {
    **INTEGERS,
    **dict.fromkeys(("spacing_bits", "offset_bits", "pixel_bits", "scale_bits"), "i64"),
    **dict.fromkeys(("angles", "table", "step_size", "tau", "momentum", "partials", "reductions"), "*fp64"),
    "views": "*i64",
}
# Launching makes sizes of one constants; they must compile too.
ONES = {name: 1 for name in INTEGERS if name != "reach"}
RED = {"MOMENTUM": True, "NONNEGATIVE": True}


def compile_one(function, storage: str, constants: dict) -> dict:
    names = function.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else TYPES.get(name, storage) for name in names}
    source = ASTSource(fn=function, signature=signature, constexprs=constants)
    options = {"num_warps": 4, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run(
            [tool, "--dump-resource-usage", cubin], check=True, capture_output=True, text=True
        ).stdout
    fields = dict(part.split(":") for part in usage.split("Function")[1].split("\n")[1].split())
    return {
        "kernel": function.__name__,
        "storage": storage,
        "constants": {k: v for k, v in constants.items() if k not in ONES or v != 1},
        "registers": int(fields["REG"]),
        "local": int(fields["LOCAL"]),
        "shared": compiled.metadata.shared,
    }


def main() -> None:
    shared = {"COLUMNS": radon.COLUMNS.value, "TILE": radon.TILE.value, "VIEWS": radon.VIEWS}
    shared |= {"LINES": radon.LINES, "BINS": radon.BINS, "TIE_MARGIN": radon.TIE_MARGIN.value}
    shared |= {"BLOCK": red_update.BLOCK, "MATCHED": True}
    rows = []
    for sizes in ({}, ONES):
        for every in (True, False):
            rows.append(compile_one(radon._radon_views_kernel, "*fp32", shared | sizes | {"ALL": every}))
        rows.append(compile_one(red_update._red_finish_kernel, "*fp32", shared | sizes))
        for storage in ("*fp32", "*bf16", "*fp16"):
            data = {"DATA": True, "ALL": False}
            rows.append(compile_one(radon._radon_project_kernel, storage, shared | sizes | data))
            for taps in (0, 2, 4):
                taken = {"TAPS": taps, "UPDATE": taps == 2, **RED}
                rows.append(compile_one(radon._radon_gather_kernel, storage, shared | sizes | taken))
            rows.append(compile_one(red_update._red_update_kernel, storage, shared | sizes | RED))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
