"""The opcodes that compute one value in each thread, as Python expressions: VALUES, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tests.emulator import Fault
from tests.emulator.parse import Instruction
from tests.emulator.values import COMPARE
from tests.emulator.writer import Writer

Value = Callable[[Writer, Instruction], str]
VALUES: dict[str, Value] = {}


class Type(NamedTuple):
    """A type of PTX: kind u, s, b, f or pred, and bits."""

    kind: str
    bits: int

    @property
    def unsigned(self) -> str:
        """The type of a register of these bits."""
        return f"u{self.bits // 8}"

    def view(self, x: str) -> str:
        """Return a register as numbers of this type."""
        if self.bits == 1 or self.kind in "ub":
            return x
        return f"{x}.view({'i' if self.kind == 's' else 'f'}{self.bits // 8})"

    def bits_back(self, x: str) -> str:
        """Return numbers of this type as a register."""
        return x if self.bits == 1 or self.kind in "ub" else f"({x}).view({self.unsigned})"


def type_of(name: str) -> Type:
    """Return the type of a name such as f32."""
    return Type("pred", 1) if name == "pred" else Type(name[0], int(name[1:]))


def opcode(*names: str, plain: bool = True) -> Callable[[Value], Value]:
    """Add to VALUES; plain: it has no modifiers that change its result (.sat, .cc, .ftz)."""

    def add(function: Value) -> Value:
        def checked(w: Writer, ins: Instruction) -> str:
            for modifier in ("sat", "cc", "ftz") if plain else ("sat",):
                if modifier in ins.modifiers:
                    raise Fault(f"no such modifier here: {ins}")
            return function(w, ins)

        for name in names:
            VALUES[name] = checked
        return function

    return add


def require(condition: bool, ins: Instruction) -> None:
    """Raise where an instruction has a form that is not modelled."""
    if not condition:
        raise Fault(f"no such form here: {ins}")


def wanted_type(ins: Instruction, *names: str) -> Type:
    """Return the type of an instruction, which must be one of these."""
    require(ins.modifiers[-1] in names, ins)
    return type_of(ins.modifiers[-1])


INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
BITS = ("b16", "b32", "b64")
FLOATS = ("f32", "f64")
FROM_16 = {"bf16": "from_bf16({})", "f16": "{}.view(f2).astype(f4).view(u4)"}
"""A register of 16 bits as float32, by type."""


@opcode("add", "sub")
def sums(w: Writer, ins: Instruction) -> str:
    if ins.modifiers[-1] in ("u16x2", "s16x2"):
        return halves(w, ins)
    kind = wanted_type(ins, *INTEGERS, *FLOATS)
    a, b = w.sources(ins.operands[1:], kind.bits)
    sign = "+" if ins.name == "add" else "-"
    return f"{a}{sign}{b}" if kind.kind != "f" else kind.bits_back(f"{kind.view(a)}{sign}{kind.view(b)}")


@opcode("min", "max")
def extremes(w: Writer, ins: Instruction) -> str:
    if ins.modifiers[-1] in ("u16x2", "s16x2"):
        return halves(w, ins)
    kind = wanted_type(ins, *INTEGERS, *FLOATS)
    of_sizes = ins.modifiers[-3:-1] == ["xorsign", "abs"]
    require(ins.modifiers[1:-1] in ([], ["NaN"], ["NaN", "xorsign", "abs"]), ins)
    number = kind.kind == "f" and "NaN" not in ins.modifiers  # of a NaN and a number the number
    function = f"np.f{ins.name}" if number else f"np.{ins.name}imum"
    a, b = map(kind.view, w.sources(ins.operands[1:], kind.bits))
    if of_sizes:
        return kind.bits_back(f"extreme_of_sizes({function},{a},{b})")
    return kind.bits_back(f"{function}({a},{b})")


def halves(w: Writer, ins: Instruction) -> str:
    """Return two operations on 16 bits each."""
    function = {"add": "np.add", "sub": "np.subtract", "min": "np.minimum", "max": "np.maximum"}[ins.name]
    a, b = (f"{x}.view({'i2' if ins.modifiers[-1][0] == 's' else 'u2'})" for x in w.sources(ins.operands[1:], 32))
    return f"{function}({a},{b}).view(u4)"


HALF_FLOATS = ("f16", "bf16", "f16x2", "bf16x2")


def half_products(w: Writer, ins: Instruction) -> str:
    """Return a product of one or two floats of 16 bits, with a third operand a sum."""
    kind, twice = ins.modifiers[-1].removesuffix("x2"), ins.modifiers[-1].endswith("x2")
    require(ins.modifiers[1:-1] in ([], ["rn"]), ins)
    operands = w.sources(ins.operands[1:], 32 if twice else 16)
    given = ",".join(f"np.ascontiguousarray({x}).view(u2)" for x in operands)
    return f"fma_16({kind!r},{given}).view(u{4 if twice else 2})"


@opcode("mul", "mad")
def products(w: Writer, ins: Instruction) -> str:
    if ins.name == "mul" and ins.modifiers[-1] in HALF_FLOATS:
        return half_products(w, ins)
    kind = wanted_type(ins, *INTEGERS, *(FLOATS if ins.name == "mul" else ()))
    a, b = w.sources(ins.operands[1:3], kind.bits)
    if kind.kind == "f":
        return kind.bits_back(f"{kind.view(a)}*{kind.view(b)}")
    form = ins.modifiers[1]
    require(form in ("lo", "hi", "wide") and (form == "lo" or kind.bits < 64), ins)
    product, last = f"{a}*{b}", kind.bits
    if form != "lo":
        wide = Type(kind.kind, 2 * kind.bits)
        sign = "i" if kind.kind == "s" else "u"
        x, y = (f"{kind.view(v)}.astype({sign}{wide.bits // 8})" for v in (a, b))
        product, last = f"({x}*{y}).view({wide.unsigned})", wide.bits
        if form == "hi":
            product, last = f"({product}>>{wide.unsigned}({kind.bits})).astype({kind.unsigned})", kind.bits
    return product if ins.name == "mul" else f"({product})+{w.source(ins.operands[3], last)}"


@opcode("fma")
def fused(w: Writer, ins: Instruction) -> str:
    if ins.modifiers[-1] in HALF_FLOATS:
        return half_products(w, ins)
    wanted_type(ins, "f32")
    require("rn" in ins.modifiers, ins)
    return f"fma({','.join(w.sources(ins.operands[1:], 32))})"


@opcode("div", "rem")
def quotients(w: Writer, ins: Instruction) -> str:
    kind = wanted_type(ins, *INTEGERS, *(("f32",) if ins.name == "div" else ()))
    a, b = w.sources(ins.operands[1:], kind.bits)
    if kind.kind == "f":
        return f"div_f32({a},{b})"
    return kind.bits_back(f"{'divide' if ins.name == 'div' else 'remainder'}({kind.view(a)},{kind.view(b)})")


@opcode("and", "or", "xor")
def bitwise(w: Writer, ins: Instruction) -> str:
    kind = wanted_type(ins, *BITS, "pred")
    a, b = w.sources(ins.operands[1:], kind.bits)
    return f"{a}{dict([('and', '&'), ('or', '|'), ('xor', '^')])[ins.name]}{b}"


@opcode("not")
def complement(w: Writer, ins: Instruction) -> str:
    return f"~{w.source(ins.operands[1], wanted_type(ins, *BITS, 'pred').bits)}"


@opcode("neg")
def negated(w: Writer, ins: Instruction) -> str:
    kind = wanted_type(ins, "s16", "s32", "s64", *FLOATS)
    a = w.source(ins.operands[1], kind.bits)
    return f"{a}^{w.constant(1 << (kind.bits - 1), kind.bits)}" if kind.kind == "f" else f"u{kind.bits // 8}(0)-{a}"


@opcode("abs")
def absolute(w: Writer, ins: Instruction) -> str:
    kind = wanted_type(ins, "s16", "s32", "s64", *FLOATS)
    a = w.source(ins.operands[1], kind.bits)
    if kind.kind == "f":
        return f"{a}&{w.constant((1 << (kind.bits - 1)) - 1, kind.bits)}"
    return kind.bits_back(f"np.abs({kind.view(a)})")


@opcode("shl", "shr")
def shifts(w: Writer, ins: Instruction) -> str:
    kind = wanted_type(ins, *(BITS if ins.name == "shl" else (*BITS, *INTEGERS)))
    a, by = w.source(ins.operands[1], kind.bits), ins.operands[2]
    if isinstance(by, int) and by < kind.bits:
        sign = "<<" if ins.name == "shl" else ">>"
        number = w.constant(by, kind.bits)
        return kind.bits_back(f"{kind.view(a)}{sign}{kind.view(number)}")
    if ins.name == "shl":
        return f"shift_left({a},{w.source(by, 32)})"
    return kind.bits_back(f"shift_right({kind.view(a)},{w.source(by, 32)})")


@opcode("bfe")
def fields(w: Writer, ins: Instruction) -> str:
    kind = wanted_type(ins, "u32", "s32")
    _, a, position, length = ins.operands
    require(isinstance(position, int) and isinstance(length, int) and 0 < length <= 32 - position, ins)
    return f"bit_field({w.source(a, 32)},{position},{length},{kind.kind == 's'})"


@opcode("prmt")
def permuted(w: Writer, ins: Instruction) -> str:
    require(ins.op == "prmt.b32", ins)
    return f"byte_permute({','.join(w.sources(ins.operands[1:], 32))})"


@opcode("lop3")
def logic(w: Writer, ins: Instruction) -> str:
    require(ins.op == "lop3.b32", ins)
    return f"lop3({','.join(w.sources(ins.operands[1:4], 32))},{ins.operands[4]})"


@opcode("shf")
def funnels(w: Writer, ins: Instruction) -> str:
    require(ins.op in ("shf.l.wrap.b32", "shf.r.wrap.b32"), ins)
    return f"funnel({','.join(w.sources(ins.operands[1:], 32))},{ins.modifiers[1] == 'l'})"


@opcode("selp")
def selected(w: Writer, ins: Instruction) -> str:
    kind = wanted_type(ins, *BITS, *INTEGERS, *FLOATS)
    a, b = w.sources(ins.operands[1:3], kind.bits)
    return f"where({w.source(ins.operands[3], 1)},{a},{b})"


@opcode("setp")
def compared(w: Writer, ins: Instruction) -> str:
    kind = wanted_type(ins, *BITS, *INTEGERS, *FLOATS)
    require(len(ins.operands) == 3 and len(ins.modifiers) == 3 and "|" not in str(ins.operands[0]), ins)
    a, b = map(kind.view, w.sources(ins.operands[1:], kind.bits))
    test = f"({a}{COMPARE[ins.modifiers[1]]}{b})"
    if kind.kind == "f" and ins.modifiers[1] == "ne":  # numpy's != holds for NaN, .ne does not
        return f"({test}&({a}=={a})&({b}=={b}))"
    return test


@opcode("ex2", "lg2", "rcp", "sqrt", "rsqrt", "tanh", plain=False)
def functions(w: Writer, ins: Instruction) -> str:
    wanted_type(ins, "f32")
    return f"function_f32({ins.name!r},{w.source(ins.operands[1], 32)},{'ftz' in ins.modifiers})"


@opcode("cvt")
def converted(w: Writer, ins: Instruction) -> str:
    to, source = ins.modifiers[-2:]
    rounding = ins.modifiers[1:-2]
    first, own = ins.operands[1], w.bits_of(ins.operands[0])
    if source == "f32" and to in ("bf16", "f16", "bf16x2", "f16x2") and rounding == ["rn"]:
        convert = "to_bf16" if to.startswith("b") else "to_f16"
        if to.endswith("x2"):  # the first source is the upper half
            lower, upper = w.source(ins.operands[2], 32), w.source(first, 32)
            return f"pack([{convert}({lower}),{convert}({upper})],32)"
        return f"{convert}({w.source(first, 32)})"
    if to == "f32" and source in FROM_16 and not rounding:
        return FROM_16[source].format(w.source(first, 16))
    if (to, source, rounding) == ("tf32", "f32", ["rna"]):
        return f"to_tf32({w.source(first, 32)})"
    if (to, rounding) == ("s32", ["rzi"]) and source in ("f16", "f32"):  # NaN gives 0, what is beyond the nearest end
        kind, bits = ("f2", 16) if source == "f16" else ("f4", 32)
        value = f"{w.source(first, bits)}.view({kind}).astype(f8)"
        return f"np.trunc(np.nan_to_num({value},nan=0.0)).clip(-2.0**31,2.0**31-1).astype(i4).view(u4)"
    require(source[0] in "us" and source[1:].isdigit(), ins)
    frm = Type(source[0], int(source[1:]))
    number = f"{w.source(first, frm.bits)}.view({'i' if frm.kind == 's' else 'u'}{frm.bits // 8})"
    if to == "f32" and rounding == ["rn"]:
        return f"{number}.astype(f4).view(u4)"
    if to == "f16" and rounding == ["rn"]:
        return f"{number}.astype(f8).astype(f2).view(u2)"
    require(to[0] in "us" and to[1:].isdigit() and not rounding, ins)
    sign = "i" if to[0] == "s" else "u"  # truncate to the destination's type, then extend to its register
    return f"{number}.astype({sign}{int(to[1:]) // 8}).astype({sign}{own // 8}).view(u{own // 8})"
