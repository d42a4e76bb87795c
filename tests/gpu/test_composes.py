"""On a GPU, what PyTorch does around a module: graphs, packing without waiting, autocast, compile, streams."""

from __future__ import annotations

import copy
import warnings
from contextlib import contextmanager

import pytest
import torch

from lstm_triton import routing

if not routing.TRITON_INSTALLED:
    pytest.skip("needs triton", allow_module_level=True)

from lstm_triton_kernels.sizes import matmul_precision
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils.rnn import PackedSequence

import lstm_triton
from lstm_triton import LSTMSpec
from tests.support.composes import (
    EVERYTHING,
    arguments,
    by_reference,
    in_rows,
    loss,
    module_of,
    packed,
    packed_by_reference,
    tensors,
    variant,
    with_and_without_checkpoint,
)
from tests.support.gpu import FLOOR, NEEDS_GPU, TIMES_CUDNN, TYPES, finish
from tests.support.rounding import RoundedOperands, operand_rounding

pytestmark = NEEDS_GPU

DEVICE = "cuda"
STANDARD = LSTMSpec()
SPECS = [STANDARD, LSTMSpec(coupled=True, peephole="diagonal"), LSTMSpec(peephole="full", output_peephole="current")]
T, B, I, H = 37, 12, 40, 130  # noqa: E741  (more than a chunk of the stepwise strategy's steps)
ROWS = (30, 37, 1, 18, 37, 2, 25, 9, 36, 11, 20, 5)
"""The lengths of B packed rows."""

STRATEGIES = ("stepwise", "auto")
NEAR = dict(rtol=1e-4, atol=1e-4)
"""float32, where GEMMs may take another algorithm."""

every_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
two_specs = pytest.mark.parametrize("spec", SPECS[:2], ids=lambda spec: spec.name)
each_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
ieee = pytest.mark.parametrize("precision", ["float32 ieee"], indirect=True)
"""float32 products that are exact, so that a strategy or a compiler changes no more than the order of sums."""

OF_EACH = [(spec, strategy) for spec in SPECS[:2] for strategy in STRATEGIES] + [(STANDARD, "cudnn")]
each_of_each = pytest.mark.parametrize("spec, strategy", OF_EACH, ids=lambda v: v if isinstance(v, str) else v.name)


@pytest.fixture(autouse=True)
def nothing_times_out():
    """After each test, no launch has timed out."""
    yield
    torch._dynamo.reset()
    if torch.cuda.is_available():
        finish()


def lstm(spec, **options):
    return lstm_triton.LSTM(I, H, **(dict(device=DEVICE) | options), **variant(spec))


def sequence(steps=T, rows=B, **options):
    return torch.randn(steps, rows, I, **(dict(device=DEVICE) | options))


def packed_rows(lengths=ROWS, **options):
    """Random rows, packed; the data on the GPU, the batch sizes on the host."""
    return packed(lengths, I, **(dict(device=DEVICE, dtype=torch.float32) | options))


def gradients(result, module):
    return torch.autograd.grad(loss(result), list(module.parameters()))


def near(actual, expected):
    torch.testing.assert_close(list(actual), list(expected), **NEAR)


@contextmanager
def waiting_is_an_error():
    """Inside, an operation that waits for the GPU raises RuntimeError."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(run):
    """The graph of `run`, and the results that a replay writes to."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


# CUDA graphs


class Positional(torch.nn.Module):
    """A module whose lengths and resets are given by position, as a graphed callable takes its tensors."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x, *rest):
        named = dict(zip(("lengths", "resets"), rest, strict=False))
        return tuple(tensors(self.module(x, **named, return_cell_states=bool(rest))))


@pytest.mark.parametrize("asked", [(), EVERYTHING[:2]], ids=["plain", "lengths, resets, cell states"])
@each_of_each
@ieee
def test_a_graphed_module_trains_as_the_module_does(spec, strategy, asked, precision):
    """Three steps, each on another input, with other lengths and resets."""
    if asked and strategy == "cudnn":
        pytest.skip("torch.nn.LSTM's operator takes none of these")
    plain = Positional(lstm(spec, strategy=strategy, num_layers=2))
    module = copy.deepcopy(plain)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (module, plain)]

    def given(n):
        options = arguments(asked, T, B, DEVICE)
        rolled = [options[name].roll(n, -1) for name in asked]
        return sequence(), *rolled

    graphed = torch.cuda.make_graphed_callables(module, given(0))
    for n in range(3):
        arguments_now, found = given(n), []
        for run, optimizer in zip((graphed, plain), optimizers, strict=True):
            optimizer.zero_grad()
            results = run(*arguments_now)
            loss(results).backward()
            optimizer.step()
            found.append([t.detach().clone() for t in results])
        near(found[0], found[1])
        near(module.parameters(), plain.parameters())


@each_strategy
@two_specs
@ieee
def test_a_captured_call_with_lengths_replays_for_other_rows(spec, strategy, precision):
    """Lengths and resets on the GPU are read at each replay; lengths out of range are taken as 1 or T."""
    module = lstm(spec, strategy=strategy, num_layers=2)
    x, options = sequence(), arguments(EVERYTHING, T, B, DEVICE)

    def run():
        with torch.no_grad():
            return tensors(module(x, **options))

    graph, results = captured(run)
    for n in range(1, 4):
        x.copy_(sequence())
        options["lengths"].copy_(options["lengths"].roll(n))
        options["resets"].copy_(options["resets"].roll(n, 1))
        graph.replay()
        near(results, run())
    within = torch.randint(1, T + 1, (B,), device=DEVICE)
    within[0], within[1] = 1, T
    options["lengths"].copy_(within)
    expected = run()
    options["lengths"][0], options["lengths"][1] = -3, T + 4
    graph.replay()
    near(results, expected)


@each_of_each
@ieee
def test_a_captured_call_with_a_packed_sequence_replays_for_other_data(spec, strategy, precision):
    """Its batch sizes, on the host, are those of the capture; the memory that they stood in may be gone."""
    module = lstm(spec, strategy=strategy, num_layers=2)
    data, batch_sizes, *order = packed_rows()
    of_capture = batch_sizes.clone()

    def run(sizes=of_capture):
        with torch.no_grad():
            return tensors(module(PackedSequence(data, sizes, *order)))

    graph, results = captured(run)
    of_capture.zero_()
    for _ in range(3):
        data.copy_(torch.randn_like(data))
        graph.replay()
        near(results, run(batch_sizes))


# Nobody waits for the GPU


@each_of_each
def test_a_packed_sequence_makes_nobody_wait(spec, strategy):
    module, input = lstm(spec, strategy=strategy, num_layers=2, bidirectional=True), packed_rows()
    for _ in range(3):  # kernels compiled, chunks captured
        gradients(module(input), module)
    with waiting_is_an_error():
        gradients(module(input), module)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@each_strategy
@two_specs
def test_lengths_on_the_host_make_nobody_wait(spec, strategy, dtype):
    module = lstm(spec, strategy=strategy, num_layers=2, bidirectional=True)
    x, options = sequence(), arguments(EVERYTHING, T, B, DEVICE)
    options["lengths"] = options["lengths"].cpu().to(dtype)
    for _ in range(3):
        gradients(module(x, **options), module)
    with waiting_is_an_error():
        gradients(module(x, **options), module)


@each_strategy
@two_specs
def test_lengths_on_the_gpu_are_waited_for_once(spec, strategy):
    """To be checked; in forward and backward of two layers and directions together."""
    module = lstm(spec, strategy=strategy, num_layers=2, bidirectional=True)
    x, options = sequence(), arguments(EVERYTHING, T, B, DEVICE)
    for _ in range(3):
        gradients(module(x, **options), module)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            gradients(module(x, **options), module)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in caught if "synchronizing CUDA operation" in str(warning.message)]
    assert len(waits) == 1, waits
    with pytest.raises(ValueError, match=f"lengths must be from 1 to the {T} steps of the input, got 0 in row 0"):
        module(x, lengths=torch.zeros_like(options["lengths"]))


# As near as cuDNN


def relative_errors(found, expected):
    """||found - expected|| / ||expected|| in float64, of each tensor."""
    pairs = [(a.detach(), e.detach()) for a, e in zip(found, expected, strict=True)]
    return [float((a.double() - e).norm() / e.norm().clamp_min(1e-30)) for a, e in pairs]


def with_gradients(rows_and_states, module, data, dtype):
    """All rows together, h_n, c_n, and the gradients of data and parameters for gradients that are always the same."""
    *rows, h_n, c_n = rows_and_states
    results = [torch.cat(rows), h_n, c_n]
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(dtype) for t in results]
    given = [g.to(t.device, t.dtype) for g, t in zip(given, results, strict=True)]
    return [*results, *torch.autograd.grad(results, [data, *module.parameters()], given)]


@pytest.mark.parametrize("precision", TYPES, indirect=True)
@each_strategy
@every_spec
def test_packed_rows_and_lengths_are_as_near_to_the_reference_as_cudnns_packed_rows(spec, strategy, precision):
    """Each result and gradient within 1.5 times what others err by, as `tests.support.gpu.bounds` has it.

    Of cuDNN's errors, a variant that it does not have may have the largest.
    """
    dtype = TYPES[precision]
    theirs = torch.nn.LSTM(I, H, device=DEVICE, dtype=dtype, bidirectional=True)
    data, *how = packed_rows(dtype=dtype)
    data.requires_grad_()

    def by_the_reference(module, spec):
        """The reference of the module in float64."""
        exact = lstm(spec, dtype=torch.float64, bidirectional=True)
        exact.load_state_dict(module.state_dict())
        wide = data.detach().double().requires_grad_()
        return with_gradients(packed_by_reference(exact, PackedSequence(wide, *how)), exact, wide, dtype)

    def errors(module, spec, rows_and_states):
        """Against the reference of the module in float64."""
        return relative_errors(with_gradients(rows_and_states, module, data, dtype), by_the_reference(module, spec))

    module = lstm(spec, strategy=strategy, dtype=dtype, bidirectional=True)
    with RoundedOperands(operand_rounding(dtype, matmul_precision())):
        rounded = by_the_reference(module, spec)
    of_rounding = relative_errors([result.detach().to(dtype) for result in rounded], by_the_reference(module, spec))
    of_cudnn = errors(theirs, STANDARD, in_rows(theirs(PackedSequence(data, *how))))
    others = [of_rounding, of_cudnn if spec.standard else [max(of_cudnn)] * len(of_rounding)]
    if dtype == torch.float32 and not spec.standard:
        others.append(errors(module, spec, packed_by_reference(module, PackedSequence(data, *how))))
    allowed = [max(TIMES_CUDNN * max(of_result), FLOOR[dtype]) for of_result in zip(*others, strict=True)]
    with lstm_triton.backend("triton"):
        from_packed = module(PackedSequence(data, *how))
        padded = torch.nn.utils.rnn.pad_sequence(torch.nn.utils.rnn.unpack_sequence(PackedSequence(data, *how)))
        output, states = module(padded, lengths=torch.tensor(ROWS))
        from_lengths = [*(output[:length, b] for b, length in enumerate(ROWS)), *states]
        for results in (in_rows(from_packed), from_lengths):
            found = errors(module, spec, results)
            wrong = [pair for pair in zip(found, allowed, strict=True) if not pair[0] <= pair[1]]
            assert not wrong, f"(error, allowed): {wrong}"


@pytest.mark.parametrize("options", [{}, dict(bidirectional=True)], ids=["one direction", "both directions"])
@ieee
def test_the_strategy_cudnn_with_a_packed_sequence_is_torchs_lstm(options, precision):
    theirs = torch.nn.LSTM(I, H, device=DEVICE, **options)
    ours = lstm(STANDARD, strategy="cudnn", **options)
    ours.load_state_dict(theirs.state_dict())
    input = packed_rows()
    found, wanted = ours(input), theirs(input)
    near(tensors(found), tensors(wanted))
    near(gradients(found, ours), gradients(wanted, theirs))


@pytest.mark.parametrize("asked", EVERYTHING)
def test_the_strategy_cudnn_refuses_what_torchs_lstm_does_not_take(asked):
    names = dict(states="return_cell_states")
    module = lstm(STANDARD, strategy="cudnn")
    with pytest.raises(RuntimeError, match=f"strategy 'cudnn' cannot run here: .* takes no {names.get(asked, asked)}"):
        module(sequence(), **arguments((asked,), T, B, DEVICE))


# Autocast


@pytest.mark.parametrize("input", ["padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strategy", [*STRATEGIES, "cudnn"])
def test_autocast_gives_the_types_of_torchs_lstm(strategy, dtype, input):
    """Of output, both states and every gradient; and the same numbers, but for rounding.

    Where bfloat16 is asked for, PyTorch 2.11 computes its own LSTM in float16 on a GPU (`_cudnn_rnn_cast_reflatten`).
    """
    theirs = torch.nn.LSTM(I, H, num_layers=2, device=DEVICE)
    ours = lstm(STANDARD, num_layers=2, strategy=strategy)
    ours.load_state_dict(theirs.state_dict())
    given = sequence() if input == "padded" else packed_rows()
    found = []
    for module in (ours, theirs):
        with torch.autocast("cuda", dtype):
            results = tensors(module(given))
        sum(t.float().square().sum() for t in results).backward()
        found.append([*results, *(p.grad for p in module.parameters())])
    if dtype == torch.float16:
        assert [t.dtype for t in found[0]] == [t.dtype for t in found[1]]
    assert {t.dtype for t in found[0][:3]} == {dtype} and {t.dtype for t in found[0][3:]} == {torch.float32}
    tolerance = 0.01 if dtype == torch.float16 else 0.05
    for a, b in zip(*found, strict=True):
        assert (a.float() - b.float()).norm() <= tolerance * b.float().norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every_spec
def test_autocast_with_lengths_resets_and_cell_states_gives_its_type(spec, dtype):
    module, x, options = lstm(spec), sequence(), arguments(EVERYTHING, T, B, DEVICE)
    with torch.autocast("cuda", dtype):
        results = tensors(module(x, **options))
        with torch.autocast("cuda", enabled=False):
            assert {t.dtype for t in tensors(module(x, **options))} == {torch.float32}
        double = tensors(module_of(spec, device=DEVICE)(torch.randn(5, 2, 3, dtype=torch.float64, device=DEVICE)))
    assert {t.dtype for t in results} == {dtype} and {t.dtype for t in double} == {torch.float64}
    sum(t.float().square().sum() for t in results).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in module.parameters())


# Compile, torch.func, checkpoint, hooks, streams


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@each_strategy
@two_specs
@ieee
def test_a_compiled_call_with_packed_rows_is_the_eager_one(spec, strategy, compiler, precision):
    module = lstm(spec, strategy=strategy)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=compiler)
    for lengths in (ROWS, (33, 4, 40)):
        input = packed_rows(lengths)
        found, plain = compiled(input), module(input)
        near(tensors(found), tensors(plain))
        near(gradients(found, module), gradients(plain, module))


@pytest.mark.parametrize("place", ["host", "gpu"])
@each_strategy
@two_specs
@ieee
def test_a_compiled_call_with_lengths_resets_and_cell_states_is_the_eager_one(spec, strategy, place, precision):
    module = lstm(spec, strategy=strategy)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for steps, rows in ((T, B), (50, 5)):
        x, options = sequence(steps, rows), arguments(EVERYTHING, steps, rows, DEVICE)
        if place == "host":
            options["lengths"] = options["lengths"].cpu()
        found, plain = compiled(x, **options), module(x, **options)
        near(tensors(found), tensors(plain))
        near(gradients(found, module), gradients(plain, module))


@each_strategy
@two_specs
def test_gradients_of_an_ensemble_by_torch_func_are_each_members(spec, strategy):
    members = [module_of(spec, strategy=strategy, device=DEVICE, dtype=torch.float32) for _ in range(3)]
    stacked = {name: weight.detach() for name, weight in stack_module_state(members)[0].items()}
    x, options = torch.randn(T, B, 3, device=DEVICE), arguments(EVERYTHING, T, B, DEVICE)
    found = vmap(grad(lambda weights: loss(functional_call(members[0], weights, (x,), options))))(stacked)
    for n, member in enumerate(members):
        exact = copy.deepcopy(member).double()
        expected = torch.autograd.grad(loss(by_reference(exact, x.double(), **options)), list(exact.parameters()))
        for gradient, wanted in zip(found.values(), expected, strict=True):
            assert (gradient[n].double() - wanted).norm() <= 1e-2 * wanted.norm()


@pytest.mark.parametrize("input", ["padded", "packed"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@each_strategy
@two_specs
@ieee
def test_a_checkpoint_changes_no_gradient_and_draws_the_same_dropout(spec, strategy, reentrant, input, precision):
    module = lstm(spec, strategy=strategy, num_layers=2, dropout=0.5)
    if input == "packed":
        x, *how = packed_rows()
        options = {}
    else:
        x, how, options = sequence(), None, arguments(EVERYTHING, T, B, DEVICE)

    def run(x):
        return tuple(tensors(module(x if how is None else PackedSequence(x, *how), **options)))

    near(*with_and_without_checkpoint(module, run, x, reentrant))


@each_strategy
@two_specs
@ieee
def test_saved_tensors_may_be_kept_on_the_host(spec, strategy, precision):
    module, x = lstm(spec, strategy=strategy, num_layers=2), sequence()
    options = arguments(EVERYTHING, T, B, DEVICE)
    expected = gradients(module(x, **options), module)
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        result = module(x, **options)
    near(gradients(result, module), expected)


@pytest.mark.parametrize("input", ["padded", "packed"])
@each_strategy
@two_specs
@ieee
def test_a_call_on_another_stream_waits_for_its_own_alone(spec, strategy, input, precision):
    """Inputs are made on the stream, late; the current stream is busy meanwhile, and memory is handed around."""
    module = lstm(spec, strategy=strategy, num_layers=2)
    given = packed_rows() if input == "packed" else sequence()
    options = {} if input == "packed" else arguments(EVERYTHING, T, B, DEVICE)
    plain = module(given, **options)
    expected = [*tensors(plain), *gradients(plain, module)]
    data, *how = given if input == "packed" else (given,)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    for _ in range(3):
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)  # cycles, a hundredth of a second
            late = torch.zeros_like(data).add_(data)
            result = module(PackedSequence(late, *how) if input == "packed" else late, **options)
            found = [*tensors(result), *gradients(result, module)]
        torch.empty_like(data).fill_(torch.nan)
        torch.cuda._sleep(20_000_000)
        torch.cuda.current_stream().wait_stream(side)
        near(found, expected)


# A step of the cell


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_step_of_the_standard_cell_is_pytorchs_own(dtype):
    """By `auto`: bit for bit, every gradient included; differentiable twice, and compiled into one graph."""
    theirs = torch.nn.LSTMCell(I, H, device=DEVICE, dtype=dtype)
    ours = lstm_triton.LSTMCell(I, H, device=DEVICE, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(B, I, device=DEVICE, dtype=dtype)
    found = []
    for module in (ours, theirs, torch.compile(ours, fullgraph=True, backend="aot_eager")):
        results = module(x)
        found.append([*results, *gradients(results, module)])
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    tolerance = {torch.float16: 1e-2, torch.bfloat16: 5e-2}.get(dtype, 1e-4)
    torch.testing.assert_close(found[2], found[0], rtol=tolerance, atol=tolerance)
    if dtype == torch.float64:
        step = lambda x, *weights: torch.cat(functional_call(ours, dict(zip(names, weights, strict=True)), (x,)))  # noqa: E731
        names = [name for name, _ in ours.named_parameters()]
        few = torch.randn(2, I, device=DEVICE, dtype=dtype, requires_grad=True)
        assert torch.autograd.gradgradcheck(step, (few, *ours.parameters()), fast_mode=True)


@pytest.mark.parametrize("dynamic", [False, True], ids=["T fixed", "any T"])
def test_a_program_of_pytorchs_operators_computes_the_same_on_the_gpu(dynamic):
    kind = dict(device="cuda", dtype=torch.float64)
    lstm = lstm_triton.LSTM(5, 8, peephole="full", layer_norm=True, bidirectional=True, **kind)
    steps = {0: torch.export.Dim("T", min=1)} if dynamic else None
    with lstm_triton.backend("torch"):
        program = torch.export.export(lstm, (torch.randn(7, 3, 5, **kind),), dynamic_shapes=(steps,))
    assert not [node for node in program.graph.nodes if "lstm_triton" in str(node.target)]
    run = program.module()
    x = torch.randn(4 if dynamic else 7, 3, 5, **kind)
    found, expected = tensors(run(x)), tensors(lstm(x))
    gradients = [torch.autograd.grad(loss(r), m.parameters()) for r, m in ((found, run), (expected, lstm))]
    for a, b in zip((*found, *gradients[0]), (*expected, *gradients[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [dict(), dict(peephole="full"), dict(zoneout=(0.1, 0.2))], ids=str)
@pytest.mark.parametrize("cell", [False, True], ids=["LSTM", "LSTMCell"])
def test_a_module_on_the_gpu_is_exported_to_onnx(cell, options):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module = (lstm_triton.LSTMCell if cell else lstm_triton.LSTM)(5, 8, device="cuda", **options).eval()
    x = torch.randn(*((3, 5) if cell else (7, 3, 5)), device="cuda")
    program = torch.onnx.export(module, (x,), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    found = session.run(None, {session.get_inputs()[0].name: x.cpu().numpy()})
    for actual, wanted in zip(found, tensors(module(x)), strict=True):
        torch.testing.assert_close(torch.from_numpy(actual), wanted.detach().cpu(), rtol=1e-3, atol=1e-3)
