"""Every persistent plan that the planner emits at the suites' shapes for the GPUs of the table, compiled.

`python -m tests.support.plans` compiles all of them under the installed release of Triton, writes what came out to
tests/data/plans-<release>.json and what spills to kernels/lstm_triton_kernels/spills.py, and begins anew with the plans
that take the place of those, until nothing spills. tests/compile asks whether the files are of these kernels and
complete, and compiles a part again.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import multiprocessing
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lstm_triton_kernels import sequence_persistent, spills
from lstm_triton_kernels.gpus import GPUS
from lstm_triton_kernels.persistent_plan import PersistentPlan, Recurrence, persistent_plan

from benchmarks.suites import GPU_SUITES, STORAGE, TRAINING, cases
from lstm_triton import LSTMSpec
from tests.support.compiling import Launch, compile_launch, record_launches

ROOT = Path(__file__).parents[2]
KERNELS = {
    "persistent_forward_kernel": sequence_persistent.persistent_forward_kernel,
    "persistent_backward_kernel": sequence_persistent.persistent_backward_kernel,
}
MODULES = (
    "activations", "equations", "operands", "persistent_backward", "persistent_forward", "resident", "rows", "sync"
)  # fmt: skip
"""Of the kernels' package: what the persistent kernels are made of."""

MOST_STACK = 64
"""Bytes of a thread's stack up to which a plan is offered: 16 registers. On an H200 a plan that took the place of such
a one was slower than it by far more than the spill costs (benchmarks/NOTES.md)."""

ASKED = ("plain", "ragged")
"""What is asked of a launch: a training step with the gradients of all results; the same with lengths and resets.
Inference asks for less: the same without the stores of gates and cell states."""


@dataclass(frozen=True)
class Emitted:
    """A kernel that some plan launches: on a capability, for a variant and a type, with a plan's tiles.

    odd: H is no multiple of 16. The half types count as one: bfloat16 is compiled, float16 for the anchor alone.
    """

    capability: int
    rate: str
    variant: str
    backward: bool
    odd: bool
    asked: str
    plan: PersistentPlan

    def __str__(self) -> str:
        """The name in a record: what the compiler sees of it."""
        p = self.plan
        tile = f"U{p.block_u}-R{p.block_b}-K{p.block_k}x{p.split}x{p.chunks}/{p.group}-w{p.num_warps}"
        blocks = "one" if p.blocks_per_program == 1 else "many"
        kind = f"{'backward' if self.backward else 'forward'}-{self.rate}-{self.variant}-{self.asked}"
        return f"sm{self.capability}-{kind}-{tile}-{p.wait or 'alone'}-{blocks}{'-odd' if self.odd else ''}"


def work_of(case: Any, backward: bool, ragged: bool) -> Recurrence:
    """What a case of a suite asks of the planner."""
    precision = "tf32" if case.dtype == "tf32" else "ieee"
    return Recurrence.of(case.spec, case.B, case.H, case.D, STORAGE[case.dtype], precision, backward, ragged)


def emitted(release: str) -> dict[str, tuple[Emitted, PersistentPlan]]:
    """Everything that plans for the suites launch, by name; of plans that share a kernel the tightest."""
    found: dict[str, tuple[Emitted, PersistentPlan]] = {}
    for gpu in GPUS.values():
        for case in cases(GPU_SUITES):
            if case.cell:
                continue
            passes = (False, True) if case.mode == TRAINING else (False,)
            for backward, asked in itertools.product(passes, ASKED):
                work = work_of(case, backward, ragged=asked == "ragged")
                plan = persistent_plan(work, gpu, release=release)
                if isinstance(plan, str):
                    continue
                rate = work.rate if case.suite == "anchor" else "bfloat16" if work.rate == "float16" else work.rate
                one = Emitted(gpu.capability, rate, case.variant, backward, case.H % 16 != 0, asked, plan)
                other = found.get(str(one))
                if other is None or plan.shared_bytes < other[1].shared_bytes:
                    found[str(one)] = (one, plan)
    return dict(sorted(found.items()))


def launch_of(one: Emitted) -> Launch:
    """The launch as the compiler sees it: small tensors of the right types through the real launcher."""
    spec, plan = LSTMSpec.parse(one.variant), one.plan
    dtype = torch.float32 if one.rate in ("tf32", "float32") else getattr(torch, one.rate)
    D, T, B, H, G, Q = plan.directions, 2, 2, 20 if one.odd else 32, len(spec.gates), len(spec.peephole_gates)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    ragged = {}
    if one.asked == "ragged":
        ragged = dict(lengths=torch.ones(B, dtype=torch.int64), resets=torch.zeros(T, B, dtype=torch.uint8))
    w_ch = empty(D, Q * H) if spec.diagonal else empty(D, Q * H, H) if spec.full else None
    gates, w_hh = empty(D, T, B, G * H), empty(D, G * H, H)
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    try:
        switch.fp32_precision = "tf32" if one.rate == "tf32" else "ieee"
        with record_launches({sequence_persistent: list(KERNELS)}) as launches:
            if one.backward:
                states, sequence = empty(D, B, H), empty(T, B, D * H)
                given = (sequence, sequence, states, states)
                cells = torch.empty(D, T + 1, B, H)
                sequence_persistent.backward(*given, gates, cells, w_hh, w_ch, spec, plan, **ragged)
            else:
                initial = (empty(D, B, H), empty(D, B, H))
                sequence_persistent.forward(
                    gates, *initial, w_hh, w_ch, spec, plan, save=True, save_gates=True, **ragged
                )
    finally:
        switch.fp32_precision = before
    (launch,) = launches
    return launch


def compiled(one: Emitted) -> dict[str, Any]:
    """What compiling shows: registers and stack of a thread, shared memory of a program, tensor-core instructions."""
    launch = launch_of(one)
    result = compile_launch(KERNELS[launch.kernel], launch, one.capability)
    return dict(
        registers=result.registers,
        stack=result.stack,
        shared=result.shared,
        tensor_core=sorted(result.tensor_core),
        resident=weights_stay(result.ttgir),
    )


def weights_stay(ttgir: str) -> bool:
    """Whether the right operand of every product in the time loop was loaded before it.

    Into shared memory, which the loop reads (local_load), or where it is small into registers (convert_layout).
    """
    lines = ttgir.splitlines()
    defined = {match[1]: n for n, line in enumerate(lines) if (match := re.match(r"\s*(%\S+?)(?::\d+)? = ", line))}
    loop = max(n for n, line in enumerate(lines) if "scf.for" in line and any("tt.dot" in x for x in lines[n:]))
    products = [line for line in lines if "tt.dot " in line]
    for line in products:
        operand = line.split("tt.dot ")[1].split(",")[1].split("*")[-1].strip()
        if operand not in defined:
            return False
        if defined[operand] < loop:
            continue
        source = re.search(r"ttg\.(?:local_load|convert_layout) (%[\w#.]+)", lines[defined[operand]])
        if source is None or not defined[source[1]] < loop:
            return False
    return bool(products)


@cache
def source_hash() -> str:
    """Of the kernels' code and all that they call, comments and docstrings apart."""
    code = ""
    for name in MODULES:
        tree = ast.parse((Path(sequence_persistent.__file__).parent / f"{name}.py").read_text())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            first = body[0] if isinstance(body, list) and body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                first.value.value = ""
        code += ast.unparse(tree)  # ast.dump depends on the version of Python
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def record_path(release: str) -> Path:
    """The file of what a release of Triton makes of the plans."""
    return ROOT / "tests" / "data" / f"plans-{release}.json"


def read_record(release: str) -> dict[str, Any]:
    """The record of a release; empty where there is none, or where it is of other kernels."""
    path = record_path(release)
    record = json.loads(path.read_text()) if path.exists() else {}
    return record["launches"] if record.get("source") == source_hash() else {}


def sweep(release: str, processes: int) -> None:
    """Compile what the record lacks, note what spills too much, again with what replaces it, until nothing does."""
    record = read_record(release)
    if not record:  # of other kernels: so is what they spill
        spills.SPILLS[release] = {}
        persistent_plan.cache_clear()
    spilling: dict[spills.Kind, set[tuple[Any, ...]]] = {}
    while True:
        wanted = emitted(release)
        missing = [one for name, (one, _) in wanted.items() if name not in record]
        print(f"triton {release}: {len(wanted)} kernels, {len(missing)} to compile", flush=True)
        with multiprocessing.get_context("fork").Pool(processes, maxtasksperchild=50) as pool:
            for number, (one, result) in enumerate(zip(missing, pool.imap(compiled, missing), strict=True)):
                record[str(one)] = result
                if number % 50 == 49:
                    write_record(release, record)
                    print(f"  {number + 1}", flush=True)
        spilled = [one for name, (one, _) in wanted.items() if record[name]["stack"] > MOST_STACK]
        write_record(release, {name: record[name] for name in sorted(record)})
        if not spilled:
            break
        print(f"  {len(spilled)} spill", flush=True)
        for one in spilled:
            spilling.setdefault(kind_of(one), set()).add(one.plan.key)
        known = {kind: frozenset(keys) | spills.SPILLS.get(release, {}).get(kind, frozenset())
                 for kind, keys in spilling.items()}  # fmt: skip
        spills.SPILLS[release] = spills.SPILLS.get(release, {}) | known
        write_spills()
        persistent_plan.cache_clear()
    write_record(release, {name: record[name] for name in sorted(emitted(release))})


def kind_of(one: Emitted) -> spills.Kind:
    """The kind of work under which a spilling plan is noted."""
    spec = LSTMSpec.parse(one.variant)
    rate = one.rate if one.rate in ("tf32", "float32") else "half"
    matrices = len(spec.peephole_gates) if spec.full else 0
    return (one.capability, rate, len(spec.gates), matrices, one.backward, one.asked == "ragged")


def write_record(release: str, launches: dict[str, Any]) -> None:
    """One line a kernel."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(result)}" for name, result in launches.items())
    head = json.dumps(dict(release=release, source=source_hash()))[:-1]
    record_path(release).write_text(f'{head}, "launches": {{\n{lines}\n}}}}\n')


def write_spills() -> None:
    """The module of spilling plans, sorted, as many to a line as there is room for."""
    path = Path(spills.__file__)
    head = path.read_text().split("SPILLS:")[0].removesuffix("# fmt: off\n")
    lines = [f"{head}# fmt: off\nSPILLS: dict[str, dict[Kind, frozenset[tuple[Any, ...]]]] = {{"]
    for release in sorted(spills.SPILLS):
        lines.append(f'    "{release}": {{')
        for kind in sorted(spills.SPILLS[release]):
            lines.append(f"        {_literal(kind)}: frozenset({{")
            row = ""
            for key in sorted(map(_literal, spills.SPILLS[release][kind])):
                if len(row) + len(key) + 14 > LINE:
                    lines.append(f"            {row.rstrip()}")
                    row = ""
                row += f"{key}, "
            lines += [f"            {row.rstrip()}", "        }),"]
        lines.append("    },")
    path.write_text("\n".join([*lines, "}"]) + "\n")


LINE = 120


def _literal(value: tuple[Any, ...]) -> str:
    return repr(value).replace("'", '"')


def releases() -> Iterator[str]:
    """The releases of Triton that there is a record of."""
    for path in sorted((ROOT / "tests" / "data").glob("plans-*.json")):
        yield path.stem.removeprefix("plans-")


if __name__ == "__main__":
    import triton

    sweep(".".join(triton.__version__.split(".")[:2]), int(sys.argv[1]) if len(sys.argv) > 1 else 2)
