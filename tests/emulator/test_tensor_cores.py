"""Products of the tensor cores against products of plain matrices, and the matrices that they load and store."""

import itertools

import numpy as np
import pytest
import torch

from tests.emulator import Fault
from tests.emulator.small_kernels import checks, run, tensor_of, zeros

FORMS = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}


def random_matrix(rows, columns, form, seed):
    """A matrix of the form's values, in float64, and its elements' bits."""
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(FORMS[form])
    bits = matrix.view(torch.int32 if form == "tf32" else torch.int16).numpy()
    if form == "tf32":
        return (bits & ~0x1FFF).view("f4").astype("f8"), bits
    return matrix.double().numpy(), bits


def register_of(matrix, rows_and_columns):
    """One 32-bit register from one element, or two of 16 bits, the first lower."""
    elements = [int(matrix[row, column]) for row, column in rows_and_columns]
    if len(elements) == 1:
        return elements[0] & 0xFFFFFFFF
    return (elements[0] & 0xFFFF) | (elements[1] & 0xFFFF) << 16


def fragments(a, b, form):
    """For each lane its registers of a (16, K) and of b (K, 8): figures of the PTX ISA, element by element."""
    left, right = [], []
    for lane in range(32):
        group, member = lane // 4, lane % 4
        if form == "tf32":
            left.append([register_of(a, [(group + 8 * (r % 2), member + 4 * (r // 2))]) for r in range(4)])
            right.append([register_of(b, [(member + 4 * r, group)]) for r in range(2)])
        else:
            left.append(
                [
                    register_of(a, [(group + 8 * (r % 2), 2 * member + e + 8 * (r // 2)) for e in range(2)])
                    for r in range(4)
                ]
            )
            right.append([register_of(b, [(2 * member + e + 8 * r, group) for e in range(2)]) for r in range(2)])
    return np.array(left, "u4"), np.array(right, "u4")


def load_registers(first, count, argument):
    """Statements that load `count` registers from %rFIRST on, of each lane a row of a tensor."""
    lines = [f"mul.wide.u32 %d20, %tid, {4 * count};", f"add.s64 %d20, %d20, %d{argument};"]
    return "\n".join(lines + [f"ld.global.b32 %r{first + n}, [%d20+{4 * n}];" for n in range(count)])


def store_registers(first, count, argument):
    lines = [f"mul.wide.u32 %d20, %tid, {4 * count};", f"add.s64 %d20, %d20, %d{argument};"]
    return "\n".join(lines + [f"st.global.b32 [%d20+{4 * n}], %r{first + n};" for n in range(count)])


def listed(first, count):
    return "{" + ", ".join(f"%r{first + n}" for n in range(count)) + "}"


def accumulators(found):
    """(lanes, 4) registers as a matrix (16, 8): figure of the PTX ISA."""
    matrix = np.zeros((16, 8), "f4")
    for lane, r in itertools.product(range(32), range(4)):
        matrix[lane // 4 + 8 * (r // 2), lane % 4 * 2 + r % 2] = found[lane, r]
    return matrix


@pytest.mark.parametrize("form", FORMS)
def test_mma_is_a_matrix_product(form):
    depth = 8 if form == "tf32" else 16
    (a, a_bits), (b, b_bits) = random_matrix(16, depth, form, 0), random_matrix(depth, 8, form, 1)
    left, right = fragments(a_bits, b_bits, form)
    c = np.random.default_rng(0).standard_normal((32, 4)).astype("f4")
    out = zeros(32, 4)
    product = f"mma.sync.aligned.m16n8k{depth}.row.col.f32.{form}.{form}.f32 {listed(8, 4)}, {listed(0, 4)}, "
    product += f"{listed(4, 2)}, {listed(8, 4)};"
    body = [
        load_registers(0, 4, 0),
        load_registers(4, 2, 1),
        load_registers(8, 4, 2),
        product,
        store_registers(8, 4, 3),
    ]
    run("\n".join(body), tensor_of(left), tensor_of(right), tensor_of(c), out)
    expected = (a @ b + accumulators(c)).astype("f4")
    np.testing.assert_array_equal(accumulators(out.numpy().view("f4")), expected)


def shared_of(words):
    """Statements that copy a tensor of so many words, the first argument, into shared memory."""
    return f"""
mov.u32 %r150, global_smem;
mov.b32 %r151, %tid;
$copy:
shl.b32 %r152, %r151, 2;
add.u32 %r153, %r150, %r152;
mul.wide.u32 %d30, %r151, 4;
add.s64 %d30, %d30, %d0;
ld.global.b32 %r154, [%d30];
st.shared.b32 [%r153], %r154;
add.u32 %r151, %r151, %ntid.x;
setp.lt.u32 %p9, %r151, {words};
@%p9 bra $copy;
bar.sync 0;
"""


def row_address(count):
    """Statements that point %r10 of each lane to a row of 16 bytes."""
    return f"and.b32 %r10, %tid, {8 * count - 1}; shl.b32 %r10, %r10, 4; add.u32 %r10, %r10, %r150;"


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", ["", ".trans"])
def test_ldmatrix_gives_each_lane_its_elements(count, transposed):
    memory = np.arange(count * 64, dtype="u2").reshape(count, 8, 8)
    out = zeros(32, count)
    body = shared_of(count * 32) + row_address(count)
    body += f"ldmatrix.sync.aligned.m8n8.x{count}{transposed}.shared.b16 {listed(20, count)}, [%r10];"
    assert not checks(run(body + store_registers(20, count, 1), tensor_of(memory), out))
    for lane, n in itertools.product(range(32), range(count)):
        matrix = memory[n].T if transposed else memory[n]
        low, high = matrix[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2]
        assert out[lane, n] == int(low) | int(high) << 16


@pytest.mark.parametrize("instruction", ["ldmatrix", "mma"])
def test_a_warp_may_go_alone(instruction):
    """Of three warps the second alone loads matrices, or multiplies; the others keep what they have."""
    memory = np.arange(192, dtype="u2").reshape(3, 8, 8)
    body = shared_of(96) + "and.b32 %r10, %tid, 7; shl.b32 %r10, %r10, 4;"
    body += "add.u32 %r10, %r10, %r150; mov.b32 %r20, 7; mov.b32 %r21, 0; mov.b32 %r22, 0; mov.b32 %r23, 0;"
    body += "shr.u32 %r11, %tid, 5; setp.ne.u32 %p1, %r11, 1; @%p1 bra $over;"
    if instruction == "ldmatrix":
        body += "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r20}, [%r10];"
    else:
        product = f"{listed(20, 4)}, {listed(30, 4)}, {listed(34, 2)}, {listed(20, 4)};"
        body += "mov.b32 %r20, 0f40000000;" + "".join(f"mov.b32 %r{n}, 0;" for n in range(30, 36))
        body += f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {product}"
    out = zeros(96)
    assert not checks(run(f"{body}\n$over:\n{store_registers(20, 1, 1)}", tensor_of(memory), out, threads=96))
    found = memory[0].ravel().view("i4").tolist() if instruction == "ldmatrix" else [0x40000000] * 32
    assert out.tolist() == [7] * 32 + found + [7] * 32


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", ["", ".trans"])
def test_stmatrix_is_the_inverse_of_ldmatrix(count, transposed):
    memory = np.arange(count * 64, dtype="u2")
    out = zeros(count * 32)
    body = shared_of(count * 32) + row_address(count)
    body += f"ldmatrix.sync.aligned.m8n8.x{count}{transposed}.shared.b16 {listed(20, count)}, [%r10];"
    body += "bar.sync 0;" + "".join(f"add.u16x2 %r{20 + n}, %r{20 + n}, 0x10001;" for n in range(count))
    body += f"stmatrix.sync.aligned.m8n8.x{count}{transposed}.shared.b16 [%r10], {listed(20, count)}; bar.sync 0;"
    for n in range(count):
        body += f"add.u32 %r30, %tid, {32 * n}; shl.b32 %r31, %r30, 2; add.u32 %r31, %r31, %r150;"
        body += "ld.shared.b32 %r32, [%r31];"
        body += "mul.wide.u32 %d20, %r30, 4; add.s64 %d20, %d20, %d1; st.global.b32 [%d20], %r32;"
    assert not checks(run(body, tensor_of(memory), out))
    np.testing.assert_array_equal(out.numpy().view("u2"), memory + 1)


def swizzled(matrix, mode):
    """A K-major operand (rows, K) as it lies in shared memory, and the fields of its descriptor."""
    rows = len(matrix)
    row_bytes = np.ascontiguousarray(matrix).view("u1").reshape(rows, -1)
    memory = np.zeros(row_bytes.size, "u1")
    width = {0: 16, 1: 128, 2: 64, 3: 32}[mode]
    assert mode == 0 or row_bytes.shape[1] == width
    for row, byte in itertools.product(range(rows), range(row_bytes.shape[1])):
        if mode == 0:  # core matrices of 8 rows by 16 bytes, those of one row group next to each other
            place = (row // 8 * (row_bytes.shape[1] // 16) + byte // 16) * 128 + row % 8 * 16 + byte % 16
        else:
            chunk = byte // 16 ^ row % 8 * width // 128  # 16 bytes are exchanged by the row
            place = row * width + chunk * 16 + byte % 16
        memory[place] = row_bytes[row, byte]
    stride = 8 * row_bytes.shape[1]
    leading = 128 if mode == 0 else 16
    return memory, mode << 62 | (stride >> 4) << 32 | (leading >> 4) << 16


@pytest.mark.parametrize("form, mode", [("bf16", 0), ("bf16", 1), ("bf16", 2), ("f16", 3), ("tf32", 1), ("tf32", 3)])
@pytest.mark.parametrize("left_in_registers", [False, True])
@pytest.mark.parametrize("added", [True, False])
def test_wgmma_is_a_matrix_product(form, mode, left_in_registers, added):
    """A warp group's 64 rows by 16 columns, over the first K of a row of shared memory, added to what is there."""
    depth = 8 if form == "tf32" else 16
    width = {0: 32, 1: 128, 2: 64, 3: 32}[mode] // (4 if form == "tf32" else 2)
    (a, a_bits), (b, b_bits) = random_matrix(64, width, form, 0), random_matrix(16, width, form, 1)
    a_memory, a_fields = swizzled(a_bits, mode)
    b_memory, b_fields = swizzled(b_bits, mode)
    fill = -len(a_memory) % 1024
    memory = np.concatenate([a_memory, np.zeros(fill, "u1"), b_memory])
    start = 0x400  # where shared memory begins
    c = np.random.default_rng(0).standard_normal((128, 8)).astype("f4")
    left = np.concatenate([fragments(a_bits[16 * w :], b_bits[:8].T, form)[0] for w in range(4)])
    out = zeros(128, 8)
    descriptors = [a_fields | start >> 4, b_fields | start + len(a_memory) + fill >> 4]
    left_operand = listed(30, 4) if left_in_registers else "%d10"
    body = shared_of(len(memory) // 4) + load_registers(20, 8, 1) + load_registers(30, 4, 2)
    body += f"fence.proxy.async.shared::cta; bar.sync 0; setp.lt.u32 %p1, %tid, {128 if added else 0};"
    body += f"mov.b64 %d10, {descriptors[0]}; mov.b64 %d11, {descriptors[1]}; wgmma.fence.sync.aligned;"
    body += f"wgmma.mma_async.sync.aligned.m64n16k{depth}.f32.{form}.{form} "
    body += f"{listed(20, 8)}, {left_operand}, %d11, %p1, 1, 1"
    body += ";" if form == "tf32" else (", 0;" if left_in_registers else ", 0, 0;")
    body += "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
    arguments = [tensor_of(memory), tensor_of(c), tensor_of(left), out]
    machine = run(body + store_registers(20, 8, 3), *arguments, threads=128, shared=len(memory))
    assert not checks(machine), list(machine.findings)
    for warp, tile in itertools.product(range(4), range(2)):
        lanes, columns = slice(32 * warp, 32 * warp + 32), slice(4 * tile, 4 * tile + 4)
        product = a[16 * warp : 16 * warp + 16, :depth] @ b[8 * tile : 8 * tile + 8, :depth].T
        expected = (product + added * accumulators(c[lanes, columns])).astype("f4")
        np.testing.assert_array_equal(accumulators(out.numpy().view("f4")[lanes, columns]), expected)


def test_other_shapes_are_refused():
    registers = f"{listed(8, 4)}, {listed(0, 4)}, {listed(4, 2)}, {listed(8, 4)};"
    with pytest.raises(Fault, match="no such form"):
        run("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 " + registers)
    with pytest.raises(Fault, match="no such form"):
        run("mma.sync.aligned.m16n8k16.row.row.f32.bf16.bf16.f32 " + registers)
