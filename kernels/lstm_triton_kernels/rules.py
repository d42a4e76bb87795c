"""The rules of regularised steps on blocks of any shape: dropout of the candidate, clipping, zoneout.

`rules` is a `regularize.KernelRules`, whose fields are None for what there is not: then a function returns what it is
given, and nothing of it is compiled. `code` holds the bits of a block's elements, int32; it is read where masks are
drawn. Equations and bits: regularize.py.
"""

import triton
import triton.language as tl

from lstm_triton_kernels.equations import cell_derivatives, next_cell
from lstm_triton_kernels.regularize import CANDIDATE, ZONEOUT_C, ZONEOUT_H

CANDIDATE_BIT = tl.constexpr(CANDIDATE)
ZONEOUT_H_BIT = tl.constexpr(ZONEOUT_H)
ZONEOUT_C_BIT = tl.constexpr(ZONEOUT_C)


@triton.jit
def drop_candidate(g, code, rules):
    """Return g, or its gradient, with the mask of this step."""
    if rules.candidate_scale is not None:
        g = tl.where((code & CANDIDATE_BIT) != 0, 0.0, g * rules.candidate_scale)
    return g


@triton.jit
def clip(x, limit):
    """Return x within [-limit, limit]; a NaN stays one."""
    if limit is not None:
        x = tl.clamp(x, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    return x


@triton.jit
def clip_gradient(d, x, limit):
    """Return the gradient of a value from that of the clipped x: zero where x is at the limit."""
    if limit is not None:
        d = tl.where((x >= limit) | (x <= -limit), 0.0, d)
    return d


@triton.jit
def zone(new, previous, code, rate, DRAWN: tl.constexpr, BIT: tl.constexpr):
    """Return the new value, or where its bit is set the previous one; not DRAWN the expectation."""
    if rate is not None:
        if DRAWN:
            new = tl.where((code & BIT) != 0, previous, new)
        else:
            new += rate * (previous - new)
    return new


@triton.jit
def zone_gradients(d, code, rate, DRAWN: tl.constexpr, BIT: tl.constexpr):
    """Return of the gradient of what `zone` returned that of the new value and that of the previous one."""
    if rate is not None:
        if DRAWN:
            kept = (code & BIT) != 0
            return tl.where(kept, 0.0, d), tl.where(kept, d, 0.0)
        else:
            return d - rate * d, rate * d
    else:
        return d, d * 0.0


@triton.jit
def regularized_cell(i, f, g, c_previous, c, code, rules):
    """Return c~ from the gates and c_{t-1}, and from c = f c_{t-1} + i g, which it is where no rule changes it."""
    if rules.candidate_scale is not None:
        c = f * c_previous + i * drop_candidate(g, code, rules)
    return clip(c, rules.cell_clip)


@triton.jit
def computed_cell(i, f, g, c_previous, c, code, rules):
    """Return c~, what a step computed, from its gates and c_{t-1}, and from c_t where that is c~."""
    if rules.zoneout_c is not None:
        again = regularized_cell(i, f, g, c_previous, f * c_previous + i * g, code, rules)
        if rules.codes is not None:
            c = tl.where((code & ZONEOUT_C_BIT) != 0, again, c)
        else:
            c = again
    return c


@triton.jit
def load_codes(codes_ptr, place, mask):
    """Load the codes of a block at these offsets as int32, 0 where masked; 0 where no masks are drawn."""
    if codes_ptr is not None:
        return tl.load(codes_ptr + place, mask=mask, other=0).to(tl.int32)
    else:
        return 0


@triton.jit
def next_computed_cell(
    a, v, c_previous, code, rules, COUPLED: tl.constexpr, DIAGONAL: tl.constexpr, IDENTITY_INPUT: tl.constexpr
):
    """Return i, f, g and c~, as `equations.next_cell` returns i, f, g and c_t; g is without its mask."""
    i, f, g, c = next_cell(a, v, c_previous, COUPLED, DIAGONAL, IDENTITY_INPUT)
    return i, f, g, regularized_cell(i, f, g, c_previous, c, code, rules)


@triton.jit
def computed_cell_derivatives(i, f, g, c_previous, code, rules, COUPLED: tl.constexpr, IDENTITY_INPUT: tl.constexpr):
    """Return how c~, before its clip, changes with the pre-activations of i, f and g: `equations.cell_derivatives`."""
    by_i, by_f, by_g = cell_derivatives(i, f, g, c_previous, COUPLED, IDENTITY_INPUT)
    if rules.candidate_scale is not None:
        dropped = drop_candidate(g, code, rules)
        by_i, by_f, _ = cell_derivatives(i, f, dropped, c_previous, COUPLED, IDENTITY_INPUT)
        by_g = drop_candidate(by_g, code, rules)
    return by_i, by_f, by_g
