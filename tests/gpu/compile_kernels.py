"""Compile for a Hopper GPU, without one, the Triton kernels of the MegaBlocks paths and of the check; prints `name bytes` each.

Run by test_compile.py in a process of its own: in the test process Triton is switched to its interpreter.
"""

import warnings

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner

from scripts.gpu_stages import ring
from trinity.experts import megablocks_cpu

HOPPER = GPUTarget("cuda", 90, 32)
FLAGS = {"TOP_K": 1, "SCALE": False, "NUM_COLUMNS": 2048}
STK = {"GROUP_M": 128, "ACC_TYPE": triton.language.float32}


def compile_cubin(kernel, pointers: dict[str, str], constants: dict) -> int:
    """-> size of the machine code. Arguments that are neither pointers nor constants are 32-bit integers."""
    tuned = isinstance(kernel, Autotuner)
    config, function = (kernel.configs[0], kernel.fn) if tuned else (triton.Config({}), kernel)
    constants = {**constants, **config.kwargs}
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in function.arg_names}
    fixed = {(function.arg_names.index(name),): value for name, value in constants.items() if name in signature}
    source = ASTSource(fn=function, signature=signature, constexprs=fixed)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    cubin = triton.compile(source, target=HOPPER, options=options).asm["cubin"]
    assert cubin.startswith(b"\x7fELF")
    return len(cubin)


def main() -> None:
    megablocks_cpu.install_ops()
    warnings.simplefilter("ignore")
    from megablocks.backend import kernels
    from stk.backend import triton_kernels as stk

    index = dict.fromkeys(("indices", "bin_ids", "bins", "padded_bins"), "*i32")
    sparse = dict.fromkeys(("row_indices", "column_indices", "offsets", "block_offsets_t"), "*i32")
    matrices = dict.fromkeys("ABC", "*bf16")
    for stored in ("*bf16", "*fp32"):
        to_sorted = {"a": stored, "b": stored, **index}
        print("gather", compile_cubin(kernels._padded_copy, to_sorted, {**FLAGS, "weights": None, "A_TO_B": True}))
        to_rows = {"a": "*fp32", "b": stored, **index}
        print("scatter", compile_cubin(kernels._padded_copy, to_rows, {**FLAGS, "weights": None, "A_TO_B": False}))
    print("sdd", compile_cubin(stk._sdd_kernel, {**matrices, **sparse}, STK))
    for transposed in (False, True):
        sides = {"trans_A": transposed, "trans_B": False}
        print("dsd", compile_cubin(stk._dsd_kernel, {**matrices, **sparse}, {**STK, **sides}))
    flags = {"flag": "*i32", "late": "*i32"}
    print("ring", compile_cubin(ring.put_and_ring, {"slot_N": "*bf16", "x_N": "*bf16", **flags}, {"BLOCK": 1024}))
    print("wait", compile_cubin(ring.wait_and_take, {"slot_N": "*bf16", "y_N": "*bf16", **flags}, {"BLOCK": 1024}))
    print("row_indices", compile_cubin(stk._row_indices_kernel, {"offsets": "*i32", "out": "*i32"}, {}))


if __name__ == "__main__":
    main()
