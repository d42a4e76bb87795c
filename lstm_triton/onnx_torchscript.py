"""A layer in ONNX for torch.onnx.export with dynamo=False, which follows TorchScript: an LSTM node or a Loop.

What is computed for all steps at once that exporter translates itself. The node and the loop are Functions with a
`symbolic`, which it calls to add them to the graph. The loop's body is written by calling the step itself
(`scanned.direction`, and so `reference.update`) on symbols: a `Symbol` stands for a value of the graph, and what is
computed with it becomes a node. So the equations are written once.

Shapes: T time steps, B batch rows, I input features, H hidden units, P hidden size after projection (else H), D
directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from lstm_triton_kernels.order import Order
from lstm_triton_kernels.spec import LSTMWeights
from torch import Tensor

from lstm_triton import onnx_node, scanned
from lstm_triton.layer import Call
from lstm_triton.scanned import Step

OLDEST_OPSET = 17
"""The first opset that has all operators of a step: LayerNormalization, and since 15 CastLike."""


def layer(
    x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[LSTMWeights], order: Order, call: Call
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute a layer as `scanned.layer` does: by a node where it can say it, else by a loop."""
    if onnx_node.why_not_layer(call, x.dtype, order.resets) is not None:
        return scanned.layer(x, h_0, c_0, weights, call.spec, order, Loop.scan)
    return *onnx_node.layer(x, h_0, c_0, weights, call.spec, order.lengths, Node.add), x


class Node(torch.autograd.Function):
    """apply(attributes, shapes, *inputs) -> output, h_n and c_n of an LSTM node: zeros, since a trace reads shapes."""

    @classmethod
    def add(
        cls, inputs: Sequence[Tensor | None], attributes: dict[str, Any], shapes: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add the node: an `onnx_node.Add`."""
        found: tuple[Tensor, Tensor, Tensor] = cls.apply(attributes, shapes, *inputs)
        return found

    @staticmethod
    def forward(
        ctx: Any, attributes: dict[str, Any], shapes: Sequence[Sequence[int]], *inputs: Tensor | None
    ) -> tuple[Tensor, ...]:
        assert inputs[0] is not None
        return tuple(inputs[0].new_zeros([int(size) for size in shape]) for shape in shapes)

    @staticmethod
    def symbolic(g: Any, attributes: dict[str, Any], shapes: Any, *inputs: Any) -> Any:
        """Return the values output, h_n and c_n of a node that is added to the graph."""
        given = []
        for value in inputs:
            if value is None:
                value = g.op("prim::Constant")
                value.setType(torch._C.OptionalType.ofTensor())
            given.append(value)
        named = {f"{name}_{'s' if isinstance(value, str) else 'i'}": value for name, value in attributes.items()}
        return g.op("LSTM", *given, **named, outputs=3)


class Loop(torch.autograd.Function):
    """apply(step, number of sequences, h, c, *sequences, *constants) -> h_n, c_n, output, c_t, as of `scanned.Scan`."""

    @classmethod
    def scan(
        cls, step: Step, initial: Sequence[Tensor], sequences: Sequence[Tensor], constants: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Apply a step to all steps: a `scanned.Scan`."""
        found: tuple[Tensor, Tensor, Tensor, Tensor]
        found = cls.apply(step, len(sequences), *initial, *sequences, *constants)
        return found

    @staticmethod
    def forward(ctx: Any, step: Step, number: int, h: Tensor, c: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        sequences, constants = rest[:number], rest[number:]
        outputs, cells = [], []
        for now in zip(*sequences, strict=True):
            h, c, output, state = step(h, c, *now, *constants)
            outputs.append(output)
            cells.append(state)
        return h, c, torch.stack(outputs), torch.stack(cells)

    @staticmethod
    def symbolic(g: Any, step: Step, number: int, h: Any, c: Any, *rest: Any) -> Any:
        """Return the values h_n, c_n, output and c_t of a Loop that is added to the graph.

        Raises RuntimeError for an opset that is too old.
        """
        if g.opset < OLDEST_OPSET:
            raise RuntimeError(
                f"this LSTM needs opset_version {OLDEST_OPSET} or newer to be exported to ONNX, got {g.opset}"
            )
        sequences, constants = rest[:number], rest[number:]
        steps = g.op("Gather", g.op("Shape", sequences[0]), g.op("Constant", value_t=torch.tensor(0)), axis_i=0)
        results = g.op("Loop", steps, g.op("Constant", value_t=torch.tensor(True)), h, c, outputs=4)
        block = results[0].node().addBlock()
        body = replace(g, block=block)
        t, going, *states = (block.addInputToBlock() for _ in range(4))
        for value, given in ((t, steps), (going, None), *zip(states, (h, c), strict=True)):
            value.setType(torch._C.TensorType.get() if given is None else given.type())
        now = [body.op("Gather", sequence, t, axis_i=0) for sequence in sequences]
        computed = step(*(Symbol(body, value) for value in (*states, *now, *constants)))
        block.registerOutput(body.op("Identity", going))
        for symbol in computed:
            block.registerOutput(symbol.value)
        return results


class Symbol:
    """A value of the graph that `reference.update` computes with as with a tensor, of one step.

    - graph: where nodes are added; value: of that graph
    """

    def __init__(self, graph: Any, value: Any) -> None:
        self.graph, self.value = graph, value

    def node(self, name: str, *inputs: Any, **attributes: Any) -> Symbol:
        """Return the result of an operator of ONNX on symbols and numbers, which are of this symbol's type."""
        return Symbol(self.graph, self.graph.op(name, *(self.operand(value) for value in inputs), **attributes))

    def operand(self, value: Any) -> Any:
        """Return the value of the graph that an operand stands for."""
        if isinstance(value, Symbol):
            return value.value
        number = self.graph.op("Constant", value_t=torch.tensor(value, dtype=torch.float64))
        return self.graph.op("CastLike", number, self.value)

    @property
    def shape(self) -> None:
        """What `F.layer_norm` is given: a row, whatever its length."""

    def __add__(self, other: Any) -> Symbol:
        return self.node("Add", self, other)

    def __sub__(self, other: Any) -> Symbol:
        return self.node("Sub", self, other)

    def __mul__(self, other: Any) -> Symbol:
        return self.node("Mul", self, other)

    def __rsub__(self, other: Any) -> Symbol:
        return self.node("Sub", other, self)

    __radd__, __rmul__ = __add__, __mul__

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Symbol, ...]:
        """Return as many equal parts."""
        if chunks == 1:
            return (self,)
        count = dict(num_outputs_i=chunks) if self.graph.opset >= 18 else {}
        parts = self.graph.op("Split", self.value, axis_i=dim, **count, outputs=chunks)
        return tuple(Symbol(self.graph, part) for part in parts)

    def clamp(self, minimum: float, maximum: float) -> Symbol:
        """Return the values within limits."""
        return self.node("Clip", self, minimum, maximum)

    def masked_fill(self, mask: Symbol, value: float) -> Symbol:
        """Return the number where the mask is true."""
        return self.node("Where", mask, value, self)

    def clone(self) -> Symbol:
        """Return a value of its own."""
        return self.node("Identity", self)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Symbol:
        return FUNCTIONS[function](*arguments, **(keywords or {}))


def linear(x: Symbol, weight: Symbol, bias: Symbol | None = None) -> Symbol:
    """Return x W^T + b."""
    return x.node("Gemm", x, weight, *(() if bias is None else (bias,)), transB_i=1)


def layer_norm(x: Symbol, shape: None, weight: Symbol, bias: Symbol | None, eps: float) -> Symbol:
    """Return rows normalised, times the gain, plus the shift."""
    return x.node("LayerNormalization", x, weight, *(() if bias is None else (bias,)), axis_i=-1, epsilon_f=eps)


FUNCTIONS: dict[Any, Callable[..., Symbol]] = {
    torch.sigmoid: lambda x: x.node("Sigmoid", x),
    torch.tanh: lambda x: x.node("Tanh", x),
    torch.where: lambda mask, x, y: x.node("Where", mask, x, y),
    torch.ones_like: lambda x: x.node("Add", x.node("Sub", x, x), 1),
    F.linear: linear,
    F.layer_norm: layer_norm,
}
"""What `reference.update` calls, to the nodes that compute it."""
