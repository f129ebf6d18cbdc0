"""Compiles the Triton kernels for a GPU that need not be there, and counts their machine instructions.

python -m tests.helpers.gpu_code 90: one line of JSON for compute capability 9.0, {"codes bf16": instructions an
element, ...}. It cannot share a process with Triton's interpreter, in which the other tests run the kernels.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qat.quant.kernels import gpu
from qat.quant.kernels.dispatch import OUTPUTS

WARPS = 4
ELEMENTS = gpu._BLOCK / (32 * WARPS)  # of a thread


def instructions(kernel, capability: int, pointers: dict[str, str], constants: dict) -> float:
    """Machine instructions an element of a kernel; pointers: their types by argument; other arguments are int32."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, "elements")}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": WARPS})
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        text = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    counted = re.findall(r"^\s+(?:/\*\w+\*/\s+)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]+)[. ;]", text, re.MULTILINE)
    return sum(name != "NOP" for name in counted) / ELEMENTS


def count(capability: int) -> dict[str, float]:
    found = {}
    for output, dtype in (*((output, "bf16") for output in OUTPUTS), ("codes", "fp32")):
        x, constants = f"*{dtype}", {"OUTPUT": output, "BLOCK": gpu._BLOCK}
        pointers = {"x": x, "scale": "*fp32", "amax": "*i32", "out": x, "codes": "*u8", "table": "*i32"}
        found[f"{output} {dtype}"] = instructions(gpu._quantize, capability, pointers, constants)
    pointers = {"codes": "*u8", "values": "*fp32", "out": "*bf16"}
    found["decode bf16"] = instructions(gpu._decode, capability, pointers, {"BLOCK": gpu._BLOCK})
    pointers = {"x": "*bf16", "scale": "*fp32", "rows": "*fp32", "table": "*i32"}
    found["statistics bf16"] = instructions(gpu._statistics, capability, pointers, {"BLOCK": gpu._BLOCK})
    return found


if __name__ == "__main__":
    print(json.dumps(count(int(sys.argv[1]))))
