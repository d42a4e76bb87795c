"""Kernels of a few instructions, written in the tests of the emulator."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tests.emulator.machine import Machine
from tests.emulator.values import Array


def ptx_of(body: str, arguments: list[Any], threads: int = 32) -> str:
    """Return a kernel whose n-th argument is in register %dN if it is a tensor, else in %rN; tid.x is in %tid."""
    kinds = ["b64" if isinstance(argument, torch.Tensor) else "b32" for argument in arguments]
    params = ",\n".join(f".param .{kind} small_param_{n}" for n, kind in enumerate(kinds))
    loads = "\n".join(
        f"ld.param.{kind} %{'d' if kind == 'b64' else 'r'}{n}, [small_param_{n}];" for n, kind in enumerate(kinds)
    )
    return f"""
.version 8.6
.target sm_90a
.address_size 64
.visible .entry small(
{params}
)
.reqntid {threads}
{{
.reg .pred %p<16>;
.reg .b16 %h<32>;
.reg .b32 %r<200>;
.reg .b32 %tid;
.reg .b64 %d<64>;
{loads}
mov.u32 %tid, %tid.x;
{body}
ret;
}}
"""


def run(
    body: str, *arguments: Any, threads: int = 32, grid: tuple[int, ...] = (1,), shared: int = 1024, **options: Any
) -> Machine:
    """Run a kernel; what it stores is in the arguments."""
    machine = Machine(ptx_of(body, list(arguments), threads), grid, list(arguments), shared, **options)
    machine.run()
    return machine


def checks(machine: Machine) -> list[str]:
    """Return what the checks found: their names, each once, in order."""
    return sorted({finding.check for finding in machine.findings})


def tensor_of(array: Array) -> torch.Tensor:
    """Return an array's bits as a tensor."""
    return torch.from_numpy(np.ascontiguousarray(array).view(f"i{array.itemsize}").copy())


def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """Return memory that is initialised."""
    return torch.zeros(shape, dtype=dtype)


def evaluate(statement: str, inputs: list[Array], out: str) -> Array:
    """Return what a statement computes, thread by thread.

    Its operands are %a, %b, %c, of the inputs' types, and %o of type `out` (numpy's name, such as u4). An array of bool
    is a predicate.
    """
    n = len(inputs[0])
    kind = np.dtype(out)
    result = np.zeros(n, "u4" if kind.kind == "b" else kind)
    declared = ".reg .pred %o;" if kind.kind == "b" else f".reg .b{8 * kind.itemsize} %o;"
    lines = [declared]
    tensors = []
    for k, array in enumerate(inputs):
        register, bits = f"%{'abc'[k]}", 8 * array.itemsize
        if array.dtype.kind == "b":
            array, bits = array.astype("u4"), 32
        tensors.append(tensor_of(array))
        place = [f"mul.wide.u32 %d20, %tid, {bits // 8};", f"add.s64 %d20, %d20, %d{k};"]
        if inputs[k].dtype.kind == "b":
            load = [f".reg .pred {register};", "ld.global.b32 %r10, [%d20];", f"setp.ne.b32 {register}, %r10, 0;"]
        else:
            load = [f".reg .b{bits} {register};", f"ld.global.b{bits} {register}, [%d20];"]
        lines += [*place, *load]
    size = result.itemsize
    lines += [statement, f"mul.wide.u32 %d20, %tid, {size};", f"add.s64 %d20, %d20, %d{len(inputs)};"]
    if kind.kind == "b":
        lines += ["selp.b32 %r11, 1, 0, %o;", "st.global.b32 [%d20], %r11;"]
    else:
        lines.append(f"st.global.b{8 * size} [%d20], %o;")
    stored = tensor_of(result)
    machine = run("\n".join(lines), *tensors, stored, threads=n)
    assert not len(machine.findings), list(machine.findings)
    found = stored.numpy()
    return found != 0 if kind.kind == "b" else found.view(out)
