"""On a GPU, calls that are replayed from CUDA graphs: sessions in chunks, and whole stacks in training."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from lstm_triton import routing

if not routing.TRITON_INSTALLED:
    pytest.skip("needs triton", allow_module_level=True)

import lstm_triton
from lstm_triton import LSTMSpec, session
from tests.support.composes import loss, tensors, variant
from tests.support.gpu import NEEDS_GPU, finish

pytestmark = NEEDS_GPU

B, I, H = 12, 40, 130  # noqa: E741
SPECS = [LSTMSpec(), LSTMSpec(coupled=True, peephole="diagonal"), LSTMSpec(peephole="full", output_peephole="current")]
OF_EACH = [(spec, strategy) for spec in SPECS for strategy in ("stepwise", "auto")] + [(LSTMSpec(), "cudnn")]
each_of_each = pytest.mark.parametrize("spec, strategy", OF_EACH, ids=lambda v: v if isinstance(v, str) else v.name)
ieee = pytest.mark.parametrize("precision", ["float32 ieee"], indirect=True)
NEAR = dict(rtol=1e-4, atol=1e-4)
SIZES = (1, 3, 7, 1, 64, 3, 1, 7, 64)


@pytest.fixture(autouse=True)
def nothing_times_out_and_every_capture_succeeds():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without CUDA graphs.*")
        yield
    if torch.cuda.is_available():
        finish()


def lstm(spec, **options):
    return lstm_triton.LSTM(I, H, device="cuda", **options, **variant(spec))


def near(found, wanted):
    torch.testing.assert_close(list(found), list(wanted), **NEAR)


# Sessions.


@pytest.mark.parametrize("with_resets", [False, True], ids=["plain", "resets"])
@each_of_each
@ieee
def test_chunks_by_graphs_compute_what_one_call_does(spec, strategy, with_resets, precision):
    if with_resets and strategy == "cudnn":
        pytest.skip("torch.nn.LSTM's operator takes no resets")
    module = lstm(spec, strategy=strategy, num_layers=2).eval()
    x = torch.randn(sum(SIZES), B, I, device="cuda")
    resets = torch.rand(sum(SIZES), B, device="cuda") < 0.1 if with_resets else None
    held = module.session(B)
    flags = [None] * len(SIZES) if resets is None else resets.split(SIZES)
    found = torch.cat([held(part, resets=own) for part, own in zip(x.split(SIZES), flags, strict=True)])
    with torch.no_grad():
        output, states = module(x, resets=resets)
    near((found, *held.state), (output, *states))
    assert held.graphs and len(held._chunks) == 4


@pytest.mark.parametrize(
    "options", [dict(proj_size=30), dict(batch_first=True), dict(dtype=torch.bfloat16)], ids=["proj", "batch", "bf16"]
)
def test_other_layouts_and_types(options):
    module = lstm(LSTMSpec(), **options).eval()
    x = torch.randn(B, B, I, device="cuda", dtype=options.get("dtype"))  # as many steps as rows
    time = 1 if module.batch_first else 0
    held = module.session(B)
    found = torch.cat([held(part) for part in x.split(3, time)], time)
    tolerance = dict(rtol=0.05, atol=0.05) if x.dtype == torch.bfloat16 else dict(rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found, module(x)[0], **tolerance)
    assert len(held._chunks) == 1


@ieee
def test_outputs_resets_of_rows_and_new_values(precision):
    module = lstm(LSTMSpec(), strategy="stepwise").eval()
    held, x = module.session(B), torch.randn(4, B, I, device="cuda")
    first = held(x)
    kept, state = first.clone(), held.state
    held(x)
    assert torch.equal(first, kept)
    mask = torch.arange(B, device="cuda") % 2 == 0
    torch.cuda.set_sync_debug_mode("error")
    try:
        held.load_state(state)
        held.reset(mask)
        found = held(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found[:, mask], first[:, mask]) and not torch.equal(found[:, ~mask], first[:, ~mask])
    module.load_state_dict(lstm(LSTMSpec()).state_dict())
    held.reset()
    near((held(x),), (module(x)[0],))
    assert len(held._chunks) == 1
    graph = held._chunks[4, False]
    module.weight_hh_l0.data = module.weight_hh_l0.data.clone()
    held.reset()
    near((held(x),), (module(x)[0],))
    assert held._chunks[4, False] is not graph


@ieee
def test_more_numbers_of_steps_than_graphs_are_kept(precision, monkeypatch):
    monkeypatch.setattr(session, "MOST_GRAPHS", 2)
    module = lstm(LSTMSpec(), strategy="auto").eval()
    held = module.session(B)
    sizes = (1, 2, 3, 4, 1, 2, 2, 1)
    x = torch.randn(sum(sizes), B, I, device="cuda")
    near((torch.cat([held(part) for part in x.split(sizes)]),), (module(x)[0],))
    assert len(held._chunks) == 2


@ieee
def test_on_several_streams_one_after_the_other(precision):
    module = lstm(LSTMSpec(), num_layers=2).eval()
    held, x = module.session(B), torch.randn(30, B, I, device="cuda")
    wanted = module(x)[0]
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    found = []
    for n, part in enumerate(x.split(2)):
        with torch.cuda.stream(streams[n % 3]):
            found.append(held(part))
    torch.cuda.synchronize()
    near((torch.cat(found),), (wanted,))


@ieee
def test_a_session_inside_of_a_capture_is_captured_with_it(precision):
    module = lstm(LSTMSpec(), strategy="auto").eval()
    held, x = module.session(B), torch.randn(6, B, I, device="cuda")
    held(x[:2])  # compiles
    held.reset()
    static = x[:2].clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = held(static)
    found = []
    for part in x.split(2):
        static.copy_(part)
        graph.replay()
        found.append(output.clone())
    near((torch.cat(found),), (module(x)[0],))


# Whole stacks.


@pytest.mark.parametrize("options", [dict(num_layers=2), dict(bidirectional=True)], ids=["two layers", "bidirectional"])
@each_of_each
@ieee
def test_captured_training_is_as_by_the_module(spec, strategy, options, precision):
    """Over several inputs, with gradients of two calls added up and the weights changed between the pairs."""
    module = lstm(spec, strategy=strategy, **options)
    plain, fast = copy.deepcopy(module), module.captured()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (module, plain)]
    for _ in range(3):
        found = [[], []]
        for _ in range(2):
            x = torch.randn(37, B, I, device="cuda")
            for run, into in zip((fast, plain), found, strict=True):
                own = x.clone().requires_grad_()
                result = run(own)
                loss(result).backward()
                into += [*(t.detach() for t in tensors(result)), own.grad]
        near(*found)
        near(*([p.grad for p in m.parameters()] for m in (module, plain)))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        near(module.parameters(), plain.parameters())
    (graph,) = fast._graphs.values()
    assert graph.replays == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_captured_under_autocast(dtype):
    module = lstm(LSTMSpec(), num_layers=2)
    plain, fast = copy.deepcopy(module), module.captured()
    for _ in range(3):
        x = torch.randn(20, B, I, device="cuda")
        for run in (fast, plain):
            with torch.autocast("cuda", dtype):
                result = run(x)
            assert result[0].dtype == dtype
            result[0].float().square().mean().backward()
    torch.testing.assert_close(
        [p.grad for p in module.parameters()], [p.grad for p in plain.parameters()], rtol=0.05, atol=1e-3
    )


@ieee
def test_captured_with_states_resets_and_cell_states_and_without_gradients(precision):
    module = lstm(SPECS[1], num_layers=2)
    fast = module.captured()
    for _ in range(3):
        x, hx = torch.randn(37, B, I, device="cuda"), [torch.randn(2, B, H, device="cuda") for _ in range(2)]
        asked = dict(resets=torch.rand(37, B, device="cuda") < 0.1, return_cell_states=True)
        with torch.no_grad():
            near(tensors(fast(x, hx, **asked)), tensors(module(x, hx, **asked)))
    (graph,) = fast._graphs.values()
    assert graph.replays == 3


def test_captured_dropout_draws_anew_in_each_call_and_repeats_from_a_seed():
    module = lstm(LSTMSpec(), num_layers=2, dropout=0.5)
    fast, x = module.captured(), torch.randn(20, B, I, device="cuda")
    torch.manual_seed(3)
    first, second = (fast(x)[0].detach() for _ in range(2))  # the first captures, which draws nothing
    torch.manual_seed(3)
    assert torch.equal(first, fast(x)[0]) and not torch.equal(first, second)


@ieee
def test_captured_calls_before_the_backward_pass_and_too_late_a_backward_pass(precision):
    module = lstm(LSTMSpec())
    plain, fast = copy.deepcopy(module), module.captured()
    inputs = [torch.randn(20, B, I, device="cuda") for _ in range(3)]
    for run in (fast, plain):
        sum(loss(result) for result in [run(x) for x in inputs]).backward()
    near(*([p.grad for p in m.parameters()] for m in (module, plain)))
    result = loss(fast(inputs[0]))
    result.backward(retain_graph=True)
    fast(inputs[1])
    with pytest.raises(RuntimeError, match="comes too late"):
        result.backward()
