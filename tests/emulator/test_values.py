"""Every opcode that computes a value in each thread, on corner values and random ones, against Python and numpy."""

import itertools
import operator
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.emulator import Fault
from tests.emulator.small_kernels import evaluate, run, zeros

THREADS = 256
INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")


def integers(kind):
    """16 numbers of a type: the least and the greatest, those around 0, random ones."""
    bits = int(kind[1:])
    least, greatest = (0, 2**bits - 1) if kind[0] != "s" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    corners = [0, 1, 2, 3, 7, greatest, greatest - 1, least, least + 1, greatest // 2]
    random = np.random.default_rng(bits).integers(least, greatest, 6, dtype=numpy_type(kind), endpoint=True)
    return corners + random.tolist()


FLOATS = [0.0, -0.0, 1.0, -1.0, 1.5, -2.25, 3e38, -3e38, 1e-40, -1e-45, 1.17549435e-38, float("inf"), -float("inf"),
          float("nan"), 0.1, -7.3e-5]  # fmt: skip


def numpy_type(kind):
    return {"u": "u", "s": "i", "b": "u", "f": "f"}[kind[0]] + str(int(kind[1:]) // 8)


def operands(kinds, nonzero=False):
    """For each type an array of THREADS values: for two operands all pairs of 16."""
    columns = [FLOATS if kind[0] == "f" else integers(kind) for kind in kinds]
    rows = list(itertools.product(*columns))
    if len(rows) > THREADS:
        rows = [rows[n] for n in np.random.default_rng(0).choice(len(rows), THREADS, replace=False)]
    rows = [rows[n % len(rows)] for n in range(THREADS)]
    arrays = [np.array(column, numpy_type(kind)) for column, kind in zip(zip(*rows, strict=True), kinds, strict=True)]
    if nonzero:
        arrays[1][arrays[1] == 0] = 5
    return arrays


def wrapped(numbers, kind):
    """Whole numbers as bits of a type."""
    bits = int(kind[1:])
    return np.array([int(number) & (2**bits - 1) for number in numbers], f"u{bits // 8}")


def truncated(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def shifted(a, by, bits):
    return a << by if by < bits else 0


def assert_integers(statement, function, kinds, out, nonzero=False):
    """The statement does with every thread's operands what a function of Python's integers does."""
    arrays = operands(kinds, nonzero)
    expected = wrapped(map(function, *(array.tolist() for array in arrays)), out)
    np.testing.assert_array_equal(evaluate(statement, arrays, f"u{int(out[1:]) // 8}"), expected)


BINARY = {"add": operator.add, "sub": operator.sub, "mul.lo": operator.mul, "min": min, "max": max}


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("name", BINARY)
def test_sums_products_and_extremes_of_integers(name, kind):
    assert_integers(f"{name}.{kind} %o, %a, %b;", BINARY[name], (kind, kind), kind)


@pytest.mark.parametrize("kind", INTEGERS)
def test_division_truncates_and_the_remainder_has_the_sign_of_the_dividend(kind):
    assert_integers(f"div.{kind} %o, %a, %b;", truncated, (kind, kind), kind, nonzero=True)
    remainder = lambda a, b: a - truncated(a, b) * b  # noqa: E731
    assert_integers(f"rem.{kind} %o, %a, %b;", remainder, (kind, kind), kind, nonzero=True)


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32"])
def test_wide_and_high_products(kind):
    bits = int(kind[1:])
    wide = f"{kind[0]}{2 * bits}"
    assert_integers(f"mul.wide.{kind} %o, %a, %b;", operator.mul, (kind, kind), wide)
    assert_integers(f"mul.hi.{kind} %o, %a, %b;", lambda a, b: a * b >> bits, (kind, kind), kind)
    assert_integers(f"mad.lo.{kind} %o, %a, %b, %c;", lambda a, b, c: a * b + c, (kind, kind, kind), kind)
    assert_integers(f"mad.wide.{kind} %o, %a, %b, %c;", lambda a, b, c: a * b + c, (kind, kind, wide), wide)
    assert_integers(f"mad.hi.{kind} %o, %a, %b, %c;", lambda a, b, c: (a * b >> bits) + c, (kind, kind, kind), kind)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_bitwise_operations_and_shifts(bits):
    kind, signed = f"b{bits}", f"s{bits}"
    for name, function in {"and": operator.and_, "or": operator.or_, "xor": operator.xor}.items():
        assert_integers(f"{name}.{kind} %o, %a, %b;", function, (kind, kind), kind)
    assert_integers(f"not.{kind} %o, %a;", operator.invert, (kind,), kind)
    assert_integers(f"shl.{kind} %o, %a, 5;", lambda a: a << 5, (kind,), kind)
    assert_integers(f"shr.u{bits} %o, %a, 5;", lambda a: a >> 5, (kind,), kind)
    assert_integers(f"shr.s{bits} %o, %a, 5;", lambda a: a >> 5, (signed,), kind)
    assert_integers(f"shr.s{bits} %o, %a, {bits};", lambda a: a >> bits, (signed,), kind)
    left = lambda a, by: shifted(a, by, bits)  # noqa: E731
    assert_integers(f"shl.{kind} %o, %a, %b;", left, (kind, "u32"), kind)
    assert_integers(f"shr.u{bits} %o, %a, %b;", lambda a, by: a >> min(by, bits), (kind, "u32"), kind)
    assert_integers(f"shr.s{bits} %o, %a, %b;", lambda a, by: a >> min(by, bits), (signed, "u32"), kind)


@pytest.mark.parametrize("kind", ["s16", "s32", "s64"])
def test_negation_and_absolute_value(kind):
    assert_integers(f"neg.{kind} %o, %a;", operator.neg, (kind,), kind)
    assert_integers(f"abs.{kind} %o, %a;", abs, (kind,), kind)


def test_operations_on_predicates():
    a, b = np.arange(THREADS) % 2 == 0, np.arange(THREADS) % 3 == 0
    for name, function in {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.items():
        np.testing.assert_array_equal(evaluate(f"{name}.pred %o, %a, %b;", [a, b], "bool"), function(a, b))
    np.testing.assert_array_equal(evaluate("not.pred %o, %a;", [a], "bool"), ~a)
    np.testing.assert_array_equal(evaluate("mov.pred %o, %a;", [a], "bool"), a)


@pytest.mark.parametrize("kind", ["u16x2", "s16x2"])
def test_pairs_of_halves(kind):
    (a, b), sign = operands(("b32", "b32")), {"u": "u2", "s": "i2"}[kind[0]]
    for name, function in {"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum}.items():
        expected = function(a.view(sign), b.view(sign)).view("u4")
        np.testing.assert_array_equal(evaluate(f"{name}.{kind} %o, %a, %b;", [a, b], "u4"), expected)


@pytest.mark.parametrize("position, length", [(0, 1), (3, 7), (31, 1), (0, 32), (16, 16)])
def test_bit_fields(position, length):
    def field(a):
        return a >> position & 2**length - 1

    def signed(a):
        return field(a) - 2**length * (field(a) >> length - 1)

    assert_integers(f"bfe.u32 %o, %a, {position}, {length};", field, ("u32",), "u32")
    assert_integers(f"bfe.s32 %o, %a, {position}, {length};", signed, ("s32",), "s32")


def test_permuted_bytes():
    def permuted(a, b, selector):
        pool = struct.pack("<II", a, b)
        chosen = [selector >> 4 * n & 15 for n in range(4)]
        picked = [(pool[c & 7] >> 7) * 255 if c & 8 else pool[c & 7] for c in chosen]
        return struct.unpack("<I", bytes(picked))[0]

    assert_integers("prmt.b32 %o, %a, %b, %c;", permuted, ("u32", "u32", "u32"), "u32")
    assert_integers("prmt.b32 %o, %a, %b, 0x9F60;", lambda a, b: permuted(a, b, 0x9F60), ("u32", "u32"), "u32")


@pytest.mark.parametrize("table", [0x00, 0x80, 0x96, 0xE8, 0x1D, 0xFF])
def test_any_function_of_three_bits(table):
    def logic(a, b, c):
        return sum((table >> ((a >> n & 1) << 2 | (b >> n & 1) << 1 | c >> n & 1) & 1) << n for n in range(32))

    assert_integers(f"lop3.b32 %o, %a, %b, %c, {table};", logic, ("u32", "u32", "u32"), "u32")


def test_funnel_shifts():
    left = lambda a, b, by: (b << 32 | a) << (by % 32) >> 32  # noqa: E731
    right = lambda a, b, by: (b << 32 | a) >> (by % 32)  # noqa: E731
    assert_integers("shf.l.wrap.b32 %o, %a, %b, %c;", left, ("u32", "u32", "u32"), "u32")
    assert_integers("shf.r.wrap.b32 %o, %a, %b, %c;", right, ("u32", "u32", "u32"), "u32")


@pytest.mark.parametrize("kind", ["b16", "b32", "b64", "f32"])
def test_a_predicate_selects(kind):
    a, b = operands((kind, kind))
    chosen = np.arange(THREADS) % 3 == 0
    out = f"u{a.itemsize}"
    expected = np.where(chosen, a.view(out), b.view(out))
    np.testing.assert_array_equal(evaluate(f"selp.{kind} %o, %a, %b, %c;", [a, b, chosen], out), expected)


COMPARISONS = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}


@pytest.mark.parametrize("kind", [*INTEGERS, "f32", "f64"])
@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_of_which_none_holds_for_nan(name, kind):
    a, b = operands((kind, kind))
    ordered = ~(np.isnan(a) | np.isnan(b))
    expected = COMPARISONS[name](a, b) & ordered
    np.testing.assert_array_equal(evaluate(f"setp.{name}.{kind} %o, %a, %b;", [a, b], "bool"), expected)


@pytest.mark.parametrize(
    "name, function", [("lo", np.less), ("ls", np.less_equal), ("hi", np.greater), ("hs", np.greater_equal)]
)
def test_comparisons_without_sign(name, function):
    a, b = operands(("u32", "u32"))
    np.testing.assert_array_equal(evaluate(f"setp.{name}.u32 %o, %a, %b;", [a, b], "bool"), function(a, b))


def assert_floats(found, expected):
    """The same bits, but for a NaN any NaN."""
    unsigned = f"u{expected.itemsize}"
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    same = (found.view(unsigned) == expected.view(unsigned)) | np.isnan(expected)
    assert same.all(), (found[~same], expected[~same])


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_float_arithmetic_is_ieee(kind):
    a, b = operands((kind, kind))
    out = numpy_type(kind)
    functions = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.fmin, "max": np.fmax}
    with np.errstate(all="ignore"):
        for name, function in functions.items():
            rounding = ".rn" if name in ("add", "sub", "mul") else ""
            assert_floats(evaluate(f"{name}{rounding}.{kind} %o, %a, %b;", [a, b], out), function(a, b))
        assert_floats(evaluate(f"neg.{kind} %o, %a;", [a], out), -a)
        assert_floats(evaluate(f"abs.{kind} %o, %a;", [a], out), np.abs(a))


def test_extremes_may_keep_nan_and_be_of_sizes():
    a, b = operands(("f32", "f32"))
    product_sign = np.where(np.signbit(a) != np.signbit(b), -1, 1).astype("f4")
    for name, function in {"min": np.minimum, "max": np.maximum}.items():
        assert_floats(evaluate(f"{name}.NaN.f32 %o, %a, %b;", [a, b], "f4"), function(a, b))
        found = evaluate(f"{name}.NaN.xorsign.abs.f32 %o, %a, %b;", [a, b], "f4")
        assert_floats(found, function(np.abs(a), np.abs(b)) * product_sign)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_products_of_16_bits_are_rounded_to_nearest(kind):
    """One and two at a time; the second half of a pair is that of the upper 16 bits."""
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[kind]
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(2 * THREADS, generator=generator).to(dtype) for _ in range(3))
    for statement, expected in (
        ("mul.{} %o, %a, %b;", a * b),
        ("fma.rn.{} %o, %a, %b, %c;", (a.double() * b.double() + c.double()).to(dtype)),
    ):
        bits = [x.view(torch.int16).numpy().view("u2") for x in (a, b, c)][: statement.count("%") - 1]
        wanted = expected.view(torch.int16).numpy().view("u2")
        found = evaluate(statement.format(kind), [x[:THREADS] for x in bits], "u2")
        np.testing.assert_array_equal(found, wanted[:THREADS])
        found = evaluate(statement.format(f"{kind}x2"), [x.view("u4") for x in bits], "u4")
        np.testing.assert_array_equal(found, wanted.view("u4"))


def rounded(exact):
    """The float32 nearest to a fraction."""
    near = np.float32(float(exact))
    around = [np.nextafter(near, np.float32(way)) for way in (-np.inf, np.inf)]
    return min([near, *around], key=lambda x: (abs(Fraction(float(x)) - exact), x.view("u4") & 1))


def test_fused_products_are_rounded_once_but_for_a_last_bit():
    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal(THREADS).astype("f4") for _ in range(2))
    c = (-a * b).astype("f4")
    c[::2] = generator.standard_normal(THREADS // 2)
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
    expected = np.array([rounded(x) for x in exact])
    found = evaluate("fma.rn.f32 %o, %a, %b, %c;", [a, b, c], "f4")
    apart = np.abs(found.view("i4").astype("i8") - expected.view("i4"))
    assert apart.max() <= 1 and (apart == 0).mean() > 0.99
    assert (a * b + c != found)[1::2].mean() > 0.5, "a product rounded by itself gives something else"


def test_division_of_floats():
    a, b = operands(("f32", "f32"))
    with np.errstate(all="ignore"):
        for form in ("div.full.f32", "div.rn.f32"):
            assert_floats(evaluate(f"{form} %o, %a, %b;", [a, b], "f4"), a / b)


FUNCTIONS = {
    "ex2": np.exp2, "lg2": np.log2, "rcp": lambda x: 1 / x, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x),
    "tanh": np.tanh,
}  # fmt: skip


@pytest.mark.parametrize("flush", ["", ".ftz"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_exact_and_rounded(name, flush):
    (a,) = operands(("f32",))
    a[16:] = np.random.default_rng(0).uniform(-130, 130, THREADS - 16)

    def zeroed(x):
        return np.where(np.abs(x) < np.float32(1.17549435e-38), np.copysign(np.float32(0), x), x)

    with np.errstate(all="ignore"):
        expected = FUNCTIONS[name]((zeroed(a) if flush else a).astype("f8")).astype("f4")
    found = evaluate(f"{name}.approx{flush}.f32 %o, %a;", [a], "f4")
    assert_floats(found, zeroed(expected) if flush else expected)
    if name in ("ex2", "rcp"):
        assert (zeroed(expected) != expected).any(), "some results are denormal"


def ties():
    """Floats of which many lie between two halves, some exactly in the middle."""
    generator = np.random.default_rng(0)
    values = generator.standard_normal(THREADS).astype("f4").view("u4")
    values[::4] = values[::4] & 0xFFFF0000 | 0x8000  # in the middle of two bfloat16
    values[1::4] = values[1::4] & 0xFFFFE000 | 0x1000  # of two float16 and tf32
    values = values.view("f4")
    values[2 : 4 * len(FLOATS) : 4] = FLOATS
    return values


def halves_of(values, dtype):
    """The bits that PyTorch converts to; of a NaN the canonical ones."""
    bits = torch.from_numpy(values.copy()).to(dtype).view(torch.int16).numpy().view("u2")
    return np.where(np.isnan(values), np.uint16(0x7FFF), bits)


@pytest.mark.parametrize("kind, dtype", [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_conversion_to_halves_rounds_to_nearest_even(kind, dtype):
    a, b = ties(), ties()[::-1].copy()
    low, high = halves_of(b, dtype), halves_of(a, dtype)
    np.testing.assert_array_equal(evaluate(f"cvt.rn.{kind}.f32 %o, %a;", [a], "u2"), high)
    pairs = evaluate(f"cvt.rn.{kind}x2.f32 %o, %a, %b;", [a, b], "u4")
    np.testing.assert_array_equal(pairs, high.astype("u4") << 16 | low)


@pytest.mark.parametrize("kind, dtype", [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_conversion_from_halves_is_exact(kind, dtype):
    for first in range(0, 65536, 8192):
        bits = np.arange(first, first + 8192, 32, dtype="u2")
        expected = torch.from_numpy(bits.view("i2").copy()).view(dtype).float().numpy()
        assert_floats(evaluate(f"cvt.f32.{kind} %o, %a;", [bits], "f4"), expected)


@pytest.mark.parametrize("kind, dtype", [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_products_of_halves_are_rounded_once(kind, dtype):
    """A sum of theirs twice; here of numbers of which float32 has the sum."""
    bits = np.random.default_rng(0).integers(0, 65536, (4, THREADS)).astype("u2")
    a, b, c, d = (torch.from_numpy(some.view("i2")).view(dtype).double() for some in bits)
    product = halves_of((a * b).float().numpy(), dtype)
    np.testing.assert_array_equal(evaluate(f"mul.{kind} %o, %a, %b;", [bits[0], bits[1]], "u2"), product)
    pairs = [bits[n].astype("u4") | bits[n + 2].astype("u4") << 16 for n in range(2)]
    other = halves_of((c * d).float().numpy(), dtype).astype("u4") << 16
    np.testing.assert_array_equal(evaluate(f"mul.{kind}x2 %o, %a, %b;", pairs, "u4"), other | product)
    sums = halves_of((a * b + a).float().numpy(), dtype)
    np.testing.assert_array_equal(evaluate(f"fma.rn.{kind} %o, %a, %b, %c;", [bits[0], bits[1], bits[0]], "u2"), sums)


def test_conversion_to_tf32_rounds_ties_away_from_zero():
    a = ties()
    found = evaluate("cvt.rna.tf32.f32 %o, %a;", [a], "u4")
    finite = np.isfinite(a)
    assert (found[finite] & 0x1FFF == 0).all()
    scaled, exponent = np.frexp(a[finite].astype("f8"))
    nearest = np.ldexp(np.copysign(np.floor(np.abs(scaled) * 2**11 + 0.5), scaled), exponent - 11)
    normal = np.abs(a[finite]) > 1e-37
    np.testing.assert_array_equal(found.view("f4")[finite][normal], nearest.astype("f4")[normal])
    assert (found[np.isnan(a)] == 0x7FFFFFFF).all()


@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("to", INTEGERS)
def test_conversion_of_integers_truncates_and_extends(to, source):
    (a,) = operands((source,))
    out = numpy_type(to)
    np.testing.assert_array_equal(evaluate(f"cvt.{to}.{source} %o, %a;", [a], out), a.astype(out))


@pytest.mark.parametrize("source", ["u8", "s8"])
@pytest.mark.parametrize("to", ["u16", "s16", "u32", "s32"])
def test_conversion_of_bytes(to, source):
    """A byte lies in a wider register, whose upper bits are not read; what is converted to a byte fills one."""
    (a,) = operands(("b32",))
    out, byte = numpy_type(to), numpy_type(source)
    np.testing.assert_array_equal(evaluate(f"cvt.{to}.{source} %o, %a;", [a], out), a.astype(byte).astype(out))
    wide = f"{byte[0]}2"
    np.testing.assert_array_equal(evaluate(f"cvt.{source}.u32 %o, %a;", [a], wide), a.astype(byte).astype(wide))


@pytest.mark.parametrize("source", INTEGERS)
def test_conversion_of_integers_to_floats_rounds_once(source):
    (a,) = operands((source,))
    expected = np.array([rounded(Fraction(x)) for x in a.tolist()], "f4")
    assert_floats(evaluate(f"cvt.rn.f32.{source} %o, %a;", [a], "f4"), expected)
    small = (a % 4099).astype(a.dtype)
    nearest = np.array([np.float16(x) for x in small.tolist()])
    assert_floats(evaluate(f"cvt.rn.f16.{source} %o, %a;", [small], "f2"), nearest)


@pytest.mark.parametrize("source, kind", [("f16", "f2"), ("f32", "f4")])
def test_floats_become_integers_towards_zero(source, kind):
    a = np.array([0.0, -0.9, 0.9, 2.5, -2.5, 1023.5, np.nan, np.inf, -np.inf] + [3e9, -3e9] * (kind == "f4"), kind)
    expected = [0, 0, 0, 2, -2, 1023, 0, 2**31 - 1, -(2**31)] + [2**31 - 1, -(2**31)] * (kind == "f4")
    found = evaluate(f"cvt.rzi.s32.{source} %o, %a;", [np.resize(a, 64)], "i4")
    assert found[: len(a)].tolist() == expected


def test_moves_pack_and_unpack():
    a, b = operands(("b32", "b32"))
    wide = evaluate("mov.b64 %o, {%a, %b};", [a, b], "u8")
    np.testing.assert_array_equal(wide, b.astype("u8") << 32 | a)
    np.testing.assert_array_equal(evaluate("mov.b64 {%o, _}, %a;", [wide], "u4"), a)
    np.testing.assert_array_equal(evaluate("mov.b64 {_, %o}, %a;", [wide], "u4"), b)
    np.testing.assert_array_equal(evaluate("mov.b32 {_, %o}, %a;", [a], "u2"), a >> 16)
    np.testing.assert_array_equal(evaluate("mov.b32 %o, 0f3FC00000;", [a], "f4"), np.full(THREADS, 1.5, "f4"))
    np.testing.assert_array_equal(evaluate("mov.b32 %o, -3;", [a], "i4"), np.full(THREADS, -3, "i4"))


def test_special_registers():
    out = zeros(12, 64, 7)
    names = ("tid.x", "ntid.x", "ctaid.x", "ctaid.y", "nctaid.x", "nctaid.y", "laneid")
    body = "mov.u32 %r10, %ctaid.x; mov.u32 %r11, %ctaid.y; mad.lo.u32 %r10, %r11, 3, %r10;"
    body += "mad.lo.u32 %r10, %r10, 64, %tid; mul.wide.u32 %d10, %r10, 28; add.s64 %d10, %d10, %d0;"
    for n, name in enumerate(names):
        body += f"mov.u32 %r12, %{name}; st.global.b32 [%d10+{4 * n}], %r12;"
    run(body, out, threads=64, grid=(3, 4))
    for block, thread in itertools.product(range(12), range(64)):
        expected = [thread, 64, block % 3, block // 3, 3, 4, thread % 32]
        assert out[block, thread].tolist() == expected


@pytest.mark.parametrize(
    "statement",
    ["sad.u32 %o, %a, %a, %a;", "add.cc.u32 %o, %a, %a;", "add.sat.s32 %o, %a, %a;", "mul.ftz.f32 %o, %a, %a;",
     "cvt.rz.f32.u32 %o, %a;", "cvt.rn.satfinite.e4m3x2.f32 %o, %a, %a;", "mul24.lo.u32 %o, %a, %a;",
     "bfe.u32 %o, %a, %a, 3;", "shf.l.clamp.b32 %o, %a, %a, %a;", "fma.rn.f64 %o, %a, %a, %a;",
     "setp.lt.and.f32 %o, %a, %a, %a;", "min.ftz.f32 %o, %a, %a;", "add.f16x2 %o, %a, %a;"],
)  # fmt: skip
def test_what_is_not_modelled_is_refused(statement):
    with pytest.raises(Fault, match="no such"):
        evaluate(statement, [np.zeros(32, "u4")], "u4")
