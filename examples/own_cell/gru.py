"""A GRU (Cho et al. 2014) in cuDNN's form, step by step: one product and one elementwise kernel for each step.

    r = s(W_r x_t + b_r + U_r h_{t-1} + c_r)
    z = s(W_z x_t + b_z + U_z h_{t-1} + c_z)
    n = tanh(W_n x_t + b_n + r (U_n h_{t-1} + c_n))
    h_t = (1 - z) n + z h_{t-1}

The reset gate r is applied after the product with U_n, so that all products of a step are one. Parameters as in
`torch.nn.GRU`, the blocks in the order r, z, n: weight_ih W (3·H, I), weight_hh U (3·H, H), bias_ih b and bias_hh c
(3·H,). Shapes: T time steps, B batch rows, I input features, H hidden units. `docs/own-cell.md` explains this file.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from lstm_triton_kernels.activations import sigmoid, tanh
from lstm_triton_kernels.blocks import elementwise_blocks
from lstm_triton_kernels.equations import load_blocks, store_blocks
from lstm_triton_kernels.gates import recurrent_product
from lstm_triton_kernels.sizes import accumulator_dtype
from torch import Tensor
from torch.autograd.function import once_differentiable


def reference(x: Tensor, h_0: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor) -> Tensor:
    """Return h_t of all steps (T, B, H) from x (T, B, I) and h_0 (B, H): the equations in PyTorch, of any type."""
    h, output = h_0, []
    for x_t in x:
        a_r, a_z, a_n = (x_t @ weight_ih.T + bias_ih).chunk(3, -1)
        u_r, u_z, u_n = (h @ weight_hh.T + bias_hh).chunk(3, -1)
        r, z = torch.sigmoid(a_r + u_r), torch.sigmoid(a_z + u_z)
        n = torch.tanh(a_n + r * u_n)
        h = (1 - z) * n + z * h
        output.append(h)
    return torch.stack(output)


def reset_before(
    x: Tensor, h_0: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor
) -> Tensor:
    """Return the same of the form that resets before the product: n = tanh(W_n x_t + b_n + U_n (r h_{t-1}) + c_n).

    r of all units must be known before the second product of a step: two exchanges.
    """
    h, output = h_0, []
    (u_rz, u_n), (c_rz, c_n) = ((p[: -h.shape[1]], p[-h.shape[1] :]) for p in (weight_hh, bias_hh))
    for x_t in x:
        a_r, a_z, a_n = (x_t @ weight_ih.T + bias_ih).chunk(3, -1)
        u_r, u_z = (h @ u_rz.T + c_rz).chunk(2, -1)  # the first product
        r, z = torch.sigmoid(a_r + u_r), torch.sigmoid(a_z + u_z)
        n = torch.tanh(a_n + (r * h) @ u_n.T + c_n)  # the second
        h = (1 - z) * n + z * h
        output.append(h)
    return torch.stack(output)


@triton.jit
def next_hidden(a_r, a_z, a_n, u_r, u_z, u_n, h_previous):
    """Return r, z, n and h_t from the input's side `a` and the recurrent side `u` of each block."""
    r = sigmoid(a_r + u_r)
    z = sigmoid(a_z + u_z)
    n = tanh(a_n + r * u_n)
    return r, z, n, n + z * (h_previous - n)


@triton.jit
def gate_gradients(dh, r, z, n, u_n, h_previous):
    """Return the gradients of the pre-activations of r, z and n, and that of h_{t-1} without the products, from dh."""
    d_n = dh * (1.0 - z) * (1.0 - n * n)
    d_r = d_n * u_n * r * (1.0 - r)
    d_z = dh * (h_previous - n) * z * (1.0 - z)
    return d_r, d_z, d_n, dh * z


@triton.jit(do_not_specialize=["B", "t"])
def gru_forward_kernel(
    output_ptr, states_ptr, saved_ptr, gate_input_ptr, product_ptr, bias_hh_ptr, B, H, t,
    BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """Compute h_t: states[t] -> states[t + 1] (T + 1, B, H) and, rounded, output[t] (T, B, H).

    gate_input (T, B, 3·H) is read at t; product (B, 3·H) is U h_{t-1}, bias_hh (3·H,). saved[t] (T, B, 4·H), out: r, z,
    n and U_n h_{t-1} + c_n. Program: (row block, unit block).
    """
    unit = (tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)).to(tl.int64)[None, :]
    row = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)[:, None]
    mask = (row < B) & (unit < H)
    step = t.to(tl.int64) * B + row
    a_r, a_z, a_n = load_blocks(gate_input_ptr + step * 3 * H + unit, H, mask, 3)
    u_r, u_z, u_n = load_blocks(product_ptr + row * 3 * H + unit, H, mask, 3)
    c_r, c_z, c_n = load_blocks(bias_hh_ptr + unit, H, unit < H, 3)
    h_previous = tl.load(states_ptr + step * H + unit, mask=mask, other=0.0)

    u_n += c_n
    r, z, n, h = next_hidden(a_r, a_z, a_n, u_r + c_r, u_z + c_z, u_n, h_previous)

    tl.store(states_ptr + (step + B) * H + unit, h, mask=mask)
    tl.store(output_ptr + step * H + unit, h.to(output_ptr.dtype.element_ty), mask=mask)
    store_blocks(saved_ptr + step * 4 * H + unit, (r, z, n, u_n), H, mask)


@triton.jit(do_not_specialize=["B", "t"])
def gru_backward_kernel(
    d_input_ptr, d_product_ptr, kept_ptr, grad_output_ptr, dh_ptr, saved_ptr, states_ptr, B, H, t,
    BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of step t: d_input[t] and d_product[t] (T, B, 3·H), of both sides of the gates.

    The gradient of h_t is grad_output[t] (T, B, H) + dh + kept (B, H): dh came through the products of the step after,
    kept past them. kept becomes that of h_{t-1}, in place. saved, states: as `gru_forward_kernel` left them.
    Program: (row block, unit block).
    """
    unit = (tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)).to(tl.int64)[None, :]
    row = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)[:, None]
    mask = (row < B) & (unit < H)
    step = t.to(tl.int64) * B + row
    dh = tl.load(kept_ptr + row * H + unit, mask=mask, other=0.0)
    dh += tl.load(dh_ptr + row * H + unit, mask=mask, other=0.0).to(dh.dtype)
    dh += tl.load(grad_output_ptr + step * H + unit, mask=mask, other=0.0).to(dh.dtype)
    r, z, n, u_n = load_blocks(saved_ptr + step * 4 * H + unit, H, mask, 4)
    r, z, n, u_n = r.to(dh.dtype), z.to(dh.dtype), n.to(dh.dtype), u_n.to(dh.dtype)
    h_previous = tl.load(states_ptr + step * H + unit, mask=mask, other=0.0)

    d_r, d_z, d_n, kept = gate_gradients(dh, r, z, n, u_n, h_previous)

    tl.store(kept_ptr + row * H + unit, kept, mask=mask)
    store_blocks(d_input_ptr + step * 3 * H + unit, (d_r, d_z, d_n), H, mask)
    store_blocks(d_product_ptr + step * 3 * H + unit, (d_r, d_z, d_n * r), H, mask)


class GRUFunction(torch.autograd.Function):
    """All steps, forward and backward; see `gru`."""

    @staticmethod
    def forward(ctx, x, h_0, weight_ih, weight_hh, bias_ih, bias_hh):
        (T, B, I), H = x.shape, h_0.shape[1]  # noqa: E741
        x, h_0, weight_ih, weight_hh, bias_hh = (
            tensor.contiguous() for tensor in (x, h_0, weight_ih, weight_hh, bias_hh)
        )
        gate_input = torch.addmm(bias_ih, x.view(T * B, I), weight_ih.t())  # of all steps: one GEMM
        states = torch.empty(T + 1, B, H, dtype=accumulator_dtype(x.dtype), device=x.device)
        states[0] = h_0
        product = torch.empty(B, 3 * H, dtype=states.dtype, device=x.device)
        output, saved = x.new_empty(T, B, H), x.new_empty(T, B, 4 * H)
        blocks = elementwise_blocks(H)
        for t in range(T):
            h, index = (h_0[None], 0) if t == 0 else (output, t - 1)
            recurrent_product(product, None, h, weight_hh, t, index)
            gru_forward_kernel[blocks.grid(B, H)](
                output_ptr=output,
                states_ptr=states,
                saved_ptr=saved,
                gate_input_ptr=gate_input,
                product_ptr=product,
                bias_hh_ptr=bias_hh,
                B=B,
                H=H,
                t=t,
                **blocks.constants(),
            )
        ctx.save_for_backward(x, h_0, weight_ih, weight_hh, output, states, saved)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, h_0, weight_ih, weight_hh, output, states, saved = ctx.saved_tensors
        (T, B, H), I = output.shape, x.shape[2]  # noqa: E741
        grad_output = grad_output.contiguous()
        d_input, d_product = x.new_empty(T, B, 3 * H), x.new_empty(T, B, 3 * H)
        dh, kept = torch.zeros_like(h_0), torch.zeros_like(states[0])
        blocks = elementwise_blocks(H)
        for t in reversed(range(T)):
            gru_backward_kernel[blocks.grid(B, H)](
                d_input_ptr=d_input,
                d_product_ptr=d_product,
                kept_ptr=kept,
                grad_output_ptr=grad_output,
                dh_ptr=dh,
                saved_ptr=saved,
                states_ptr=states,
                B=B,
                H=H,
                t=t,
                **blocks.constants(),
            )
            torch.mm(d_product[t], weight_hh, out=dh)
        # What does not depend on the step after is computed for all steps: a GEMM for each weight, and for x.
        d_rows, first, rest = d_input.view(T * B, 3 * H), d_product[0], d_product[1:].view((T - 1) * B, 3 * H)
        return (
            (d_rows @ weight_ih).view(T, B, I),
            (dh + kept).to(h_0.dtype),
            d_rows.t() @ x.view(T * B, I),
            torch.addmm(first.t() @ h_0, rest.t(), output[:-1].view((T - 1) * B, H)),
            d_rows.sum(0),
            d_product.sum((0, 1)),
        )


def gru(x: Tensor, h_0: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor) -> Tensor:
    """Return h_t of all steps (T, B, H) by the kernels, differentiable once.

    - x: (T, B, I) with T >= 1; h_0: (B, H)
    - weight_ih: (3·H, I), weight_hh: (3·H, H), bias_ih, bias_hh: (3·H,), as `torch.nn.GRU` has them
    - all of one type, float16, bfloat16, float32 or float64, on one GPU (in Triton's interpreter: on the CPU)

    h is float32 between the steps (float64 for float64), and rounded to the type where it is multiplied and returned.

    Raises ValueError for other shapes, or different types.
    """
    H = h_0.shape[-1]
    expected = [(*x.shape[:1], *h_0.shape[:1], x.shape[-1]), (x.shape[-2], H), (3 * H, x.shape[-1]), (3 * H, H)]
    expected += [(3 * H,), (3 * H,)]
    given = (x, h_0, weight_ih, weight_hh, bias_ih, bias_hh)
    if [tuple(t.shape) for t in given] != expected or len(x) == 0 or len({t.dtype for t in given}) > 1:
        found = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in given)
        raise ValueError(f"x, h_0, weight_ih, weight_hh, bias_ih, bias_hh do not belong together: {found}")
    with torch.cuda.device_of(x):  # Triton launches on the current device
        return GRUFunction.apply(*given)
