"""The opcodes that do more than compute one value in each thread, as Python statements: EFFECTS, by name."""

from __future__ import annotations

import re
from collections.abc import Callable

from tests.emulator import Fault
from tests.emulator.parse import Instruction, Vector
from tests.emulator.writer import Writer

Effect = Callable[[Writer, Instruction], None]
EFFECTS: dict[str, Effect] = {}

FORMS = {
    ("m16n8k16", ("f32", "bf16", "bf16", "f32")): "bf16",
    ("m16n8k16", ("f32", "f16", "f16", "f32")): "f16",
    ("m16n8k8", ("f32", "tf32", "tf32", "f32")): "tf32",
}
"""Of mma, by shape and types."""


def opcode(*names: str) -> Callable[[Effect], Effect]:
    """Add to EFFECTS."""

    def add(function: Effect) -> Effect:
        EFFECTS.update(dict.fromkeys(names, function))
        return function

    return add


def require(condition: bool, ins: Instruction) -> None:
    """Raise where an instruction has a form that is not modelled."""
    if not condition:
        raise Fault(f"no such form here: {ins}")


def known(ins: Instruction, modifiers: set[str], allowed: set[str]) -> None:
    """Raise where an access has no state space, or a modifier that is not modelled."""
    if modifiers - allowed or not modifiers & {"global", "shared", "shared::cta"}:
        raise Fault(f"no such modifier here: {ins} {sorted(modifiers - allowed)}")


@opcode("mov")
def move(w: Writer, ins: Instruction) -> None:
    to, source = ins.operands
    bits = 1 if ins.modifiers[1] == "pred" else int(ins.modifiers[1][1:])
    if isinstance(to, Vector):
        each = bits // len(to.parts)
        for n, part in enumerate(to.parts):
            if part != "_":
                w.write(ins, part, f"unpack({w.source(source, bits)},{n},{each})")
    elif isinstance(source, Vector):
        w.write(ins, to, f"pack({w.listed(source.parts, bits // len(source.parts))},{bits})")
    else:
        w.write(ins, to, w.source(source, bits))


@opcode("createpolicy")
def cache_policy(w: Writer, ins: Instruction) -> None:
    w.write(ins, ins.operands[0], w.constant(0, 64))  # a hint to L2, which is no matter of values


@opcode("ld")
def load(w: Writer, ins: Instruction) -> None:
    to, place, *policy = ins.operands
    require(len(policy) == ins.modifiers.count("L2::cache_hint"), ins)
    parts = ins.modifiers
    registers = to.parts if isinstance(to, Vector) else [to]
    bits, n = int(parts[-1][1:]), len(registers)
    require(parts[-1][0] != "s" or bits >= 32, ins)
    if "param" in parts:
        w.write(ins, to, f"g.launch.param({place.base!r},{w.bits_of(to)})")
        return
    modifiers = set(parts[1:-1]) - {"v2", "v4", "v8"}
    address, mask = w.address(place), w.mask(ins)
    if modifiers & {"shared", "shared::cta"}:
        known(ins, modifiers, {"shared", "shared::cta", "volatile"})
        w.call(ins, f"ld_shared(g,{address},{bits // 8},{n},{mask},{ins.index})", registers, bits)
        return
    allowed = {"global", "gpu", "sys", "volatile", "relaxed", "acquire", "cg", "ca", "cs", "cv"}
    known(ins, modifiers, allowed | {x for x in modifiers if x.startswith(("L1", "L2"))})
    order = "acquire" if "acquire" in modifiers else "relaxed" if modifiers & {"volatile", "relaxed"} else "weak"
    cached = order == "weak" and not modifiers & {"cg", "cs", "cv", "L1::no_allocate"}
    call = f"ld_global(g,{address},{bits // 8},{n},{mask},{order!r},{cached},{ins.index})"
    w.call(ins, call, registers, bits)


@opcode("st")
def store(w: Writer, ins: Instruction) -> None:
    place, source = ins.operands
    inputs = source.parts if isinstance(source, Vector) else [source]
    bits = int(ins.modifiers[-1][1:])
    # There is no register of 8 bits: the lower ones of a wider register are stored.
    values = ",".join(w.source(x, bits if isinstance(x, int) else max(bits, 16)) for x in inputs)
    modifiers = set(ins.modifiers[1:-1]) - {"v2", "v4"}
    arguments = f"g,{w.address(place)},{bits // 8},[{values}],{w.mask(ins)}"
    if modifiers & {"shared", "shared::cta"}:
        known(ins, modifiers, {"shared", "shared::cta", "volatile"})
        w.line(f"st_shared({arguments},{ins.index})")
    else:
        known(ins, modifiers, {"global", "gpu", "sys", "volatile", "relaxed", "release", "wb", "cg", "cs", "wt"})
        w.line(f"st_global({arguments},{'release' in modifiers},{ins.index})")


@opcode("atom", "red")
def atomics(w: Writer, ins: Instruction) -> None:
    parts = ins.modifiers
    known(ins, set(parts[1:-2]), {"global", "gpu", "sys", "relaxed", "release", "acquire", "acq_rel"})
    order = next((part for part in parts if part in ("release", "acquire", "acq_rel")), "relaxed")
    to, place, *given = ins.operands if ins.name == "atom" else ["_", *ins.operands]
    values = w.listed(given, int(parts[-1][1:]))
    arguments = f"g,{w.address(place)},{parts[-2]!r},{parts[-1]!r},{values},{w.mask(ins)},{order!r},{ins.index}"
    w.call(ins, f"atomic({arguments})", [to])


@opcode("mma")
def multiply(w: Writer, ins: Instruction) -> None:
    parts = ins.modifiers
    require(parts[1:3] == ["sync", "aligned"] and parts[4:6] == ["row", "col"] and len(parts) == 10, ins)
    form = FORMS[parts[3], tuple(parts[-4:])]  # type: ignore[index]
    d, *factors = (operand.parts for operand in ins.operands)
    w.whole_warps(ins)
    w.call(ins, f"mma({form!r},{','.join(w.listed(x, 32) for x in factors)})", d)


@opcode("ldmatrix")
def load_matrices(w: Writer, ins: Instruction) -> None:
    require("m8n8" in ins.modifiers and ins.modifiers[-1] == "b16", ins)
    to, place = ins.operands
    w.whole_warps(ins)
    arguments = f"g,{w.address(place)},{len(to.parts)},{'trans' in ins.modifiers},{w.mask(ins)},{ins.index}"
    w.call(ins, f"ldmatrix({arguments})", to.parts)


@opcode("stmatrix")
def store_matrices(w: Writer, ins: Instruction) -> None:
    require("m8n8" in ins.modifiers and ins.modifiers[-1] == "b16", ins)
    place, source = ins.operands
    w.whole_warps(ins)
    values = w.listed(source.parts, 32)
    w.line(f"stmatrix(g,{w.address(place)},{values},{'trans' in ins.modifiers},{w.mask(ins)},{ins.index})")


@opcode("shfl")
def shuffles(w: Writer, ins: Instruction) -> None:
    to, a, b, c, members = ins.operands
    to, _, predicate = to.partition("|")
    require(members in (-1, 0xFFFFFFFF) and ins.modifiers[1] == "sync" and isinstance(c, int), ins)
    w.whole_warps(ins)
    call = f"shuffle({ins.modifiers[2]!r},{w.source(a, 32)},{w.source(b, 32)},{c})"
    w.call(ins, call, [to, predicate] if predicate else [to])


@opcode("redux")
def reductions(w: Writer, ins: Instruction) -> None:
    to, a, members = ins.operands
    w.whole_warps(ins)
    _, _, operation, kind = ins.modifiers
    w.call(ins, f"reduce({operation!r},{kind!r},{w.source(a, 32)},{w.source(members, 32)})", [to])


@opcode("vote")
def votes(w: Writer, ins: Instruction) -> None:
    to, a, members = ins.operands
    require(members in (-1, 0xFFFFFFFF), ins)
    w.whole_warps(ins)
    w.call(ins, f"vote({ins.modifiers[2]!r},{w.source(a, 1)})", [to])


@opcode("bar")
def warp_barrier(w: Writer, ins: Instruction) -> None:
    """bar.warp.sync; the barriers of a CTA end a segment."""
    require(ins.modifiers[1] == "warp", ins)
    w.whole_warps(ins)


@opcode("fence", "membar")
def fences(w: Writer, ins: Instruction) -> None:
    if ins.op.startswith("fence.proxy.async"):
        w.line("fence_proxy(g)")
    else:
        orders = r"fence\.(acq_rel|sc)\.(gpu|sys)|membar\.(gl|sys)"
        require(re.fullmatch(orders, ins.op) is not None and ins.guard is None, ins)
        w.line("fence(g)")


@opcode("cp")
def copies(w: Writer, ins: Instruction) -> None:
    parts = ins.modifiers
    require(parts[1] == "async" and "bulk" not in parts, ins)
    if parts[2] == "commit_group":
        w.line("commit_copies(g)")
    elif parts[2] in ("wait_group", "wait_all"):
        w.line(f"wait_copies(g,{ins.operands[0] if parts[2] == 'wait_group' else -1})")
    else:
        require(parts[3] in ("shared", "shared::cta") and parts[4] == "global", ins)
        to, source, size, *given = ins.operands
        amount = w.source(given[0], 32) if given else w.constant(size, 32)
        w.line(f"copy(g,{w.address(to)},{w.address(source)},{size},{amount},{w.mask(ins)},{ins.index})")


@opcode("wgmma")
def multiply_later(w: Writer, ins: Instruction) -> None:
    w.whole_warps(ins)
    what = ins.modifiers[1]
    if what == "commit_group":
        w.line("commit_products(g)")
    elif what == "wait_group":
        w.line(f"wait_products(g,{ins.operands[0]})")
    elif what == "mma_async" and w.masked:
        w.line("raise Fault('wgmma by a part of a gang')")
    elif what == "mma_async":
        start_product(w, ins)
    else:
        require(what == "fence", ins)


def start_product(w: Writer, ins: Instruction) -> None:
    """wgmma.mma_async."""
    shape = re.fullmatch(r"m64n(\d+)k(\d+)", ins.modifiers[4])
    form = ins.modifiers[6]
    d, a, b, scale, *rest = ins.operands
    types_known = ins.modifiers[5:8] == ["f32", form, form] and form in ("bf16", "f16", "tf32")
    require(shape is not None and types_known and rest[:2] == [1, 1] and not any(rest[2:]), ins)
    assert shape is not None
    n, k = map(int, shape.groups())
    require(k == (8 if form == "tf32" else 16), ins)
    left = w.listed(a.parts, 32) if isinstance(a, Vector) else w.source(a, 64)
    arguments = f"{w.listed(d.parts, 32)},{left},{w.source(b, 64)},{w.source(scale, 1)},{ins.index}"
    w.call(ins, f"wgmma(g,{form!r},{n},{k},{arguments})", d.parts)
