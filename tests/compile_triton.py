"""Compile every configuration of the Triton kernels for a GPU that need not be there, and print what each takes.

    python tests/compile_triton.py CAPABILITY           # 80, 86, 89 or 90; one JSON object a line
    python tests/compile_triton.py CAPABILITY --loops   # and how many instructions each loop has: takes twice as long

Each kernel is compiled as the backend would launch it: its own code runs, up to the launches.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton as compiler
from triton.backends.compiler import GPUTarget

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sus_backends import triton

DTYPES = torch.bfloat16, torch.float16, torch.float32
SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}  # bytes that a block can have
CS = 4.0, 10.0, 20.0, 60.0, float("inf")  # the slots of each ask for other constants of `thin`


class Driver:
    """As much of Triton's driver as compiling asks for."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def resources(compiled) -> dict:
    """Registers and bytes of stack a thread, bytes of shared memory a block, and with --loops the instructions of each
    loop.

    Spilled registers go to the stack. A loop's instructions include those of loops inside it.
    """
    disassembled = ["-sass"] if "--loops" in sys.argv else []
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [compiler.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", *disassembled, file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    code = [(int(address, 16), line) for address, line in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", text)]
    jumps = [(int(m[1], 16), address) for address, line in code if (m := re.search(r"BRA.*?(0x[0-9a-f]+)", line))]
    loops = [sum(first <= address <= last for address, _ in code) for first, last in jumps if first < last]
    return dict(
        registers=int(found["REG"]),
        stack=int(found["STACK"]) + int(found["LOCAL"]),
        shared=compiled.metadata.shared,
        loops=loops,
    )


def main():
    capability, seen = int(sys.argv[1]), set()
    compiler.runtime.driver.set_active(Driver(capability))
    triton.shared_memory = lambda: SHARED[capability]

    def compile(name, q, programs, *args, **constants):
        D, itemsize = q.shape[3], q.element_size()
        key = name, str(q.dtype), D, *sorted(constants.items())
        if key in seen:
            return
        seen.add(key)
        of = name, D, itemsize, constants.get("RANGES", False)
        kernel = triton._kernel(*of, measure=True)
        all_compiled = kernel.warmup(*args, grid=(1,), **constants, **triton.OPTIONS)
        for (own, warps, stages), compiled in zip(triton.configurations(*of), all_compiled, strict=True):
            line = dict(
                kernel=name,
                dtype=str(q.dtype).removeprefix("torch."),
                D=D,
                warps=warps,
                stages=stages,
                constants={k: v for k, v in {**own, **constants}.items() if k not in ("D", "PRECISION")},
            )
            print(json.dumps(line | resources(compiled)), flush=True)

    triton._launch = compile
    for dtype in DTYPES:
        for D in triton.HEAD_DIMS:
            if triton.unsupported(dtype, D, "tiles"):
                continue
            q, k = torch.zeros(1, 12, 8192, D, dtype=dtype), torch.zeros(1, 4, 8192, D, dtype=dtype)
            c, seed, row_weight = torch.tensor(1.0), torch.tensor(1), torch.ones(1, 12, 8192)
            for ranges in (None, torch.zeros(8192, 2, dtype=torch.int32)):
                sees = dict(is_causal=True, key_ranges=ranges)
                triton.forward(q, k, k, 0.1, False, c, 8.0, seed, None, **sees)
                for c_max in CS if (dtype, D) == (DTYPES[0], triton.HEAD_DIMS[0]) else [8.0]:
                    saved = triton.forward(q, k, k, 0.1, True, c, c_max, seed, None, **sees)
                    rest = 0.1, c, c_max, seed, row_weight
                    for with_stats in (False, True):
                        triton.backward(q, q, k, k, *saved, *rest, with_stats, **sees)


main()
