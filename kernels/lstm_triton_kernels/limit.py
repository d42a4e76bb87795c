"""The least time of one time step that a machine allows: bytes, operations and waits, from measured constants.

A bound from below, for a layer that keeps its gates for the backward pass; the closer a measured step comes to it, the
less there is left to gain. Sizes: T time steps, B batch rows, I input features, H hidden units, P hidden size after
projection (else H), G gate blocks. It counts:

- *throughput*: nothing runs faster than its operations at the measured matmul rate, nor than its bytes of device memory
  at the measured copy bandwidth. Forward: the products with W_ih and W_hh (and a full peephole's, and W_hr); x read and
  the output written, once. Training adds twice the operations (d_x and d_W), and in bytes: the gates and c_t written
  and read, d_gates written, the gradient of the output read, x and the output read again, d_x written.
- *chain*: h_t needs h_{t-1}, so what stands between them is paid T times, however wide the machine is: the recurrent
  operations (at the full rate), and, where the recurrent weights do not fit one multiprocessor, a wait of all
  programs that hold them for each exchange of a step, and their reading of the state through L2: forward h_{t-1}, B·P
  elements each; backward the gate gradients, B·G·H elements each. What they read within a step is not counted.
- *stream*: recurrent weights that do not fit on all multiprocessors together, in shared memory and all registers, go
  through L2 in every step, beside what is read of the state; and what does not fit L2 either comes from device memory
  at the copy bandwidth, whatever the order in which it is read.

A step takes at least the longest of the three, and its share of one cooperative launch a pass. Layers in one direction
can overlap (step t of layer 2 beside step t + 1 of layer 1), so L of them have one chain; with two directions a layer
needs all of the layer below, so each has its own; the two directions of a layer run side by side. Not counted, so that
no machine reaches the limit: activations, reading the resident weights from shared memory, tiles of the tensor cores
that few rows leave empty, the gradients of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lstm_triton_kernels.sizes import Layer, ceil_div


@dataclass(frozen=True)
class Constants:
    """Measured rates of a machine (`python -m benchmarks micro`); None where it has no such thing (a CPU).

    - copy_gb_per_s: device memory, bytes read plus bytes written, 1e9 a second
    - matmul_tflop_per_s: a large matrix product, by type: "float16", "bfloat16", "float32", "tf32", "float64"
    - l2_read_gb_per_s: all multiprocessors together, reading the same data past their own caches
    - l2_round_trip_us: one dependent load past the multiprocessor's own cache
    - launch_us: an empty cooperative launch after another
    - wait_us: one wait of all programs for each other, by method ("counter", "data") and number of programs
    - multiprocessors; on_chip_bytes: shared memory and registers of one of them
    - l2_bytes: what L2 holds; None: not known, and taken to hold all that streams
    """

    copy_gb_per_s: float
    matmul_tflop_per_s: Mapping[str, float]
    l2_read_gb_per_s: float | None = None
    l2_round_trip_us: float | None = None
    launch_us: float | None = None
    wait_us: Mapping[str, Mapping[int, float]] | None = None
    multiprocessors: int | None = None
    on_chip_bytes: int | None = None
    l2_bytes: int | None = None


def least_us_per_step(layer: Layer, constants: Constants, layers: int = 1) -> float:
    """Return microseconds of one step of one layer and direction, averaged over T, layers and D: none is faster.

    layer: the first of a stack of so many; the others have the outputs of all directions as inputs.
    """
    throughput = 0.0
    chain = 0.0
    for n in range(layers):
        one = layer if n == 0 else layer._replace(I=layer.D * layer.hidden)
        throughput += layer.D * _throughput_us(one, constants)
        here = sum(_chain_us(one, constants, backward) for backward in (False, True)[: 1 + layer.training])
        chain = chain + here if layer.D == 2 else max(chain, here)
    launches = (constants.launch_us or 0.0) * (1 + layer.training) / layer.T
    return (max(throughput, chain) + launches) / (layers * layer.D)


def step_operations(layer: Layer) -> int:
    """Return multiplications and additions of one forward step of one direction."""
    return 2 * layer.B * layer.I * layer.gates * layer.H + layer.recurrent_operations


def step_bytes(layer: Layer) -> int:
    """Return bytes of device memory that one step of one direction moves at least, backward included if training."""
    x, h, gates = layer.I, layer.hidden, layer.gates * layer.H
    elements = x + h  # x read, output written
    if layer.training:
        elements += 3 * gates + 2 * x + 2 * h  # gates written and read, d_gates written; x, dx; output, its gradient
    return layer.B * (elements * layer.element_bytes + (2 * 4 * layer.H if layer.training else 0))  # c_t in float32


def _throughput_us(layer: Layer, constants: Constants) -> float:
    passes = 3 if layer.training else 1  # the backward pass multiplies twice: for d_x, d_h and for d_W
    operations = passes * step_operations(layer) / (constants.matmul_tflop_per_s[layer.rate] * 1e6)
    memory = step_bytes(layer) / (constants.copy_gb_per_s * 1e3)
    return max(operations, memory)


def least_pass_us(layer: Layer, constants: Constants, backward: bool) -> float:
    """Return microseconds of a step of the recurrence in one pass, all directions in a launch: none is faster.

    One direction has its chain; the directions share the machine's matmul rate and its L2.
    """
    products, reads, waits = _chain(layer, constants, backward)
    stream = layer.D * stream_us(layer, constants, backward)
    return max(products + reads + waits, layer.D * products, layer.D * reads, stream)


def _chain_us(layer: Layer, constants: Constants, backward: bool) -> float:
    return max(sum(_chain(layer, constants, backward)), stream_us(layer, constants, backward))


def _chain(layer: Layer, constants: Constants, backward: bool) -> tuple[float, float, float]:
    """Return what stands between two steps: products, reads of the state through L2, a wait for each exchange."""
    recurrent = layer.recurrent_operations / (constants.matmul_tflop_per_s[layer.rate] * 1e6)
    programs = _programs(layer, constants)
    if programs == 1 or constants.l2_read_gb_per_s is None:
        return recurrent, 0.0, 0.0
    reads = _exchanged_bytes(layer, programs, backward) / (constants.l2_read_gb_per_s * 1e3)
    return recurrent, reads, layer.exchanges * least_wait_us(programs, constants)


def stream_us(layer: Layer, constants: Constants, backward: bool) -> float:
    """Return microseconds of a step of one direction in which its weights that do not fit the chip are read; 0 if none.

    While they are read, so is the state, at the rate of L2; but a program need not wait for the one to read the other.
    """
    if constants.on_chip_bytes is None or constants.multiprocessors is None or constants.l2_read_gb_per_s is None:
        return 0.0
    streamed = layer.recurrent_bytes - constants.multiprocessors * constants.on_chip_bytes
    if streamed <= 0:
        return 0.0
    exchanged = _exchanged_bytes(layer, constants.multiprocessors, backward)
    beyond_l2 = max(0, streamed - constants.l2_bytes) if constants.l2_bytes is not None else 0
    return max((streamed + exchanged) / (constants.l2_read_gb_per_s * 1e3), beyond_l2 / (constants.copy_gb_per_s * 1e3))


def _programs(layer: Layer, constants: Constants) -> int:
    """Return on how many multiprocessors the recurrent weights of a direction must be, 1 where these are not known."""
    if constants.on_chip_bytes is None or constants.multiprocessors is None:
        return 1
    return min(ceil_div(layer.recurrent_bytes, constants.on_chip_bytes), constants.multiprocessors)


def _exchanged_bytes(layer: Layer, programs: int, backward: bool) -> int:
    """Return bytes of the state that so many programs read of each other in a step, those within it apart."""
    width = layer.gates * layer.H if backward else layer.hidden
    return programs * layer.B * width * layer.element_bytes


def least_wait_us(programs: int, constants: Constants) -> float:
    """One wait of that many programs by the faster method: the measured count nearest below, interpolating nothing."""
    found: list[float] = []
    measured: Mapping[str, Any] = constants.wait_us or {}
    for by_programs in measured.values():
        below = [count for count in by_programs if count <= programs]
        if below:
            found.append(by_programs[max(below)])
    return min(found, default=0.0)
