"""Compile every Triton kernel ahead of time for sm_90, and print what it takes; run without TRITON_INTERPRET."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

import triton
from oder_fast.kernels import diffraction, fourier, radon, red_update
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

INTEGERS = dict.fromkeys(
    ("n_views", "n_used", "height", "width", "n_bins", "count", "n_partials", "n", "n_coils", "n_lines"),
    "i32",
)
INTEGERS |= dict.fromkeys(("n_illuminations", "n_slices", "rows", "columns"), "i32")
FOURIER = dict.fromkeys(
    ("maps_batch", "lines_batch", "mask_batch", "image_row", "image_column", "source_row", "source_column"),
    "i32",
)
FOURIER |= dict.fromkeys(("target_row", "target_column", "data_row", "data_column"), "i32")
TYPES = {
    **INTEGERS,
    **dict.fromkeys(("spacing_bits", "offset_bits", "pixel_bits", "scale_bits"), "i64"),
    **dict.fromkeys(("angles", "table", "step_size", "tau", "momentum", "partials", "reductions"), "*fp64"),
    **FOURIER,
    **dict.fromkeys(("views", "coils", "lines"), "*i64"),
    **dict.fromkeys(("row_step", "column_step", "cutoff_squared", "gain", "scale", "factor"), "fp32"),
    "depths": "*fp64",
    "support": "*i32",
    "illuminations": "*i64",
    "mask": "*u8",
}
# Launching makes sizes of one constants; they must compile too.
ONES = {name: 1 for name in INTEGERS if name != "count"}


def compile_one(
    function, storage: str, constants: dict, stages: int = 3, warps: int = 4, **types: str
) -> dict:
    names = function.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    types = TYPES | types
    signature = {name: "constexpr" if name in constants else types.get(name, storage) for name in names}
    source = ASTSource(fn=function, signature=signature, constexprs=constants)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
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
        "local": int(fields["LOCAL"]) + int(fields["STACK"]),
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
        edges = {"ROWS": fourier.ROWS, "COLUMNS": fourier.COLUMNS, "DEPTH": fourier.DEPTH}
        # Lines of some coils, and what takes a mask from the image to its points and back.
        for lines, maps, inverse in ((True, True, False), (False, False, False), (False, False, True)):
            taken = {"LINES": lines, "MAPS": maps, "INVERSE": inverse, "MASK": not lines}
            taken |= {"DATA": not inverse, "ALL": not lines} | edges | sizes
            types = {"maps": "*fp16" if lines else "*fp32"}
            rows.append(
                compile_one(fourier._fourier_transform_kernel, "*fp32", taken, fourier.STAGES, **types)
            )
        for lines in (True, False):
            taken = {"LINES": lines, "ALL": not lines} | edges | sizes
            types = {"maps": "*fp32" if lines else "*fp16"}
            rows.append(compile_one(fourier._fourier_combine_kernel, "*fp32", taken, fourier.STAGES, **types))
        for n_slices in (1, 8):
            edges = diffraction.edges(n_slices) | sizes
            # Forward, adjoint and gradient; frequencies of illuminations, and functions in memory.
            for image, data, stored in ((True, False, False), (False, True, True), (True, True, False)):
                taken = {"IMAGE": image, "DATA": data, "FORWARD": not data, "STORED": stored, "ALL": stored}
                types = {"transfer": "*fp32" if stored else "*fp64"}
                rows.append(compile_one(diffraction._diffraction_kernel, "*fp32", edges | taken, **types))
            taken = edges | {"DATA": True}
            rows.append(compile_one(diffraction._diffraction_gram_kernel, "*fp32", taken))
        for storage in ("*fp32", "*bf16", "*fp16"):
            data = {"DATA": True, "ALL": False}
            rows.append(compile_one(radon._radon_project_kernel, storage, shared | sizes | data))
            for taps in (0, 2, 4):
                taken = shared | sizes | {"TAPS": taps}
                rows.append(compile_one(radon._radon_gather_kernel, storage, taken))
            taken = shared | sizes | {"MOMENTUM": True, "NONNEGATIVE": True}
            rows.append(compile_one(red_update._red_update_kernel, storage, taken))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
