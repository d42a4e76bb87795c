"""A whole sequence in one launch a pass: buffers, flags and launches of the persistent kernels.

All directions of one layer. Shapes: T time steps, B batch rows, H hidden units, P hidden size after projection (else
H), D directions, G gate blocks, Q peephole blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lstm_triton_kernels.gpus import GPU, gpu_of, share_of
from lstm_triton_kernels.normalize import NO_NORM, KernelNorm
from lstm_triton_kernels.order import Order
from lstm_triton_kernels.persistent_backward import persistent_backward_kernel
from lstm_triton_kernels.persistent_forward import persistent_forward_kernel
from lstm_triton_kernels.plan import ANY, PersistentPlan, Preference, Second
from lstm_triton_kernels.planner import ranked_plans
from lstm_triton_kernels.regularize import NONE, Rules, drawn
from lstm_triton_kernels.settle import SETTLED, Usage, settled, usage_elsewhere, usage_on_device
from lstm_triton_kernels.sizes import Layer, accumulator_dtype, matmul_precision, padded_row
from lstm_triton_kernels.spec import LSTMSpec
from lstm_triton_kernels.sync import COUNTER_STRIDE, POLLS, unpublish
from lstm_triton_kernels.tensor_core_plan import (
    CHUNK_BYTES,
    exchanged_columns,
    fits,
    no_gluon,
    second_columns,
    statistics_loads,
    thread_registers,
)
from lstm_triton_kernels.watch import error_words_of, one_at_a_time

if no_gluon() is None:
    from lstm_triton_kernels.exchanged_backward import exchanged_backward_kernel
    from lstm_triton_kernels.exchanged_forward import exchanged_forward_kernel
    from lstm_triton_kernels.streamed import pack_weights_kernel

_preferences: list[Preference] = []


@contextmanager
def prefer(preference: Preference) -> Iterator[None]:
    """Plan as the preference wants inside of the block, to measure one plan against another. Holds for all threads."""
    _preferences.append(preference)
    try:
        yield
    finally:
        _preferences.pop()


def preference() -> Preference:
    """Return what is wanted of plans: nothing, outside of `prefer`."""
    return _preferences[-1] if _preferences else ANY


class Launch(NamedTuple):
    """One pass of a layer that is to be launched, on whatever plan.

    - inputs: what the kernels of both engines are given of it, by their names: tensors, and flags of what there is
    - save: whether a forward pass keeps every c_t
    - norm: what of a normalised layer the kernels in Gluon are given, beside the buffers of a plan
    - lanes: 0 of a launch by itself; else it is one of a schedule on so many lanes (schedule.py), which whoever
      launches it orders as a whole, and has a lane's share of the multiprocessors
    - results: of the results of `forward_results` and `backward_results`, what is to be written where; contiguous, dc
      zero. The others get new buffers
    """

    layer: Layer
    backward: bool
    device: torch.device
    inputs: dict[str, Any]
    save: bool = False
    lanes: int = 0
    norm: KernelNorm = NO_NORM
    results: Mapping[str, Tensor] = MappingProxyType({})

    @property
    def gpu(self) -> GPU:
        """The GPU that it has, or its share of it."""
        return share_of(gpu_of(self.device), self.lanes)

    def empty(self, name: str, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return the buffer for a result: that of `results`, else a new one."""
        given = self.results.get(name)
        return torch.empty(shape, dtype=dtype, device=self.device) if given is None else given

    @property
    def flags(self) -> tuple[bool, ...]:
        """What decides, beside the layer, which kernel is compiled."""
        given = (value for value in self.inputs.values() if isinstance(value, bool))
        optional = (*self.inputs["rules"], *self.norm)
        return self.save, *given, *(value is not None for value in optional)

    def arguments(self, plan: PersistentPlan) -> dict[str, Any]:
        """Return the arguments of its kernel on a plan, with new buffers, filled as a launch needs them."""
        results = backward_results(self, plan) if self.backward else forward_results(self, plan)
        arguments = self.inputs | results | common_arguments(self, plan)
        if plan.exact:
            prepare_exchange(results, self, plan)
            return arguments | plain_arguments(self, plan)
        return arguments | exchanged_arguments(self, plan)


def forward_launch(
    layer: Layer, gates: Tensor, h_0: Tensor, c_0: Tensor, w_hh: Tensor, w_hr: Tensor | None, w_ch: Tensor | None,
    order: Order, *, save: bool, save_gates: bool, norm: KernelNorm = NO_NORM,
) -> Launch:  # fmt: skip
    """Return the launch of all steps forward.

    - gates: (D, T, B, G·H), the input side of the gates; with `save_gates` the activated gates take its place
    - h_0: (D, B, P), c_0: (D, B, H); w_hh: (D, G·H, P); w_hr: (D, P, H); w_ch: diagonal (D, Q·H), full (D, Q·H, H);
      all contiguous
    - order: of the first direction; beyond a row's length output and cells are zero, and h_n and c_n are the row's last
    - save: keep every c_t
    - norm: the gains and the shift of a normalised layer, of which gates are the input side normalised

    Results, by the kernel's names: those of `forward_results`. See `hidden_of` for every h_t.
    """
    inputs = dict(
        gates_ptr=gates,
        h_0_ptr=h_0,
        c_0_ptr=c_0,
        w_hh_ptr=w_hh,
        w_hr_ptr=w_hr,
        w_ch_ptr=w_ch,
        SAVE_GATES=save_gates,
        **order_arguments(order),
    )
    return Launch(layer, False, gates.device, inputs, save, norm=norm)


def backward_launch(
    layer: Layer, grad_output: Tensor | None, grad_cells: Tensor | None, grad_h_n: Tensor | None,
    grad_c_n: Tensor | None, gates: Tensor, cells: Tensor, w_hh: Tensor, w_hr: Tensor | None, w_ch: Tensor | None,
    order: Order, norm: KernelNorm = NO_NORM,
) -> Launch:  # fmt: skip
    """Return the launch of all steps backward, from the gradients of the results, None where zero.

    - grad_output (T, B, D·P), grad_cells (T, B, D·H), of h_t and of c_t; grad_h_n (D, B, P), grad_c_n (D, B, H); all
      contiguous
    - gates: (D, T, B, G·H), cells: (D, T + 1, B, H), as the forward pass saved them; the others as there
    - norm: of a normalised layer all but the exchange buffers

    Results, by the kernel's names: those of `backward_results`.
    """
    inputs = dict(
        gates_ptr=gates,
        cells_ptr=cells,
        grad_output_ptr=grad_output,
        grad_cells_ptr=grad_cells,
        grad_h_n_ptr=grad_h_n,
        grad_c_n_ptr=grad_c_n,
        w_hh_ptr=w_hh,
        w_hr_ptr=w_hr,
        w_ch_ptr=w_ch,
        HAS_GRAD_OUTPUT=grad_output is not None,
        HAS_GRAD_CELLS=grad_cells is not None,
        HAS_GRAD_H_N=grad_h_n is not None,
        HAS_GRAD_C_N=grad_c_n is not None,
        **order_arguments(order),
    )
    return Launch(layer, True, gates.device, inputs, norm=norm)


def order_arguments(order: Order) -> dict[str, Any]:
    """Return what a kernel is given of the lengths and resets of rows, and of the rules of steps."""
    return dict(
        rules=order.regularized.for_kernels(),
        lengths_ptr=order.lengths,
        resets_ptr=order.reset_bytes,
        HAS_LENGTHS=order.lengths is not None,
        HAS_RESETS=order.resets is not None,
    )


def forward_results(launch: Launch, plan: PersistentPlan) -> dict[str, Any]:
    """Return buffers for the results of a forward pass, and what its kernel must know of them.

    - output_ptr (T, B, D, P), every h_t; of a plain kernel hidden_ptr (T + 1, B, D, padded_P), h_t at index t, the last
      is the kernel's own, and with a projection unprojected_ptr (T, B, D, padded_H), its own as well; output_ptr is
      None, unless hidden_ptr is its own too, h_t with its mask. computed_ptr (D, T, B, H), its own, is c~ where zoneout
      makes another c_t of that and a full peephole reads it, else None
    - h_n_ptr (D, B, P), c_n_ptr (D, B, H)
    - cells_ptr (D, T + 1, B, H) in the accumulator type, see order.py, with `save`; else the kernel's own, or None
    """
    layer, device = launch.layer, launch.device
    D, T, B, H = layer.D, layer.T, layer.B, layer.H
    every_cell = launch.save or (plan.exact and layer.spec.full and not plan.alone)  # the plain kernel exchanges them
    slots = T + 1 if every_cell else 1 if plan.blocks_per_program > 1 else 0
    cells = launch.empty("cells_ptr", D, slots, B, H, dtype=accumulator_dtype(layer.dtype)) if slots else None
    h_0, c_0 = launch.inputs["h_0_ptr"], launch.inputs["c_0_ptr"]
    results = dict(
        cells_ptr=cells,
        h_n_ptr=launch.empty("h_n_ptr", *h_0.shape, dtype=h_0.dtype),
        c_n_ptr=launch.empty("c_n_ptr", *c_0.shape, dtype=c_0.dtype),
        CELLS="all" if every_cell else "one" if slots else "none",
    )
    if not plan.exact:
        return results | dict(output_ptr=launch.empty("output_ptr", T, B, D, layer.hidden, dtype=layer.dtype))
    exchanged = not plan.alone
    width, units = (padded_row(n) if exchanged else n for n in (layer.hidden, H))
    hidden = torch.empty(T + 1, B, D, width, dtype=layer.dtype, device=device)
    unprojected = hidden.new_empty(T, B, D, units) if layer.P and exchanged else None
    rules = launch.inputs["rules"]
    masked = exchanged and rules.hidden is not None
    zoned = exchanged and layer.output_current and rules.zoneout_c is not None
    return results | dict(
        hidden_ptr=hidden,
        output_ptr=hidden.new_empty(T, B, D, layer.hidden) if masked else None,
        unprojected_ptr=unprojected,
        computed_ptr=hidden.new_empty(D, T, B, H) if zoned else None,
        padded_H=units,
        padded_P=width,
    )


def backward_results(launch: Launch, plan: PersistentPlan) -> dict[str, Any]:
    """Return buffers for the results of a backward pass.

    - d_gates_ptr (D, T, B, G·H), the gradients of the pre-activations; d_hidden_ptr (D, T, B, P), those of every h_t
      with a projection, else None
    - dc_ptr (D, B, H), that of c_0 in the accumulator type, without what a full peephole adds at the first step
    - d_h_0_ptr (D, B, P), of that of h_0 in the accumulator type what zoneout of h passes on; None without such a rule
    """
    gates, cells = launch.inputs["gates_ptr"], launch.inputs["cells_ptr"]
    layer, dc, d_h_0 = launch.layer, launch.results.get("dc_ptr"), None
    new = torch.zeros if plan.blocks_per_program > 1 else torch.empty
    if dc is None:
        dc = new(layer.D, layer.B, layer.H, dtype=cells.dtype, device=launch.device)
    if launch.inputs["rules"].zoneout_h is not None:
        d_h_0 = new(layer.D, layer.B, layer.hidden, dtype=cells.dtype, device=launch.device)
    return dict(
        d_gates_ptr=launch.empty("d_gates_ptr", *gates.shape, dtype=gates.dtype),
        d_hidden_ptr=gates.new_empty(layer.D, layer.T, layer.B, layer.P) if layer.P else None,
        dc_ptr=dc,
        d_h_0_ptr=d_h_0,
    )


def hidden_of(found: dict[str, Any], layer: Layer) -> Tensor:
    """Return every h_t, (T, B, D·P) contiguous, of a forward launch that ran."""
    P = layer.hidden
    hidden = found["output_ptr"]
    if hidden is None:
        hidden = found["hidden_ptr"][: layer.T, ..., :P]
    return hidden.reshape(layer.T, layer.B, layer.D * P).contiguous()


def layer_of(gates: Tensor, H: int, spec: LSTMSpec, order: Order, P: int = 0) -> Layer:
    """Return the sizes of a layer with gates (D, T, B, G·H), and P elements of a projected hidden state, or 0."""
    D, T, B, _ = gates.shape
    return Layer(spec, T, B, H, D, gates.dtype, matmul_precision(), P=P, ragged=order.ragged)


def plan_of(launch: Launch) -> PersistentPlan:
    """Return the plan that a launch runs on: the first of the ranked ones that hardly spills (settle.py).

    Raises RuntimeError with the reason where there is none.
    """
    wanted = preference()
    plans = ranked_plans(launch.layer, launch.backward, launch.gpu, wanted)
    if isinstance(plans, str):
        raise RuntimeError(f"strategy 'persistent' cannot run here: {plans}")
    key = (launch.layer.planned, launch.backward, wanted, launch.device, launch.flags, launch.lanes)

    def usage_of(plan: PersistentPlan) -> Usage | None:
        usage = usage_on_device(kernel_of(launch, plan), plan.grid, launch.arguments(plan))
        return usage if usage and fits(plan.together, usage.shared, gpu_of(launch.device)) else None

    return settled(key, plans, usage_of, launch.device)


def plan_that_ran(layer: Layer, backward: bool, wanted: Preference = ANY) -> PersistentPlan | None:
    """Return the plan that was last settled for such a launch by itself in this process; None if there was none."""
    key = (layer.planned, backward, wanted)
    found = [plan for known, plan in SETTLED.items() if known[:3] == key and known[-1] == 0]
    return found[-1] if found else None


def usages(
    layer: Layer, backward: bool, gpu: GPU, plans: Sequence[PersistentPlan], rules: Rules = NONE, draws: bool = True
) -> list[Usage]:
    """Compile the plans of a layer for a GPU that need not be here, with the rules as of `launch_without_data`.

    Raises RuntimeError as `usage_elsewhere`.
    """
    launch = launch_without_data(layer, backward, rules, draws)
    return [
        usage_elsewhere(kernel_of(launch, plan), plan.grid, launch.arguments(plan), gpu.capability) for plan in plans
    ]


def launch_without_data(layer: Layer, backward: bool, rules: Rules = NONE, draws: bool = True) -> Launch:
    """Return a launch of two steps on tensors without memory, to compile it; backward with the usual gradients.

    rules: of the steps; draws: whether masks are drawn for those that are random.
    """
    spec, D, B, H, T = layer.spec, layer.D, layer.B, layer.H, 2

    def empty(*shape: int, dtype: torch.dtype = layer.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    lengths, resets = empty(B, dtype=torch.int64), empty(T, B, dtype=torch.bool)
    Q, P = len(spec.peephole_gates) * H, layer.hidden
    seed = empty(1, dtype=torch.int64) if draws and rules.random else None
    regularized = drawn(rules, seed, D, T, B, H, P, layer.dtype)
    if backward and rules.proj_clip:
        regularized = regularized._replace(clipped=empty(D, T, B, P, dtype=torch.bool))
    order = Order(T, lengths, resets) if layer.ragged else Order(T)
    order = order._replace(regularized=regularized)
    w_hr, w_ch = None, empty(D, Q) if spec.diagonal else empty(D, Q, H) if spec.full else None
    if layer.P:
        w_hr = empty(D, P, H)
    weights = (empty(D, layer.gates * H, P), w_hr, w_ch)
    gates, h, c = empty(D, T, B, layer.gates * H), empty(D, B, P), empty(D, B, H)
    norm = NO_NORM
    if spec.layer_norm:
        norm = KernelNorm(empty(D, layer.gates * H), empty(D, H), empty(D, H))
    layer = layer._replace(T=T)
    if not backward:
        save = layer.training
        return forward_launch(layer, gates, h, c, *weights, order, save=save, save_gates=save, norm=norm)
    wide = accumulator_dtype(layer.dtype)
    cells = empty(D, T + 1, B, H, dtype=wide)
    if spec.layer_norm:
        names = ("mean", "rstd", "mean_c", "rstd_c")
        of_rows = {name: empty(D, T, B, dtype=wide) for name in names}
        norm = norm._replace(products=empty(*gates.shape), d_cell=empty(D, 2, B, H, dtype=wide), **of_rows)
    return backward_launch(layer, empty(T, B, D * P), None, h, c, gates, cells, *weights, order, norm)


def run(launch: Launch) -> dict[str, Any]:
    """Launch the kernel on its plan and return its arguments, the buffers of its results among them.

    Programs that wait for each other are launched after all such launches before, but those of the same schedule.
    Raises RuntimeError as `plan_of`.
    """
    plan = plan_of(launch)
    arguments = launch.arguments(plan)
    if plan.streamed:
        pack_weights(launch, plan, arguments["streamed_ptr"])
    with nullcontext() if plan.alone or launch.lanes else one_at_a_time(launch.device):
        kernel_of(launch, plan)[grid(plan, launch.device, launch.lanes)](**arguments)
    return arguments


def kernel_of(launch: Launch, plan: PersistentPlan) -> Any:
    """Return the kernel of a pass on a plan."""
    if plan.exact:
        return persistent_backward_kernel if launch.backward else persistent_forward_kernel
    return exchanged_backward_kernel if launch.backward else exchanged_forward_kernel


def grid(plan: PersistentPlan, device: torch.device, lanes: int = 0) -> tuple[int, int, int]:
    """Return the numbers of programs: parts of the units, groups of row blocks, directions.

    Raises RuntimeError where programs that wait for each other could not all be resident, beside those of other lanes.
    """
    if not plan.alone and device.type == "cuda":
        gpu = share_of(gpu_of(device), lanes)
        if plan.programs > plan.together * gpu.multiprocessors:
            raise RuntimeError(
                f"{plan.programs} programs that wait for each other do not fit the {gpu.multiprocessors} "
                f"multiprocessors of {device}" + (f" that each of {lanes} lanes has" if lanes > 1 else "")
            )
    return plan.grid


def common_arguments(launch: Launch, plan: PersistentPlan) -> dict[str, Any]:
    """Return what all four kernels are given of a plan."""
    layer, device = launch.layer, launch.device
    name = f"the {'backward' if launch.backward else 'forward'} pass of {layer.H} units"
    sizes = f"{layer.T} steps of {layer.B} rows, {plan.programs} programs on {device}"
    return dict(
        error_ptr=error_words_of(device).take(f"{name}, {sizes}"),
        T=layer.T,
        B=layer.B,
        H=layer.H,
        rows=plan.rows,
        row_blocks=plan.row_blocks,
        max_polls=POLLS,
        pause=plan.pause,
        ONE_BLOCK=plan.blocks_per_program == 1,
        COUPLED=layer.spec.coupled,
        DIAGONAL=layer.spec.diagonal,
        FULL=layer.spec.full,
        OUTPUT_CURRENT=layer.spec.output_current,
        IDENTITY_INPUT=layer.spec.identity_input,
        IDENTITY_OUTPUT=layer.spec.identity_output,
        CHUNKS=plan.chunks,
        **second_cuts(plan),
        WARPS=plan.num_warps,
        num_warps=plan.num_warps,
        launch_cooperative_grid=not plan.alone,
    )


def second_cuts(plan: PersistentPlan) -> dict[str, int]:
    """Return the chunks of the products within a step and in how many pieces they are read; 0 where there is none."""
    cuts = dict(PEEPHOLE=plan.peephole, PROJECTION=plan.projection)
    chunks = {f"{name}_CHUNKS": cut.chunks if cut else 0 for name, cut in cuts.items()}
    return chunks | {f"{name}_PIECES": cut.chunks // cut.group if cut else 0 for name, cut in cuts.items()}


def prepare_exchange(results: dict[str, Any], launch: Launch, plan: PersistentPlan) -> None:
    """Fill the results through which programs of the plain kernels exchange values, as they must be before a launch."""
    layer = launch.layer
    if plan.alone:
        return
    if plan.wait == "data":
        cells = ("cells_ptr", "computed_ptr") if layer.spec.full else ()
        projected = ("d_hidden_ptr" if launch.backward else "unprojected_ptr",) if layer.P else ()
        for name in ("d_gates_ptr", *projected) if launch.backward else ("hidden_ptr", *cells, *projected):
            if results[name] is not None:
                unpublish(results[name])
    if not launch.backward:
        for name, size in (("hidden_ptr", layer.hidden), ("unprojected_ptr", layer.H)):
            if results[name] is not None and results[name].shape[-1] > size:
                results[name][..., size:] = 0


def plain_arguments(launch: Launch, plan: PersistentPlan) -> dict[str, Any]:
    """Return what only the kernels in plain Triton are given."""
    if plan.wait == "counter":
        exchanges = 1 if plan.peephole is plan.projection is None else 3
        count = exchanges * plan.directions * plan.row_blocks * COUNTER_STRIDE.value
        counters = torch.zeros(count, dtype=torch.int32, device=launch.device)
    else:
        counters = torch.empty(1, dtype=torch.int32, device=launch.device)  # nobody counts
    return dict(
        counters_ptr=counters,
        P=launch.layer.hidden,
        PROJECTED=launch.layer.P > 0,
        ALONE=plan.alone,
        WAIT=plan.wait,
        GROUP=plan.group,
        PARTS=plan.parts,
        H_DIVISOR=math.gcd(launch.layer.H, 16),
        BLOCK_B=plan.block_b,
        BLOCK_U=plan.block_u,
        BLOCK_K=plan.block_k,
        num_stages=1,
    )


def exchanged_arguments(launch: Launch, plan: PersistentPlan) -> dict[str, Any]:
    """Return what only the kernels in Gluon are given; they exchange values through a buffer of their own."""
    layer, first = launch.layer, exchanged_columns(launch.layer, launch.backward)
    peephole, projection = second_columns(layer, launch.backward)
    return dict(
        exchange_ptr=exchange_buffer(launch, plan, layer.T + 1, plan.chunks, first),
        peephole_exchange_ptr=second_buffer(launch, plan, plan.peephole, peephole),
        projection_exchange_ptr=second_buffer(launch, plan, plan.projection, projection),
        norm=norm_arguments(launch, plan),
        PROJECTION=layer.P,
        streamed_ptr=streamed_buffer(launch, plan) if plan.streamed else None,
        STREAMED=plan.streamed,
        BEYOND_L2=plan.beyond_l2,
        KEPT=plan.kept,
        PIECES=plan.chunks // plan.group,
        TILED=plan.tiled,
        ROWS=plan.block_b,
        UNITS=plan.block_u,
        PARTS=plan.parts,
        PRECISION="tf32" if launch.layer.rate == "tf32" else "ieee",
        maxnreg=thread_registers(plan.num_warps, plan.together),
    )


def second_buffer(launch: Launch, plan: PersistentPlan, cut: Second | None, published: int) -> Tensor | None:
    """Return the buffer of an exchange within a step; None where there is none."""
    return None if cut is None else exchange_buffer(launch, plan, launch.layer.T, cut.chunks, published)


def norm_arguments(launch: Launch, plan: PersistentPlan) -> KernelNorm:
    """Return the argument `norm` of a kernel in Gluon, with buffers for the exchange of statistics."""
    if launch.norm.gain is None:
        return launch.norm
    buffers = [statistics_buffer(launch, plan) for _ in range(2)]
    return launch.norm._replace(product_exchange=buffers[0], cell_exchange=buffers[1])


def statistics_buffer(launch: Launch, plan: PersistentPlan) -> Tensor:
    """Return a buffer for statistics of rows, (D, T, row_blocks, rows · programs · 2) float32 (row_statistics.py)."""
    layer = launch.layer
    programs = 16 * statistics_loads(layer.H, plan.block_u)
    shape = (layer.D, layer.T, plan.row_blocks, plan.rows, programs, 2)
    statistics = torch.empty(shape, dtype=torch.float32, device=launch.device)
    unpublish(statistics)
    statistics[..., plan.unit_programs :, :] = 0
    return statistics.flatten(3)


def exchange_buffer(launch: Launch, plan: PersistentPlan, slots: int, chunks: int, published: int) -> Tensor:
    """Return a buffer of the kernels in Gluon, unpublished, but zero in columns that no program publishes.

    (D, slots, row_blocks, rows · columns) for so many chunks of columns, of which the first are published; see
    polling.py.
    """
    layer, columns = launch.layer, chunks * plan.parts * plan.block_k
    rows = plan.block_b if plan.tiled else plan.rows
    shape = (layer.D, slots, plan.row_blocks, rows * columns)
    exchange = torch.empty(shape, dtype=layer.dtype, device=launch.device)
    unpublish(exchange)
    if published < columns and plan.tiled:
        of_lane = 16 // layer.element_bytes
        exchange.view(-1, columns // of_lane, 8 * of_lane)[:, published // of_lane :] = 0
    elif published < columns:
        exchange.view(-1, columns)[:, published:] = 0
    return exchange


def streamed_buffer(launch: Launch, plan: PersistentPlan) -> Tensor:
    """Return a buffer for the weights that a plan streams, (D, programs, STREAMED, PARTS, M, 16) of 32 bits."""
    left_rows = plan.tile_bytes // (plan.chunks * plan.parts * CHUNK_BYTES)
    shape = (plan.directions, plan.unit_programs, plan.streamed, plan.parts, left_rows, CHUNK_BYTES // 4)
    return torch.empty(shape, dtype=torch.int32, device=launch.device)


def pack_weights(launch: Launch, plan: PersistentPlan, streamed: Tensor) -> None:
    """Write the weights that a plan streams into their buffer."""
    given = launch.inputs
    pack_weights_kernel[plan.unit_programs, plan.streamed, plan.directions](
        packed_ptr=streamed.view(given["w_hh_ptr"].dtype),
        w_hh_ptr=given["w_hh_ptr"],
        w_ch_ptr=given["w_ch_ptr"] if launch.layer.spec.full else None,
        H=launch.layer.H,
        HIDDEN=launch.layer.hidden,
        COUPLED=launch.layer.spec.coupled,
        FULL=launch.layer.spec.full,
        OUTPUT_CURRENT=launch.layer.spec.output_current,
        BACKWARD=launch.backward,
        PRECISION="tf32" if launch.layer.rate == "tf32" else "ieee",
        CHUNKS=plan.chunks,
        STREAMED=plan.streamed,
        UNITS=plan.block_u,
        PARTS=plan.parts,
        WARPS=plan.num_warps,
        num_warps=plan.num_warps,
    )
