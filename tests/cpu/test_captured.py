"""Whole stacks by CUDA graphs: which calls are, and that what their memory is used for again does not show.

`make_graphed_callables` has a stand-in that computes on the CPU and behaves as PyTorch's does: it reads parameters and
writes results, gradients and activations in the memory of the capture, at each replay the same.
"""

import copy
import pickle

import pytest
import torch
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pack_sequence

import lstm_triton
from lstm_triton import VARIANTS, captured

T, B, I, H = 6, 3, 5, 8  # noqa: E741
OPTIONS = {
    "one layer": dict(),
    "two layers, both directions": dict(num_layers=2, bidirectional=True),
    "projection, batch first": dict(num_layers=2, proj_size=3, batch_first=True, bias=False),
}


class Graphing:
    """`make_graphed_callables` on a CPU; what it captured, and how often each graph was replayed."""

    def __init__(self):
        self.captures, self.replays, self.backwards, self.refuse = 0, [], [], False

    def __call__(self, function, static, num_warmup_iters=3, allow_unused_input=False, capture_error_mode="global"):
        assert not torch.is_autocast_enabled("cpu") or not torch.is_autocast_cache_enabled()
        if self.refuse:
            raise RuntimeError("no graphs today")
        number, self.captures = self.captures, self.captures + 1
        self.replays.append(0)
        self.backwards.append(0)
        learning = [t for t in static if t.requires_grad]
        options = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None

        def compute():
            with torch.set_grad_enabled(bool(learning)), torch.autocast("cpu", options, options is not None, False):
                return function(*static)

        saved = {"activations": compute()}
        outputs = [torch.full_like(t, torch.nan) for t in saved["activations"]]
        gradients = [torch.full_like(t, torch.nan) if t.requires_grad else None for t in static]

        class Graphed(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *inputs):
                for own, given in zip(static, inputs, strict=True):
                    if own.data_ptr() != given.data_ptr():
                        own.copy_(given)
                saved["activations"] = compute()
                self.replays[number] += 1
                for own, value in zip(outputs, saved["activations"], strict=True):
                    own.copy_(value.detach())
                return tuple(own.detach() for own in outputs)

            @staticmethod
            @once_differentiable
            def backward(ctx, *grads):
                self.backwards[number] += 1
                found = iter(
                    torch.autograd.grad(
                        saved["activations"], learning, grads, allow_unused=allow_unused_input, retain_graph=True
                    )
                )
                for own in gradients:
                    if own is not None:
                        own.copy_(next(found))
                return tuple(None if own is None else own.detach() for own in gradients)

        return Graphed.apply


@pytest.fixture
def graphs(monkeypatch):
    fake = Graphing()
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fake)
    monkeypatch.setattr(captured, "has_graphs", lambda device: True)
    return fake


def lstm(spec=None, dtype=torch.float64, **options):
    spec = spec or lstm_triton.LSTMSpec()
    variant = dict(coupled=spec.coupled, peephole=spec.peephole, output_peephole=spec.output_peephole)
    return lstm_triton.LSTM(I, H, dtype=dtype, **variant, **options)


def sequence(module, steps=T, rows=B, dtype=torch.float64):
    return torch.randn((rows, steps, I) if module.batch_first else (steps, rows, I), dtype=dtype)


def tensors(result):
    output, states, *rest = result
    return [output, *states, *rest]


def loss(result):
    return sum((t * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() + t.square().sum() for t in tensors(result))


def gradients(module):
    return [p.grad for p in module.parameters()]


def near(found, wanted):
    torch.testing.assert_close(list(found), list(wanted), rtol=1e-12, atol=1e-12)


def pair(spec=None, **options):
    """A module by graphs, and its copy as usual."""
    module = lstm(spec, **options)
    return module.captured(), copy.deepcopy(module)


# Calls by graphs compute what the module does.


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
def test_training_is_as_by_the_module(spec, options, graphs):
    """Over several inputs, with the weights changed between them."""
    fast, plain = pair(spec, **options)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for m in (fast.module, plain)]
    for _ in range(4):
        x, found = sequence(plain), []
        for run, optimizer in zip((fast, plain), optimizers, strict=True):
            own = x.clone().requires_grad_()
            optimizer.zero_grad()
            result = run(own)
            loss(result).backward()
            optimizer.step()
            found.append([*tensors(result), own.grad, *run_parameters(run)])
        near(*found)
    assert graphs.captures == 1 and graphs.replays == [4] and graphs.backwards == [4]


def run_parameters(run):
    return (run.module if isinstance(run, captured.Captured) else run).parameters()


def test_states_resets_and_cell_states(graphs):
    fast, plain = pair(num_layers=2)
    for _ in range(3):
        x, states = sequence(plain), [torch.randn(2, B, H).double() for _ in range(2)]
        resets = torch.rand(T, B) < 0.3
        found = []
        for run in (fast, plain):
            own = [state.clone().requires_grad_() for state in states]
            result = run(x, own, resets=resets, return_cell_states=True)
            assert isinstance(result, tuple) and isinstance(result[1], tuple) and len(result) == 3
            found.append([*tensors(result), *torch.autograd.grad(loss(result), own)])
        near(*found)
    assert graphs.replays == [3]


def test_gradients_add_up_over_calls(graphs):
    """And stay what they were when a later backward pass writes the memory of the graphs again."""
    fast, plain = pair(num_layers=2)
    for _ in range(3):
        x = sequence(plain)
        loss(fast(x)).backward()
        loss(plain(x)).backward()
    near(gradients(fast.module), gradients(plain))
    assert graphs.replays == [3]
    kept = [torch.autograd.grad(loss(fast(sequence(plain))), list(fast.module.parameters())) for _ in range(2)]
    assert not torch.equal(kept[0][0], kept[1][0])


def test_outputs_are_not_written_to_by_later_calls(graphs):
    fast, plain = pair()
    x = sequence(plain)
    with torch.no_grad():
        first = fast(x)[0]
        kept = first.clone()
        fast(sequence(plain))
    assert torch.equal(first, kept) and graphs.replays == [2]


def test_a_call_before_the_backward_pass_of_the_last_is_computed_by_the_module(graphs):
    fast, plain = pair()
    inputs = [sequence(plain) for _ in range(3)]
    loss_of = [loss(fast(x)) for x in inputs]
    assert graphs.replays == [1]
    sum(loss_of).backward()
    sum(loss(plain(x)) for x in inputs).backward()
    near(gradients(fast.module), gradients(plain))
    fast(inputs[0])
    assert graphs.replays == [2]


def test_results_that_are_dropped_hold_nothing_back(graphs):
    fast, plain = pair()
    for _ in range(3):
        fast(sequence(plain))
    assert graphs.replays == [3]
    kept = fast(sequence(plain))
    fast(sequence(plain))
    assert graphs.replays == [4]
    del kept
    fast(sequence(plain))
    assert graphs.replays == [5]


def test_a_second_backward_pass_comes_before_the_next_call_or_raises(graphs):
    fast, plain = pair()
    result = loss(fast(sequence(plain)))
    result.backward(retain_graph=True)
    result.backward(retain_graph=True)
    loss(fast(sequence(plain))).backward()
    assert graphs.replays == [2]
    with pytest.raises(RuntimeError, match="this backward pass comes too late"):
        result.backward()


def test_there_is_no_double_backward(graphs):
    fast, plain = pair()
    x = sequence(plain).requires_grad_()
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(fast(x)[0].sum(), x, create_graph=True)


def test_a_weight_changed_before_the_backward_pass_raises(graphs):
    fast, plain = pair()
    result = loss(fast(sequence(plain)))
    with torch.no_grad():
        fast.module.weight_hh_l0.mul_(2.0)
    with pytest.raises(RuntimeError, match="changed in place between a call and its backward pass"):
        result.backward()


def test_some_parameters_frozen_and_some_results_used(graphs):
    fast, plain = pair(num_layers=2)
    for module in (fast.module, plain):
        module.weight_ih_l0.requires_grad_(False)
    x = sequence(plain)
    for run in (fast, plain):
        run(x)[1][1].sum().backward()
    assert fast.module.weight_ih_l0.grad is None
    near(gradients(fast.module)[1:], gradients(plain)[1:])


def test_under_autocast(graphs):
    fast, plain = pair(dtype=torch.float32)
    x = sequence(plain, dtype=torch.float32)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            results = [run(x) for run in (fast, plain)]
        for result in results:
            loss(result).backward()
        assert results[0][0].dtype == torch.bfloat16
        torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(gradients(fast.module), gradients(plain))
    fast(x)
    assert graphs.replays == [2, 1]


def test_in_inference_mode_and_outside(graphs):
    fast, plain = pair()
    x = sequence(plain)
    wanted = plain(x)[0].detach()
    with torch.inference_mode():
        first = fast(x.clone())[0]
    with torch.no_grad():
        second = fast(x)[0]
    assert not second.requires_grad and graphs.replays == [2]
    near((first, second), (wanted, wanted))


def test_checkpointing_with_reentry_computes_again_by_the_module(graphs):
    fast, plain = pair()
    x = sequence(plain).requires_grad_()
    torch.utils.checkpoint.checkpoint(lambda x: fast(x)[0], x, use_reentrant=True).square().sum().backward()
    plain(x)[0].square().sum().backward()
    near(gradients(fast.module), gradients(plain))
    assert graphs.replays == [1]  # without gradients


# Which calls are by which graphs.


def test_each_kind_of_call_has_its_graphs(graphs):
    fast = lstm(num_layers=2, dropout=0.5).captured()
    module = fast.module
    kinds = [
        lambda: fast(sequence(module)),
        lambda: fast(sequence(module, steps=T + 1)),
        lambda: fast(sequence(module).requires_grad_()),
        lambda: torch.no_grad()(fast)(sequence(module)),
        lambda: fast(sequence(module), resets=torch.zeros(T, B, dtype=torch.bool)),
        lambda: fast(sequence(module), return_cell_states=True),
        lambda: fast(sequence(module), (torch.zeros(2, B, H).double(),) * 2),
    ]
    for _ in range(2):
        for kind in kinds:
            kind()
    assert graphs.replays == [2] * len(kinds)
    module.eval()
    kinds[0]()
    assert graphs.captures == len(kinds) + 1


def test_what_was_not_used_for_longest_goes(graphs, monkeypatch):
    monkeypatch.setattr(captured, "MOST_GRAPHS", 2)
    fast = lstm().captured()
    for steps in (1, 2, 1, 3, 1, 2):
        fast(sequence(fast.module, steps=steps))
    assert graphs.captures == 4 and graphs.replays == [3, 1, 1, 1]


def test_a_backward_pass_after_its_graphs_have_gone(graphs, monkeypatch):
    monkeypatch.setattr(captured, "MOST_GRAPHS", 1)
    fast, plain = pair()
    x = sequence(plain)
    result = loss(fast(x))
    fast(sequence(plain, steps=2))
    result.backward()
    loss(plain(x)).backward()
    near(gradients(fast.module), gradients(plain))


@pytest.mark.parametrize("how", ["moved", "replaced", "strategy"])
def test_other_weights_or_options_are_captured_anew(how, graphs):
    fast = lstm().captured()
    module = fast.module
    fast(sequence(module))
    if how == "moved":
        module.weight_hh_l0.data = module.weight_hh_l0.data.clone()
    elif how == "replaced":
        module.weight_hh_l0 = torch.nn.Parameter(torch.randn(4 * H, H).double())
    else:
        module.strategy = "auto" if module.strategy != "auto" else "cudnn"
        with pytest.raises(RuntimeError, match="cannot run here"):
            fast(sequence(module))
        module.strategy = "auto"
    x = sequence(module)
    near((fast(x)[0],), (module(x)[0],))
    assert graphs.captures == 2


def hooked(fast, x):
    handle = fast.module.register_forward_hook(lambda *_: None)
    result = fast(x)
    handle.remove()
    return result


def with_saved_tensor_hooks(fast, x):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        return fast(x)


def normed(fast, x):
    torch.nn.utils.parametrizations.weight_norm(fast.module, "weight_hh_l0")
    return fast(x)


AS_USUAL = {
    "lengths": lambda fast, x: fast(x, lengths=[T, 1, 2]),
    "packed": lambda fast, x: fast(pack_sequence([x[:, 0]])),
    "no rows": lambda fast, x: fast(x[:, :0]),
    "torch.func": lambda fast, x: torch.func.vmap(lambda row: fast(row)[0])(x[:, None].expand(T, 2, B, I)),
    "forward mode": lambda fast, x: torch.func.jvp(lambda x: fast(x)[0], (x,), (x,)),
    "hooks": hooked,
    "saved tensors": with_saved_tensor_hooks,
    "checkpointing": lambda fast, x: torch.utils.checkpoint.checkpoint(fast, x, use_reentrant=False),
    "computed weights": normed,
    "torch.compile": lambda fast, x: torch.compile(lambda x: fast(x)[0], backend="eager", fullgraph=True)(x),
}


@pytest.mark.parametrize("call", AS_USUAL.values(), ids=AS_USUAL)
def test_other_calls_are_computed_by_the_module(call, graphs):
    fast = lstm().captured()
    call(fast, sequence(fast.module))
    assert graphs.captures == 0


ERRORS = {
    "features": (lambda fast, x: fast(x[..., :2]), RuntimeError, "input_size"),
    "type": (lambda fast, x: fast(x.float()), ValueError, "does not match weight dtype"),
    "dimensions": (lambda fast, x: fast(x[None]), ValueError, "2D or 3D"),
    "size of states": (lambda fast, x: fast(x, (x[0, 0], x[0, 0])), RuntimeError, "hx and cx"),
    "one state": (lambda fast, x: fast(x, (x,)), RuntimeError, "two hidden states"),
    "resets": (lambda fast, x: fast(x, resets=torch.ones(T, B)), TypeError, "bool"),
    "device": (lambda fast, x: fast(x.to("meta")), RuntimeError, "same device"),
    "no steps": (lambda fast, x: fast(x[:0]), RuntimeError, "larger than 0"),
    "flag": (lambda fast, x: fast(x, return_cell_states=1), TypeError, "bool"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("call, error, words", ERRORS.values(), ids=ERRORS)
def test_errors_are_the_module_s(call, error, words, graphs):
    fast = lstm().captured()
    with pytest.raises(error, match=words):
        call(fast, sequence(fast.module))
    assert graphs.captures == 0


def test_a_capture_that_fails_warns_once_and_the_module_computes(graphs):
    graphs.refuse = True
    fast, plain = pair()
    x = sequence(plain)
    with pytest.warns(UserWarning, match="computed without CUDA graphs: capturing it failed: no graphs today"):
        first = fast(x)[0]
    near((first, fast(x)[0]), (plain(x)[0],) * 2)


def test_on_a_cpu_the_module_computes():
    module = lstm()
    x = sequence(module)
    assert torch.equal(module.captured()(x)[0], module(x)[0])


def test_a_copy_has_graphs_of_its_own(graphs):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = lstm()
            self.fast = self.lstm.captured()

        def forward(self, x):
            return self.fast(x)[0]

    model = Model()
    x = sequence(model.lstm)
    first = model(x)
    for other in (copy.deepcopy(model), None):
        other = other or Model()
        assert other.fast.module is other.lstm and other.fast._graphs is not model.fast._graphs
    assert len(list(model.parameters())) == 4
    near((copy.deepcopy(model)(x),), (first,))
    fast = pickle.loads(pickle.dumps(model.fast))
    near((fast(x)[0],), (first,))
    assert graphs.captures == 3 and "Captured(LSTM(5, 8, lstm_triton))" in repr(fast)
