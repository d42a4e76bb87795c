"""Compile the kernels for GPUs that are not there, with exactly the arguments that the launchers would pass.

`record_launches` runs real launchers with the kernels replaced by recorders; `compile_launch` compiles what was
recorded for a target and reads shared memory, registers, stack and instructions from the result. Needs a process
without TRITON_INTERPRET.
"""

from __future__ import annotations

import functools
import re
import tempfile
from collections import Counter, namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
from lstm_triton_kernels.settle import run_tool
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_MEMORY_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that a program may use, by compute capability (CUDA C++ Programming Guide)."""

LAUNCH_OPTIONS = ("num_warps", "num_stages", "launch_cooperative_grid", "maxnreg")
POINTER_TYPE = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64",
    torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One launch as the compiler sees it: argument types, compile-time constants, options.

    Of an argument that is a tuple each field, as "argument.field".
    """

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        constants = ",".join(f"{name}={value}" for name, value in self.constants if value is not None)
        types = ",".join(sorted({kind for _, kind in self.signature if kind.startswith("*")}))
        return f"{self.kernel}[{types};{constants}]"


class Recorder:
    """Stands in for a jitted kernel and keeps, for each launch, what the compiler would be given."""

    def __init__(self, kernel: Any, launches: set[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.launch

    def launch(self, **arguments: Any) -> None:
        options = {name: arguments.pop(name) for name in LAUNCH_OPTIONS if name in arguments}
        signature, constants, aligned = {}, {}, []
        assert set(arguments) == set(self.kernel.arg_names)
        given = []
        for parameter in self.kernel.params:
            value = arguments[parameter.name]
            fields = value._asdict() if isinstance(value, tuple) else {}
            given += [(parameter, f"{parameter.name}.{field}", of_field) for field, of_field in fields.items()]
            given += [(parameter, parameter.name, value)] * (not fields)
        for parameter, name, value in given:
            if parameter.is_constexpr or value is None:
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = POINTER_TYPE[value.dtype]
                aligned.append(name)
            elif isinstance(value, float):
                signature[name] = "fp32"
            elif not parameter.do_not_specialize and value == 1:
                signature[name], constants[name] = "constexpr", 1
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if not parameter.do_not_specialize and value % 16 == 0:
                    aligned.append(name)
        self.launches.add(
            Launch(
                self.kernel.fn.__module__,
                self.kernel.fn.__name__,
                tuple(signature.items()),
                tuple(constants.items()),
                tuple(aligned),
                tuple(options.items()),
            )
        )


@contextmanager
def record_launches(kernels: dict[ModuleType, list[str]]) -> Iterator[set[Launch]]:
    """Replace the named kernels of each module by recorders; yields the set that the launches are added to."""
    launches: set[Launch] = set()
    with pytest.MonkeyPatch.context() as patch:
        for module, names in kernels.items():
            for name in names:
                patch.setattr(module, name, Recorder(getattr(module, name), launches))
        yield launches


@dataclass(frozen=True)
class Compiled:
    """What a compiled kernel needs and does: bytes of shared memory, registers and local memory of a thread.

    stack is all the local memory there is: the only place that a spill can go to. ttgir and ptx are the compiler's
    texts, with layouts and before the assembler; cooperative whether all programs must be resident together.
    """

    shared: int
    registers: int
    stack: int
    cubin: bytes = field(repr=False)
    ptx: str = field(repr=False)
    ttgir: str = field(repr=False)
    cooperative: bool

    @property
    def tensor_core(self) -> frozenset[str]:
        """The tensor-core instructions of the PTX: mma.sync, wgmma.mma_async or tcgen05.mma, with their types."""
        return frozenset(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\.[\w.:]+", self.ptx))

    @functools.cached_property
    def instructions(self) -> Counter[str]:
        """How often each instruction stands in the SASS. Disassembled when first read: slower than most compiles."""
        sass = read_cubin("nvdisasm", "-c", self.cubin)
        return Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", sass, re.MULTILINE))


def compile_launch(kernel: Any, launch: Launch, capability: int) -> Compiled:
    """Compile a recorded launch for a compute capability of SHARED_MEMORY_LIMIT."""
    place, signature = {}, {}
    for n, name in enumerate(kernel.arg_names):
        fields = {field: kind for field, kind in launch.signature if field.startswith(f"{name}.")}
        place |= {name: (n,)} | {field: (n, k) for k, field in enumerate(fields)}
        if fields:
            kinds = namedtuple(name, [field.removeprefix(f"{name}.") for field in fields])
            signature[name] = kinds(*fields.values())
        else:
            signature[name] = dict(launch.signature)[name]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={place[name]: value for name, value in launch.constants},
        attrs={place[name]: [["tt.divisibility", 16]] for name in launch.aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))
    cubin = compiled.asm["cubin"]
    usage = read_cubin("cuobjdump", "--dump-resource-usage", cubin)
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert match is not None, usage
    registers, stack, local = map(int, match.groups())
    cooperative = bool(compiled.metadata.launch_cooperative_grid)
    return Compiled(
        compiled.metadata.shared,
        registers,
        stack + local,
        cubin,
        compiled.asm["ptx"],
        compiled.asm["ttgir"],
        cooperative,
    )


def read_cubin(tool: str, option: str, cubin: bytes) -> str:
    """What a tool in triton's wheel prints about a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return run_tool(tool, option, file.name)
