"""An sLSTM (Beck et al. 2024, "xLSTM"), step by step: one product and one elementwise kernel for each step.

With a = W x_t + b + R h_{t-1}, split in blocks, and s the logistic function:

    i = exp(a_i)                      f = exp(a_f) or s(a_f)
    z = tanh(a_z)                     o = s(a_o)
    c_t = f c_{t-1} + i z             the cell state
    n_t = f n_{t-1} + i               the normaliser
    h_t = o c_t / n_t

exp overflows, so c and n are kept divided by e^m, where the stabiliser m grows with the largest exponent:

    m_t = max(log f + m_{t-1}, a_i)
    c_t = f' c_{t-1} + i' z           i' = exp(a_i - m_t)
    n_t = f' n_{t-1} + i'             f' = exp(log f + m_{t-1} - m_t)

No exponent is above 0 now. h_t is the same, whatever m_t is, since e^m cancels in c_t / n_t: so m_t is a constant to
the gradients, and has none. A state (c, n, m) stands for e^m c and e^m n; the initial one is (0, 0, -inf), after which
n_t is at least 1.

The blocks of the parameters have the order i, f, z, o: weight_ih W (4·H, I), weight_hh R (4·H, H), bias b (4·H,). R is
not divided into heads here. Shapes: T time steps, B batch rows, I input features, H hidden units.
`docs/own-cell.md` explains this file.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from lstm_triton_kernels.activations import log_sigmoid, sigmoid, tanh
from lstm_triton_kernels.blocks import elementwise_blocks
from lstm_triton_kernels.equations import load_blocks, store_blocks
from lstm_triton_kernels.gates import recurrent_product
from lstm_triton_kernels.sizes import accumulator_dtype
from torch import Tensor
from torch.autograd.function import once_differentiable

State = tuple[Tensor, Tensor, Tensor]
"""c, n and m, (B, H) each, in the accumulator type."""


def initial_state(B: int, H: int, dtype: torch.dtype, device: torch.device | str | None = None) -> State:
    """Return (0, 0, -inf) for tensors of a type: B rows of H units, in float32 (float64 for float64)."""
    zero = torch.zeros(B, H, dtype=accumulator_dtype(dtype), device=device)
    return zero, zero.clone(), torch.full_like(zero, -torch.inf)


def reference(
    x: Tensor, h_0: Tensor, state: State, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor,
    exp_forget: bool = False, constant_stabilizer: bool = True,
) -> tuple[Tensor, State]:  # fmt: skip
    """Return h_t of all steps (T, B, H) and the last state: the equations in PyTorch, of any type.

    x (T, B, I), h_0 (B, H). exp_forget: f = exp(a_f), else s(a_f). constant_stabilizer: whether m_t is a constant to
    autograd, as it is in the kernels.
    """
    h, (c, n, m), output = h_0, state, []
    for x_t in x:
        a_i, a_f, a_z, a_o = (x_t @ weight_ih.T + bias + h @ weight_hh.T).chunk(4, -1)
        log_f = a_f if exp_forget else torch.nn.functional.logsigmoid(a_f)
        m_previous, m = m, torch.maximum(log_f + m, a_i)
        if constant_stabilizer:
            m = m.detach()
        i, f = torch.exp(a_i - m), torch.exp(log_f + m_previous - m)
        c = f * c + i * torch.tanh(a_z)
        n = f * n + i
        h = torch.sigmoid(a_o) * c / n
        output.append(h)
    return torch.stack(output), (c, n, m)


def unstabilized(
    x: Tensor, h_0: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor, exp_forget: bool = False
) -> Tensor:
    """Return h_t of all steps (T, B, H) by the equations without m, from c_0 = n_0 = 0; NaN where exp overflows."""
    h, output = h_0, []
    c = n = torch.zeros_like(h_0)
    for x_t in x:
        a_i, a_f, a_z, a_o = (x_t @ weight_ih.T + bias + h @ weight_hh.T).chunk(4, -1)
        i, f = torch.exp(a_i), torch.exp(a_f) if exp_forget else torch.sigmoid(a_f)
        c = f * c + i * torch.tanh(a_z)
        n = f * n + i
        h = torch.sigmoid(a_o) * c / n
        output.append(h)
    return torch.stack(output)


@triton.jit
def next_state(a_i, a_f, a_z, c_previous, n_previous, m_previous, EXP_FORGET: tl.constexpr):
    """Return i', f', z, and c_t, n_t and m_t."""
    if EXP_FORGET:
        log_f = a_f
    else:
        log_f = log_sigmoid(a_f)
    m = tl.maximum(log_f + m_previous, a_i)
    i = tl.exp(a_i - m)
    f = tl.exp(log_f + m_previous - m)
    z = tanh(a_z)
    return i, f, z, f * c_previous + i * z, f * n_previous + i, m


@triton.jit
def gate_gradients(dh, dc, dn, i, f, z, o, c_previous, n_previous, c, n):
    """Return the gradients of a_i, log f, a_z and a_o, and of c_{t-1} and n_{t-1}, from those of h_t, c_t and n_t."""
    quotient = c / n
    d_o = dh * quotient * o * (1.0 - o)
    dc += dh * o / n
    dn -= dh * o / n * quotient
    d_i = (dc * z + dn) * i
    d_log_f = (dc * c_previous + dn * n_previous) * f
    d_z = dc * i * (1.0 - z * z)
    return d_i, d_log_f, d_z, d_o, dc * f, dn * f


@triton.jit(do_not_specialize=["B", "t"])
def slstm_forward_kernel(
    output_ptr, cells_ptr, normalizers_ptr, stabilizer_ptr, saved_ptr, preact_ptr, B, H, t,
    EXP_FORGET: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """Compute h_t into output[t] (T, B, H), and c and n: [t] -> [t + 1] of cells and normalizers (T + 1, B, H).

    preact (B, 4·H) is a; stabilizer (B, H) is m, in place. saved[t], out: i', f', z, o (T, B, 4·H), with
    f = s(a_f) also the derivative of log f, (T, B, 5·H). Program: (row block, unit block).
    """
    SAVED: tl.constexpr = 4 if EXP_FORGET else 5
    unit = (tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)).to(tl.int64)[None, :]
    row = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)[:, None]
    mask = (row < B) & (unit < H)
    step = t.to(tl.int64) * B + row
    a_i, a_f, a_z, a_o = load_blocks(preact_ptr + row * 4 * H + unit, H, mask, 4)
    c_previous = tl.load(cells_ptr + step * H + unit, mask=mask, other=0.0)
    n_previous = tl.load(normalizers_ptr + step * H + unit, mask=mask, other=0.0)
    m_previous = tl.load(stabilizer_ptr + row * H + unit, mask=mask, other=0.0)

    i, f, z, c, n, m = next_state(a_i, a_f, a_z, c_previous, n_previous, m_previous, EXP_FORGET)
    o = sigmoid(a_o)
    h = o * c / n

    tl.store(cells_ptr + (step + B) * H + unit, c, mask=mask)
    tl.store(normalizers_ptr + (step + B) * H + unit, n, mask=mask)
    tl.store(stabilizer_ptr + row * H + unit, m, mask=mask)
    tl.store(output_ptr + step * H + unit, h.to(output_ptr.dtype.element_ty), mask=mask)
    saved = saved_ptr + step * SAVED * H + unit
    if EXP_FORGET:
        store_blocks(saved, (i, f, z, o), H, mask)
    else:
        store_blocks(saved, (i, f, z, o, sigmoid(-a_f)), H, mask)


@triton.jit(do_not_specialize=["B", "t"])
def slstm_backward_kernel(
    d_gates_ptr, dc_ptr, dn_ptr, grad_output_ptr, dh_ptr, saved_ptr, cells_ptr, normalizers_ptr, B, H, t,
    EXP_FORGET: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a, d_gates[t] (T, B, 4·H), and of c_{t-1} and n_{t-1}, in place in dc and dn (B, H).

    The gradient of h_t is grad_output[t] (T, B, H) + dh (B, H). saved, cells, normalizers: as `slstm_forward_kernel`
    left them. Program: (row block, unit block).
    """
    SAVED: tl.constexpr = 4 if EXP_FORGET else 5
    unit = (tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)).to(tl.int64)[None, :]
    row = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)[:, None]
    mask = (row < B) & (unit < H)
    step = t.to(tl.int64) * B + row
    dc = tl.load(dc_ptr + row * H + unit, mask=mask, other=0.0)
    dn = tl.load(dn_ptr + row * H + unit, mask=mask, other=0.0)
    dh = tl.load(dh_ptr + row * H + unit, mask=mask, other=0.0).to(dc.dtype)
    dh += tl.load(grad_output_ptr + step * H + unit, mask=mask, other=0.0).to(dc.dtype)
    saved = saved_ptr + step * SAVED * H + unit
    i, f, z, o = load_blocks(saved, H, mask, 4)
    i, f, z, o = i.to(dc.dtype), f.to(dc.dtype), z.to(dc.dtype), o.to(dc.dtype)
    c_previous = tl.load(cells_ptr + step * H + unit, mask=mask, other=0.0)
    n_previous = tl.load(normalizers_ptr + step * H + unit, mask=mask, other=0.0)
    c = tl.load(cells_ptr + (step + B) * H + unit, mask=mask, other=0.0)
    n = tl.load(normalizers_ptr + (step + B) * H + unit, mask=mask, other=1.0)

    d_i, d_f, d_z, d_o, dc, dn = gate_gradients(dh, dc, dn, i, f, z, o, c_previous, n_previous, c, n)
    if not EXP_FORGET:
        d_f *= tl.load(saved + 4 * H, mask=mask, other=0.0).to(dc.dtype)

    tl.store(dc_ptr + row * H + unit, dc, mask=mask)
    tl.store(dn_ptr + row * H + unit, dn, mask=mask)
    store_blocks(d_gates_ptr + step * 4 * H + unit, (d_i, d_f, d_z, d_o), H, mask)


class SLSTMFunction(torch.autograd.Function):
    """All steps, forward and backward; see `slstm`."""

    @staticmethod
    def forward(ctx, x, h_0, c_0, n_0, m_0, weight_ih, weight_hh, bias, exp_forget):
        (T, B, I), H = x.shape, h_0.shape[1]  # noqa: E741
        x, h_0, weight_ih, weight_hh = (tensor.contiguous() for tensor in (x, h_0, weight_ih, weight_hh))
        gate_input = torch.addmm(bias, x.view(T * B, I), weight_ih.t())  # of all steps: one GEMM
        cells, normalizers = c_0.new_empty(T + 1, B, H), n_0.new_empty(T + 1, B, H)
        cells[0], normalizers[0], stabilizer = c_0, n_0, m_0.clone(memory_format=torch.contiguous_format)
        preact = cells.new_empty(B, 4 * H)
        output, saved = x.new_empty(T, B, H), x.new_empty(T, B, (4 if exp_forget else 5) * H)
        blocks = elementwise_blocks(H)
        for t in range(T):
            h, index = (h_0[None], 0) if t == 0 else (output, t - 1)
            recurrent_product(preact, gate_input, h, weight_hh, t, index)
            slstm_forward_kernel[blocks.grid(B, H)](
                output_ptr=output,
                cells_ptr=cells,
                normalizers_ptr=normalizers,
                stabilizer_ptr=stabilizer,
                saved_ptr=saved,
                preact_ptr=preact,
                B=B,
                H=H,
                t=t,
                EXP_FORGET=exp_forget,
                **blocks.constants(),
            )
        ctx.save_for_backward(x, h_0, weight_ih, weight_hh, output, cells, normalizers, saved)
        ctx.exp_forget = exp_forget
        ctx.mark_non_differentiable(stabilizer)
        return output, cells[T].clone(), normalizers[T].clone(), stabilizer

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, grad_c, grad_n, _):
        x, h_0, weight_ih, weight_hh, output, cells, normalizers, saved = ctx.saved_tensors
        (T, B, H), I = output.shape, x.shape[2]  # noqa: E741
        grad_output = grad_output.contiguous()
        d_gates = x.new_empty(T, B, 4 * H)
        dh, dc, dn = torch.zeros_like(h_0), *(g.clone(memory_format=torch.contiguous_format) for g in (grad_c, grad_n))
        blocks = elementwise_blocks(H)
        for t in reversed(range(T)):
            slstm_backward_kernel[blocks.grid(B, H)](
                d_gates_ptr=d_gates,
                dc_ptr=dc,
                dn_ptr=dn,
                grad_output_ptr=grad_output,
                dh_ptr=dh,
                saved_ptr=saved,
                cells_ptr=cells,
                normalizers_ptr=normalizers,
                B=B,
                H=H,
                t=t,
                EXP_FORGET=ctx.exp_forget,
                **blocks.constants(),
            )
            torch.mm(d_gates[t], weight_hh, out=dh)
        # What does not depend on the step after is computed for all steps: a GEMM for each weight, and for x.
        d_rows, first, rest = d_gates.view(T * B, 4 * H), d_gates[0], d_gates[1:].view((T - 1) * B, 4 * H)
        d_weight_hh = torch.addmm(first.t() @ h_0, rest.t(), output[:-1].view((T - 1) * B, H))
        d_x, d_weight_ih = (d_rows @ weight_ih).view(T, B, I), d_rows.t() @ x.view(T * B, I)
        return d_x, dh, dc, dn, None, d_weight_ih, d_weight_hh, d_rows.sum(0), None


def slstm(
    x: Tensor, h_0: Tensor, state: State, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor, exp_forget: bool = False
) -> tuple[Tensor, State]:
    """Return h_t of all steps (T, B, H) and the last state by the kernels, differentiable once.

    - x: (T, B, I) with T >= 1; h_0: (B, H); weight_ih: (4·H, I), weight_hh: (4·H, H), bias: (4·H,), all of one type,
      float16, bfloat16, float32 or float64, on one GPU (in Triton's interpreter: on the CPU)
    - state: c, n and m, (B, H) each, float32 (float64 for float64): `initial_state`, or what a call before returned
    - exp_forget: f = exp(a_f), else s(a_f)

    c and n have gradients, m has none: the gradients of h are right without it.

    Raises ValueError for other shapes or types.
    """
    H = h_0.shape[-1]
    expected = [
        (*x.shape[:1], *h_0.shape[:1], x.shape[-1]),
        (x.shape[-2], H),
        (4 * H, x.shape[-1]),
        (4 * H, H),
        (4 * H,),
    ]
    given = (x, h_0, weight_ih, weight_hh, bias)
    states = {(t.shape, t.dtype) for t in state}
    if (
        [tuple(t.shape) for t in given] != expected
        or len(x) == 0
        or len({t.dtype for t in given}) > 1
        or states != {(h_0.shape, accumulator_dtype(x.dtype))}
    ):
        found = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in (*given, *state))
        raise ValueError(f"x, h_0, weight_ih, weight_hh, bias, c, n, m do not belong together: {found}")
    with torch.cuda.device_of(x):  # Triton launches on the current device
        output, *last = SLSTMFunction.apply(x, h_0, *state, weight_ih, weight_hh, bias, exp_forget)
    return output, tuple(last)
