"""The equations of a cell, forward and backward, on blocks of any shape; every variant is a flag.

`a` and `v` are tuples: the pre-activations of the gate blocks in the order i, f, g, o (coupled: f, g, o), and the
diagonal peephole of the blocks i, f, o (coupled: f, o), unused without DIAGONAL. The output gate has a function of its
own, since a full peephole on c_t needs a matmul before it.
"""

import triton
import triton.language as tl

from lstm_triton_kernels.activations import sigmoid, tanh


@triton.jit
def activation(x, IDENTITY: tl.constexpr):
    """Return the activation of g, or of c~ where o is multiplied with it: tanh(x), or x itself."""
    if IDENTITY:
        return x
    else:
        return tanh(x)


@triton.jit
def next_cell(a, v, c_previous, COUPLED: tl.constexpr, DIAGONAL: tl.constexpr, IDENTITY_INPUT: tl.constexpr):
    """Return i, f, g and c_t = f c_{t-1} + i g."""
    F: tl.constexpr = 0 if COUPLED else 1
    a_f = a[F]
    if DIAGONAL:
        a_f += v[F] * c_previous
    f = sigmoid(a_f)
    g = activation(a[F + 1], IDENTITY_INPUT)
    if COUPLED:
        i = 1.0 - f
    else:
        a_i = a[0]
        if DIAGONAL:
            a_i += v[0] * c_previous
        i = sigmoid(a_i)
    return i, f, g, f * c_previous + i * g


@triton.jit
def output_gate(a_o, v, c_previous, c, DIAGONAL: tl.constexpr, OUTPUT_CURRENT: tl.constexpr):
    """Return o, which reads c_{t-1} or c_t."""
    if DIAGONAL:
        a_o += v[len(v) - 1] * (c if OUTPUT_CURRENT else c_previous)
    return sigmoid(a_o)


@triton.jit
def output_derivatives(o, c, IDENTITY_OUTPUT: tl.constexpr):
    """Return, from h_t = o tanh(c_t) or o c_t, how h_t changes with o's pre-activation and with c_t."""
    if IDENTITY_OUTPUT:
        return c * o * (1.0 - o), o
    else:
        tanh_c = tanh(c)
        return tanh_c * o * (1.0 - o), o * (1.0 - tanh_c * tanh_c)


@triton.jit
def cell_derivatives(i, f, g, c_previous, COUPLED: tl.constexpr, IDENTITY_INPUT: tl.constexpr):
    """Return, from c_t = f c_{t-1} + i g, how c_t changes with the pre-activations of i, f and g.

    Coupled, i and f have one, that of f.
    """
    if IDENTITY_INPUT:
        by_g = i
    else:
        by_g = i * (1.0 - g * g)
    if COUPLED:
        by_f = (c_previous - g) * f * (1.0 - f)
        by_i = by_f
    else:
        by_f = c_previous * f * (1.0 - f)
        by_i = g * i * (1.0 - i)
    return by_i, by_f, by_g


@triton.jit
def previous_cell_gradient(
    dc, f, d_i, d_f, d_o, v, COUPLED: tl.constexpr, DIAGONAL: tl.constexpr, OUTPUT_CURRENT: tl.constexpr
):
    """Return the gradient of c_{t-1} from that of c_t: through f, and through the peepholes that read c_{t-1}."""
    dc_previous = dc * f
    if DIAGONAL:
        F: tl.constexpr = 0 if COUPLED else 1
        dc_previous += v[F] * d_f
        if not COUPLED:
            dc_previous += v[0] * d_i
        if not OUTPUT_CURRENT:
            dc_previous += v[F + 1] * d_o
    return dc_previous


@triton.jit
def load_peephole(w_ch_ptr, unit, H, COUPLED: tl.constexpr, DIAGONAL: tl.constexpr):
    """Load the blocks of a diagonal w_ch (Q·H,) as rows (1, BLOCK_U) in their own type; without DIAGONAL none."""
    v = ()
    if DIAGONAL:
        for block in tl.static_range(2 if COUPLED else 3):
            v = v + (tl.load(w_ch_ptr + block * H + unit, mask=unit < H, other=0.0)[None, :],)  # noqa: RUF005
    return v


@triton.jit
def load_blocks(ptr, H, mask, BLOCKS: tl.constexpr):
    """Load gate blocks 0 to BLOCKS - 1, H elements apart, of the tile at ptr, as a tuple; 0 where masked."""
    blocks = ()
    for block in tl.static_range(BLOCKS):
        blocks = blocks + (tl.load(ptr + block * H, mask=mask, other=0.0),)  # noqa: RUF005
    return blocks


@triton.jit
def store_blocks(ptr, blocks, H, mask):
    """Store a tuple of gate blocks, H elements apart, into the tile at ptr, in its type."""
    for block in tl.static_range(len(blocks)):
        tl.store(ptr + block * H, blocks[block].to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_gates(ptr, i, f, g, H, mask, COUPLED: tl.constexpr):
    """Store the values of the gates i, f, g (coupled: f, g) into the blocks of the tile at ptr."""
    F: tl.constexpr = 0 if COUPLED else 1
    if not COUPLED:
        tl.store(ptr, i.to(ptr.dtype.element_ty), mask=mask)
    tl.store(ptr + F * H, f.to(ptr.dtype.element_ty), mask=mask)
    tl.store(ptr + (F + 1) * H, g.to(ptr.dtype.element_ty), mask=mask)
