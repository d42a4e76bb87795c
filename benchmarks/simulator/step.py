"""One iteration of a kernel's time loop: its instructions in order, the phase of each, and the polling loops."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.simulator.sass import Block, Instruction, basic_blocks, loops_inside, time_loop

PHASES = {
    "rest": "stores of the output and of what the backward pass reads",
    "ahead": "addresses, and loads for the next step",
    "poll": "waiting for what the other thread blocks store",
    "again": "polls that are repeated",
    "load": "from there to the operands of the products",
    "products": "products",
    "sums": "sums over the warps",
    "activations": "activations and equations",
    "store": "stores that the other thread blocks wait for",
}

# The kernels' functions by what they do; an instruction gets its phase by those that it was inlined from. A function
# that the kernels gain is one name more here (tests/cpu/test_simulator.py finds a name that no function has any more).
PRODUCTS = {"multiply_add", "add_products", "as_values", "as_weights"}
SUMS = {"sum_parts", "sum_units", "sum_gates", "sum_of_parts", "as_own"}
POLLS = {"any_missing", "load_bits", "wait_for_count", "load_when_published", "load_when_there"}
LOADS = {"exchange_load", "as_right", "as_operand", "round_to_tf32", "load_streamed"}
STREAMS = {"load_streamed"}
"""Loads of weights that do not stay on the chip."""
ONCE = {"load_last"}
"""Loads that are masked off in all steps but a row's last: what is simulated is another step."""
EQUATIONS = {
    "next_cell", "output_gate", "output_derivatives", "cell_derivatives", "previous_cell_gradient",
    "activation", "tanh", "sigmoid", "exp2_approx", "reciprocal_approx", "drop_candidate", "clip", "clip_gradient",
    "zone", "zone_gradients",
    "regularized_cell", "next_computed_cell", "computed_cell_derivatives", "computed_cell",
}  # fmt: skip
STORES = {"exchange_store", "exchange_arrive", "publish", "arrive", "publish_operand", "publish_state", "publish_gates"}
ARRIVES = {"arrive"}
ONE_THREAD = {"wait_for_count", "arrive"}
"""One thread of the block does what is under a predicate there."""
REDUCTIONS = "standard.py"
"""The file of Triton's own reductions."""


@functools.cache
def functions(path: str) -> list[tuple[int, str]]:
    """Return the first line and the name of every function of a source file, in order."""
    if not Path(path).exists():
        return []
    tree = ast.parse(Path(path).read_text())
    return sorted((node.lineno, node.name) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


@functools.cache
def function_at(path: str, line: int) -> str:
    """Return the function that a line is in, or the name of a file that has none before it."""
    before = [name for first, name in functions(path) if first <= line]
    return before[-1] if before else path.rsplit("/", 1)[-1]


def names(one: Instruction) -> list[str]:
    """Return the functions that an instruction was inlined from, innermost first."""
    return [function_at(path, line) for path, line in one.lines]


def polls(one: Instruction) -> bool:
    """Whether an instruction asks what others have published: a volatile load, or a load with acquire."""
    return one.name == "LDG" and "STRONG" in one.opcode and not LOADS & set(names(one)[:2])


def phases_of(code: list[Instruction], last_poll: int) -> list[str]:
    """Return the phase of every instruction; last_poll: where the last poll ends.

    By the function it was inlined from, of which Triton 3.6 tells only the innermost; an instruction of no known
    function has the phase of the one before.
    """
    first_product = next(
        (n for n, one in enumerate(code) if one.name in ("HMMA", "HGMMA", "FFMA") and n > last_poll), len(code)
    )
    published = max((n for n, one in enumerate(code) if STORES & set(names(one))), default=len(code))
    found, phase = [], "ahead"
    for n, one in enumerate(code):
        chain = set(names(one))
        reduces = any(REDUCTIONS in file for file, _ in one.lines[:1])
        if n > published:
            phase = "rest"
        elif chain & PRODUCTS:
            phase = "products"
        elif one.name == "LDSM":
            phase = "load"
        elif chain & SUMS or (reduces and n > first_product):
            phase = "sums"
        elif chain & EQUATIONS:
            phase = "activations"
        elif chain & STORES:
            phase = "store"
        elif chain & POLLS or reduces:
            phase = "poll" if n <= last_poll else "load"
        elif chain & LOADS or (n > last_poll and phase == "poll"):
            phase = "load"
        found.append(phase)
    return found


@dataclass
class Step:
    """One iteration of the time loop.

    - code, phases: its instructions where no poll fails, and the phase of each
    - detours: by the place of the branch, the instructions of another poll, which run while one fails
    - wavefronts: by place, cycles that an access to shared memory holds its path, where counted; else as without
      conflicts
    - apart: whether every warp polls for itself, and again only what was not there
    """

    code: list[Instruction]
    phases: list[str]
    detours: dict[int, list[Instruction]]
    wavefronts: dict[int, float] = field(default_factory=dict)
    apart: bool = False


def step_of(code: list[Instruction]) -> Step:
    """Return the iteration of a kernel's time loop, from its head on."""
    blocks = basic_blocks(code)
    head, body = time_loop(blocks)
    polling = {
        first: inner
        for first, inner in loops_inside(blocks, (head, body))
        if any(polls(one) for n in inner for one in blocks[n].instructions)
    }
    # Loops of a warp that look first and ask again only if they must: where they begin is on the way.
    apart = {
        first: inner
        for first, inner in polling.items()
        if not any(polls(one) for one in blocks[first].instructions) and set(blocks[first].successors) - inner
    }
    time_outs = {n for n in body if any(times_out(one) for one in blocks[n].instructions)}
    avoid = time_outs.union(*(inner - set(apart) & inner for inner in polling.values()))
    while more := {n for n in body - avoid if blocks[n].successors and set(blocks[n].successors) & body <= avoid}:
        avoid |= more
    path = [head]
    detours: dict[int, list[Instruction]] = {}
    position = 0
    while True:
        block = blocks[path[-1]]
        position += len(block.instructions)
        after = [n for n in block.successors if n in body]
        off = [n for n in after if n in avoid and n not in time_outs]
        if off and len(after) > 1:
            detours[position - 1] = detour(blocks, off[0], polling.values())
            if path[-1] in apart:
                again = [*sorted(apart[path[-1]] - {path[-1]}), path[-1]]
                detours[position - 1] = [one for n in again for one in blocks[n].instructions]
        onward = [n for n in after if n not in avoid and n not in path]
        if not onward:
            break
        path.append(min(onward))
    found = [one for n in path for one in blocks[n].instructions]
    detours = {n: instructions for n, instructions in detours.items() if instructions}
    return Step(found, phases_of(found, max(detours, default=-1)), detours, apart=bool(apart))


def times_out(one: Instruction) -> bool:
    """Whether an instruction reports that a wait timed out."""
    return one.opcode.startswith(("ATOMG.E.OR", "REDG.E.OR", "ATOM.E.OR"))


def detour(blocks: list[Block], start: int, polling: Iterable[frozenset[int]]) -> list[Instruction]:
    """Return one iteration of the polling loop that a block leads to; empty where there is none."""
    n = start
    for _ in range(10):  # blocks of a few instructions lead to it
        for body in polling:
            if n in body:
                return [one for m in sorted(body) for one in blocks[m].instructions]
        if not blocks[n].successors:
            return []
        n = blocks[n].successors[0]
    return []
