"""The cells of examples/own_cell in Triton's interpreter, and their references against what others compute."""

import pytest
import torch
import triton

from tests.support.own_cell import CELLS, errors, errors_of_kernels, gru, random_inputs, results, slstm

BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2.4e-2}
SHAPES = [(3, 2, 5, 7), (2, 5, 1, 130), (1, 1, 1, 1)]
"""T, B, I, H: a part of a block; more rows and units than one block has; one of each."""

every_cell = pytest.mark.parametrize("name", CELLS)


@pytest.mark.parametrize("T, B, I, H", SHAPES)
@every_cell
def test_outputs_and_gradients_in_float64(name, T, B, I, H):  # noqa: E741
    found = errors_of_kernels(name, T, B, I, H, torch.float64)
    assert max(found.values()) <= BOUND[torch.float64], found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@every_cell
def test_outputs_and_gradients_in_other_types(name, dtype):
    found = errors_of_kernels(name, 4, 3, 5, 11, dtype)
    assert max(found.values()) <= BOUND[dtype], found


@triton.jit
def without_the_past(dh, r, z, n, u_n, h_previous):
    """`gru.gate_gradients` without the gradient that goes past the products."""
    d_n = dh * (1.0 - z) * (1.0 - n * n)
    return d_n * u_n * r * (1.0 - r), dh * (h_previous - n) * z * (1.0 - z), d_n, dh * 0.0


@triton.jit
def without_the_normalizer(dh, dc, dn, i, f, z, o, c_previous, n_previous, c, n):
    """`slstm.gate_gradients` as if n_t were a constant."""
    d_o = dh * (c / n) * o * (1.0 - o)
    dc += dh * o / n
    return dc * z * i, dc * c_previous * f, dc * i * (1.0 - z * z), d_o, dc * f, dn * f


@pytest.mark.parametrize(
    "name, module, fault", [("gru", gru, without_the_past), ("slstm", slstm, without_the_normalizer)]
)
def test_a_wrong_gradient_is_found(name, module, fault, monkeypatch):
    monkeypatch.setattr(module, "gate_gradients", fault)
    found = errors_of_kernels(name, 3, 2, 5, 7, torch.float64)
    assert found["output"] <= BOUND[torch.float64] and found["gradient of x"] > 1e-3


def test_the_gru_is_that_of_torch():
    T, B, I, H = 5, 3, 4, 7  # noqa: E741
    module = torch.nn.GRU(I, H, dtype=torch.float64)

    def torch_gru(x, h_0, *weights):
        named = dict(zip(module.state_dict(), weights, strict=True))
        return (torch.func.functional_call(module, named, (x, h_0[None]))[0],)

    inputs = random_inputs("gru", T, B, I, H)
    wanted = results("gru", torch_gru, inputs)
    for function in (CELLS["gru"].kernels, CELLS["gru"].reference):
        assert max(errors(results("gru", function, inputs), wanted).values()) <= 1e-14


def test_the_form_that_resets_before_is_that_of_onnx():
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    T, B, I, H = 5, 3, 4, 7  # noqa: E741
    inputs = {key: value.float() for key, value in random_inputs("gru", T, B, I, H).items() if key != "of output"}
    x, h_0, *weights = inputs.values()
    # ONNX has the blocks z, r, h, in which its `h` is n, and both biases in one.
    w, r, b_w, b_r = (torch.cat([t[H : 2 * H], t[:H], t[2 * H :]]) for t in weights)
    given = dict(X=x, W=w[None], R=r[None], B=torch.cat([b_w, b_r])[None], initial_h=h_0[None])
    node = onnx.helper.make_node(
        "GRU", ["X", "W", "R", "B", "", "initial_h"], ["Y"], hidden_size=H, linear_before_reset=0
    )
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "gru",
        [value(name, onnx.TensorProto.FLOAT, t.shape) for name, t in given.items()],
        [value("Y", onnx.TensorProto.FLOAT, (T, 1, B, H))],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 14)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (wanted,) = session.run(None, {name: t.numpy() for name, t in given.items()})
    torch.testing.assert_close(gru.reset_before(*inputs.values()), torch.from_numpy(wanted[:, 0]), rtol=1e-5, atol=1e-6)
    assert (gru.reference(*inputs.values()) - torch.from_numpy(wanted[:, 0])).abs().max() > 1e-2


def of_slstm(T, B, I, H, seed=0):  # noqa: E741
    """x, h_0 and weights of an sLSTM in float64, which require a gradient."""
    inputs = random_inputs("slstm", T, B, I, H, seed)
    return [inputs[key].requires_grad_() for key in ("x", "h_0", "weight_ih", "weight_hh", "bias")]


both_forget_gates = pytest.mark.parametrize("exp_forget", [False, True], ids=["sigmoid", "exponential"])


@both_forget_gates
def test_the_stabilizer_changes_no_output_and_no_gradient(exp_forget):
    """By the formula without one, and whether or not autograd knows that m_t depends on the gates."""
    x, h_0, *weights = given = of_slstm(6, 3, 4, 7)
    empty = slstm.initial_state(3, 7, torch.float64)
    plain = slstm.unstabilized(*given, exp_forget)
    constant = slstm.reference(x, h_0, empty, *weights, exp_forget)[0]
    dependent = slstm.reference(x, h_0, empty, *weights, exp_forget, constant_stabilizer=False)[0]
    by_kernels = slstm.slstm(x, h_0, empty, *weights, exp_forget)[0]
    along = random_inputs("slstm", 6, 3, 4, 7)["of output"]
    wanted = torch.autograd.grad(plain, given, along)
    for output in (constant, dependent, by_kernels):
        torch.testing.assert_close(output, plain, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(torch.autograd.grad(output, given, along), wanted, rtol=1e-11, atol=1e-13)


def test_what_is_divided_by_the_stabilizer_depends_on_it():
    """So the test before can fail: of c_n itself the two conventions give different gradients."""
    x, h_0, *weights = of_slstm(6, 3, 4, 7)
    empty = slstm.initial_state(3, 7, torch.float64)
    gradients = []
    for constant in (True, False):
        _, (c_n, _, _) = slstm.reference(x, h_0, empty, *weights, constant_stabilizer=constant)
        gradients.append(torch.autograd.grad(c_n.sum(), x)[0])
    assert (gradients[0] - gradients[1]).norm() > 0.01 * gradients[0].norm()


@both_forget_gates
def test_a_state_carried_to_a_second_call_carries_its_gradients(exp_forget):
    x, h_0, *weights = given = of_slstm(5, 3, 4, 7)
    empty = slstm.initial_state(3, 7, torch.float64)
    whole = slstm.reference(x, h_0, empty, *weights, exp_forget)[0]
    first, state = slstm.slstm(x[:2], h_0, empty, *weights, exp_forget)
    second, _ = slstm.slstm(x[2:], first[-1], state, *weights, exp_forget)
    parts = torch.cat([first, second])
    along = random_inputs("slstm", 5, 3, 4, 7)["of output"]
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-14)
    wanted = torch.autograd.grad(whole, given, along)
    torch.testing.assert_close(torch.autograd.grad(parts, given, along), wanted, rtol=1e-11, atol=1e-13)


@both_forget_gates
def test_large_preactivations_stay_finite(exp_forget):
    """A factor e^1000 of every i cancels in h, and its gradients stay as they were; exp of 1000 is infinite."""
    x, h_0, w_ih, w_hh, bias = of_slstm(4, 3, 4, 7)
    empty = slstm.initial_state(3, 7, torch.float64)
    larger = (bias + torch.cat([torch.full((7,), 1000.0), torch.zeros(21)])).detach().requires_grad_()
    along = random_inputs("slstm", 4, 3, 4, 7)["of output"]
    found = []
    for b in (bias, larger):
        output = slstm.slstm(x, h_0, empty, w_ih, w_hh, b, exp_forget)[0]
        found.append((output, *torch.autograd.grad(output, (x, h_0, w_ih, w_hh, b), along)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-11)
    assert not slstm.unstabilized(x, h_0, w_ih, w_hh, larger, exp_forget).isfinite().any()


@both_forget_gates
@pytest.mark.parametrize("bound", [1e2, 1e4])
def test_preactivations_of_any_size_are_finite_in_float32(bound, exp_forget):
    """Both ways: where f vanishes, and where it grows. The references are in float64, on the same inputs."""
    x, h_0, w_ih, w_hh, bias = (t.detach().float() for t in of_slstm(4, 3, 4, 7))
    given = [t.requires_grad_() for t in (x * bound, h_0, w_ih, w_hh, bias)]
    output = slstm.slstm(*given[:2], slstm.initial_state(3, 7, torch.float32), *given[2:], exp_forget)[0]
    gradients = torch.autograd.grad(output.square().sum(), given)
    assert all(t.isfinite().all() for t in (output, *gradients))
    exact = [t.detach().double() for t in given]
    wanted = slstm.reference(*exact[:2], slstm.initial_state(3, 7, torch.float64), *exact[2:], exp_forget)[0]
    assert (output - wanted).norm() <= 1e-3 * wanted.norm()


@both_forget_gates
def test_after_the_first_step_the_normalizer_is_at_least_one(exp_forget):
    x, h_0, *weights = of_slstm(9, 3, 4, 7)
    _, (_, n, m) = slstm.slstm(x * 30, h_0, slstm.initial_state(3, 7, torch.float64), *weights, exp_forget)
    assert n.min() >= 1 and m.isfinite().all()


@every_cell
def test_a_nan_stays_in_its_row(name):
    inputs = random_inputs(name, 4, 3, 5, 7)
    inputs["x"][1, 2, 0] = torch.nan
    output = CELLS[name].kernels(*(value for key, value in inputs.items() if not key.startswith("of ")))[0]
    nan = torch.zeros(4, 3, 7, dtype=torch.bool)
    nan[1:, 2] = True
    assert torch.equal(output.isnan(), nan)


@pytest.mark.parametrize(
    "name, argument, shape",
    [
        ("gru", "h_0", (2, 8)),
        ("gru", "weight_ih", (21, 4)),
        ("gru", "bias_hh", (20,)),
        ("slstm", "h_0", (2, 8)),
        ("slstm", "bias", (20,)),
        ("slstm", "m_0", (2, 8)),
    ],
)
def test_wrong_shapes_are_an_error(name, argument, shape):
    inputs = random_inputs(name, 3, 2, 5, 7)
    given = {key: value for key, value in inputs.items() if not key.startswith("of ")}
    given[argument] = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match="do not belong together"):
        CELLS[name].kernels(*given.values())


@every_cell
def test_different_types_are_an_error(name):
    given = {key: value for key, value in random_inputs(name, 3, 2, 5, 7).items() if not key.startswith("of ")}
    given["h_0"] = given["h_0"].float()
    with pytest.raises(ValueError, match=r"\(2, 7\) torch.float32"):
        CELLS[name].kernels(*given.values())
