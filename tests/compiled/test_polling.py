"""The PTX by which the kernels in Gluon see an unpublished element in 16 bytes, executed for every half of a word.

The interpreter runs no PTX, and these few instructions need no kernel: the emulator executes them by themselves.
"""

from __future__ import annotations

import pytest
import torch
from lstm_triton_kernels.tensor_core_plan import no_gluon

from tests.emulator.small_kernels import run

if no_gluon() is not None:
    pytest.skip(no_gluon(), allow_module_level=True)

from lstm_triton_kernels.polling import missing_ptx

THREADS = 1024
OTHERS = (0x0000, 0x0001, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xBEEF, 0xFFFD, 0xFFFE)


def seen_missing(words, bits, has_max):
    """Whether each row of four words, given as unsigned numbers (n, 4), has an element that is all ones."""
    found = torch.zeros(len(words), dtype=torch.int32)
    load = "ld.global.v4.b32 {%r50, %r51, %r52, %r53}, [%d20];"
    body = [
        "mov.u32 %r10, %ctaid.x;", f"mad.lo.s32 %r10, %r10, {THREADS}, %tid;", "mul.wide.u32 %d20, %r10, 16;",
        "add.s64 %d20, %d20, %d0;", load, ".reg .b32 %seen, %t;", ".reg .pred %absent;",
        *missing_ptx(["%r50", "%r51", "%r52", "%r53"], "%absent", bits, has_max),
        "selp.b32 %r11, 1, 0, %absent;", "mul.wide.u32 %d21, %r10, 4;", "add.s64 %d21, %d21, %d1;",
        "st.global.b32 [%d21], %r11;",
    ]  # fmt: skip
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).contiguous()
    machine = run("\n".join(body), signed, found, threads=THREADS, grid=(len(words) // THREADS,))
    assert not len(machine.findings), list(machine.findings)
    return found.bool()


@pytest.mark.parametrize("has_max", [True, False], ids=["sm_90", "before sm_90"])
@pytest.mark.parametrize("upper", [False, True], ids=["lower", "upper"])
def test_a_half_is_seen_as_unpublished_if_it_is_all_ones_and_only_then(upper, has_max):
    """Every value of a half, beside others that are nearly all ones."""
    half = torch.arange(0x10000)
    for other in OTHERS:
        word = other | half << 16 if upper else half | other << 16
        seen = seen_missing(word[:, None].expand(-1, 4), 16, has_max)
        assert seen[0xFFFF] and not seen[:0xFFFF].any()


@pytest.mark.parametrize("bits, has_max", [(16, True), (16, False), (32, True)])
def test_one_element_is_enough_wherever_it_is(bits, has_max):
    others = torch.tensor(OTHERS)
    halves = others[torch.randint(len(OTHERS), (THREADS, 8), generator=torch.Generator().manual_seed(0))]
    for place in range(128 // bits):
        some = halves.clone()
        some[::2, place * bits // 16 : (place + 1) * bits // 16] = 0xFFFF
        seen = seen_missing(some[:, ::2] | some[:, 1::2] << 16, bits, has_max)
        assert seen[::2].all() and not seen[1::2].any()


def test_a_word_with_one_half_of_all_ones_is_published():
    half = torch.arange(0x10000)
    for word in (half | 0xFFFF << 16, half << 16 | 0xFFFF):
        assert torch.equal(seen_missing(word[:, None].expand(-1, 4), 32, True), word == 0xFFFFFFFF)
