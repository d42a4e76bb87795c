"""Faults planted in the compiled kernels: what is changed in their PTX, and the case that is to show it."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from tests.compiled.layers import Case, run
from tests.emulator.launches import Change

FORWARD, BACKWARD, MATMUL = "persistent_forward_kernel", "persistent_backward_kernel", "gate_preactivations_kernel"
GLUON = "exchanged_forward_kernel", "exchanged_backward_kernel"
BARRIER = r"\n\s*bar\.sync\s+0;"
POLL = re.compile(r"ld\.volatile\.global|ld\.(?:global\.)?gpu\.acquire|ld\.(?:global\.)?acquire|atom\.\S*acquire")

MAX_POLLS = 1000
"""Looks of a program before it gives up waiting: few, for a fault may make it wait in vain."""


class Planted(NamedTuple):
    """A fault, the case that is to show it, and what it changes."""

    name: str
    case: Case
    change: Change


def without(ptx: str, pattern: str, n: int) -> str:
    """Return the PTX without the n-th statement that matches; as it is where there are fewer."""
    found = list(re.finditer(pattern, ptx))
    return ptx[: found[n].start()] + ptx[found[n].end() :] if n < len(found) else ptx


def swap_operands(ptx: str) -> str:
    """Swap registers 1 and 2 of the left operand of the first mma."""
    at = re.search(r"mma\.sync[^{]*\{[^}]*\}, \{\s*(%r\d+), (%r\d+), (%r\d+), (%r\d+)\s*\}", ptx)
    if at is None:
        raise LookupError("no mma")
    text = at[0].replace(f"{at[2]}, {at[3]}", f"{at[3]}, {at[2]}")
    return ptx[: at.start()] + text + ptx[at.end() :]


def unguarded(ptx: str, pattern: str) -> str:
    """Take the guard from the last statement that matches."""
    at = list(re.finditer(r"@%p\d+ (" + pattern + ")", ptx))
    if not at:
        raise LookupError(f"no guarded {pattern}")
    return ptx[: at[-1].start()] + at[-1][1] + ptx[at[-1].end() :]


def no_arrive_barrier(ptx: str, n: int) -> str:
    """Take out the bar.sync before the n-th release."""
    releases = [m.start() for m in re.finditer(r"gpu\.release\.add", ptx)]
    if not releases:
        raise LookupError("no release")
    barrier = [m for m in re.finditer(BARRIER, ptx) if m.start() < releases[n]][-1]
    return ptx[: barrier.start()] + ptx[barrier.end() :]


def no_retry(ptx: str) -> str:
    """Take out the backward branch of the inner loop."""
    lines = ptx.split("\n")
    polls = [n for n, line in enumerate(lines) if POLL.search(line)]
    labels = {m[1]: n for n, line in enumerate(lines) if (m := re.match(r"(\$L__BB\w+):", line))}
    for n, line in enumerate(lines):
        m = re.match(r"\s+@!?%p\d+ bra \s*(\$L__BB\w+);", line)
        if m and (start := labels[m[1]]) < n and any(start < p < n for p in polls):
            lines[n] = ""
            return "\n".join(lines)
    raise LookupError("no loop")


def only_in(kernel: str, change: Callable[[str], str]) -> Change:
    """Return a change of one kernel, which raises LookupError if it changes nothing."""

    def apply(name: str, ptx: str) -> str:
        if name != kernel:
            return ptx
        changed = change(ptx)
        if changed == ptx:
            raise LookupError("nothing changed")
        return changed

    return apply


def replaced(kernel: str, pattern: str, new: str, count: int = 0) -> Change:
    """Return a change of one kernel: the first `count` matches (0: all) replaced."""
    return only_in(kernel, lambda ptx: re.sub(pattern, new, ptx, count=count))


DATA = Case("standard", "fp32", 3, 2, 136, wait="data")
COUNTER = replace(DATA, wait="counter")
POLLED = Case("standard", "bf16", 3, 5, 72, wait="data", weak=True, multiprocessors=9)
PRODUCTS = Case("standard", "bf16", 2, 64, 128, stepwise=True)
PIPELINED = Case("standard", "tf32", 2, 64, 128, stepwise=True)  # as `gates.product_blocks` has it under every release


def faults() -> Iterator[Planted]:
    """Wrong results, races, accesses outside, missing barriers and orders: one of each."""
    masked = replace(DATA, H=134, B=1)
    shuffle = r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+, )1,"  # of the sums
    shared = r"(st\.shared\S+\s+\[ ?%r\d+)(?: \+ 0)? ?\]"
    yield from gluon_faults()
    yield Planted("a shuffle's distance 1 made 4", DATA, replaced(FORWARD, shuffle, r"\g<1>4,", count=1))
    plain = replaced(FORWARD, r"ld\.volatile\.global", "ld.global")
    yield Planted("volatile loads made plain", replace(DATA, weak=True), plain)
    yield Planted("no turn of the data wait", DATA, only_in(FORWARD, no_retry))
    yield Planted("no turn of the counter wait", COUNTER, only_in(BACKWARD, no_retry))
    for kernel, order in itertools.product((FORWARD, BACKWARD), ("release", "acquire")):
        relaxed = replaced(kernel, rf"gpu\.{order}\b", "gpu.relaxed")
        yield Planted(f"{order} made relaxed in {kernel}", replace(COUNTER, weak=True), relaxed)
    for access in ("st", "ld"):
        change = only_in(FORWARD, functools.partial(unguarded, pattern=rf"{access}\.global\.b32"))
        yield Planted(f"a {access}.global without its mask", masked, change)
    yield Planted("a shared store 4 bytes further", DATA, replaced(FORWARD, shared, r"\g<1>+4]", count=1))
    # So many rows that several warps store what is published.
    full = replace(COUNTER, B=22, block_b=16, weak=True).with_blocks_of(11)
    for kernel, what, n in ((FORWARD, "h_0", 0), (FORWARD, "h_t", 1), (BACKWARD, "gradients", -1)):
        change = only_in(kernel, functools.partial(no_arrive_barrier, n=n))
        yield Planted(f"no barrier before the release of {what}", full, change)
    yield Planted("no fence.proxy.async", PRODUCTS, replaced(MATMUL, r"fence\.proxy\.async[^;]*;", ""))
    wait = r"wgmma\.wait_group\.sync\.aligned \d;"  # 1 where loads are pipelined, else 0
    change = replaced(MATMUL, wait, "wgmma.wait_group.sync.aligned 3;")
    yield Planted("wgmma waited for too few groups", PRODUCTS, change)
    change = replaced(MATMUL, r"cp\.async\.wait_group\s+2;", "cp.async.wait_group 4;")
    yield Planted("cp.async waited for one group too few", PIPELINED, change)


def gluon_faults() -> Iterator[Planted]:
    """Of the kernels in Gluon: a product, a mask, and everything that the loop of a poll does."""
    tf32, old = replace(POLLED, dtype="tf32"), replace(POLLED, capability=80)
    for kernel, name in zip(GLUON, ("forward", "backward"), strict=True):
        yield Planted(f"{name}, an mma's operand registers swapped", POLLED, only_in(kernel, swap_operands))
        for case, what, pattern, new in (
            (POLLED, "no turn of a poll", r"@!%any bra THERE;", "bra THERE;"),
            (POLLED, "one turn of a poll", r"@%any bra AGAIN;", "bra THERE;"),
            (POLLED, "a poll that sees one half of a word", "0x80008000, 0x80;", "0x00008000, 0x80;"),
            (POLLED, "a poll for another pattern", "0xFFFEFFFE", "0x7FFEFFFE"),
            (POLLED, "loads repeated where the first is missing", r"@%absent[1-9]\d* ld", "@%absent0 ld"),
            (old, "before sm_90, a poll that sees one half", "%seen, 0x80008000;", "%seen, 0x00008000;"),
            (old, "before sm_90, a poll that sees the last word", r"%seen, 0xEA;", "%t, 0xC0;"),
            (tf32, "TF32, a poll for another pattern", "%seen, 0xFFFFFFFF;", "%seen, 0xFFFFFFFE;"),
            (tf32, "TF32, a poll that sees two words", r"max\.u32\s+%seen, %seen, [^;]*;", ""),
        ):
            yield Planted(f"{name}, {what}", case, replaced(kernel, pattern, new))
        change = only_in(kernel, functools.partial(unguarded, pattern=r"st\.global\.b16"))
        masked = replace(POLLED, variant="coupled", H=70, weak=False)
        yield Planted(f"{name}, a st.global without its mask", masked, change)


def barrier_faults() -> Iterator[Planted]:
    """Every bar.sync taken out in turn; some are needed by no two warps."""
    jobs = [(MATMUL, PRODUCTS)]
    for kernel, wait in itertools.product((FORWARD, BACKWARD), ("data", "counter")):
        case = Case("standard", "fp32", 3, 11, 136, wait=wait, block_b=16, weak=True)
        jobs.append((kernel, case.with_blocks_of(11)))
    for kernel in GLUON:
        jobs.append((kernel, POLLED.with_fields(kept=1)))
        jobs.append((kernel, POLLED.with_blocks_of(3, row_programs=2)))
    for kernel, case in jobs:
        texts: list[str] = []

        def keep(name: str, ptx: str, kernel: str = kernel, texts: list[str] = texts) -> str:
            if name == kernel:
                texts.append(ptx)
            return ptx

        emulation = replace(case, weak=False).emulation()
        emulation.change = keep
        run(case, emulation)
        count = len(re.findall(BARRIER, texts[0]))
        for n in range(count):
            change = only_in(kernel, functools.partial(without, pattern=BARRIER, n=n))
            yield Planted(f"{kernel} {case.wait or ''} bar.sync {n} of {count} taken out", case, change)


def seen(case: Case, change: Change | None) -> str:
    """Return what shows that a case is wrong, with a change of the PTX; empty if nothing does."""
    emulation = case.emulation()
    emulation.change, emulation.max_polls = change, MAX_POLLS
    return run(case, emulation).wrong


@functools.cache
def control(case: Case) -> str:
    """Return what is wrong with a case as it is."""
    return seen(case, None)
