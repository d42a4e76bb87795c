"""Complex and other types: computed as `torch.nn.LSTM` computes them, or refused in words; no part is lost."""

import warnings

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap

import lstm_triton
from lstm_triton import VARIANTS, LSTMSpec, convert
from tests.support.composes import close, packed, tensors, variant

COMPLEX = [torch.complex64, torch.complex128]
OPTIONS = [dict(), dict(num_layers=2, bidirectional=True), dict(batch_first=True, bias=False), dict(proj_size=3)]
REFUSED = [torch.complex32, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int32, torch.int64, torch.bool]
WITH_PEEPHOLE = [spec for spec in VARIANTS if spec.peephole]
WORDS = "an LSTM of torch.{} is not supported here: the library computes torch.float16, .*, torch.float64; complex64"

every_complex = pytest.mark.parametrize("dtype", COMPLEX, ids=str)


@pytest.fixture(autouse=True)
def compiled_anew():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def sequence(dtype, T=5, B=3):
    return torch.randn(T, B, 4, dtype=dtype)


def scalar(result):
    """Real, and neither it nor its gradient is what it is without the imaginary parts."""
    return sum((t * (1 + 2j)).abs().square().sum() + (t.sin() * (0.5 - 1j)).imag.sum() for t in tensors(result))


def gradients(module, call, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(scalar(call(x)), [x, *module.parameters()])


def bound(dtype):
    return {torch.complex64: 1e-5, torch.complex128: 1e-11}[dtype]


@every_complex
@pytest.mark.parametrize("steps", [5, 1])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_complex_layer_computes_what_torchs_does(options, steps, dtype):
    theirs, ours = torch.nn.LSTM(4, 8, dtype=dtype, **options), lstm_triton.LSTM(4, 8, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    x = sequence(dtype, steps)
    found, expected = tensors(ours(x)), tensors(theirs(x))
    assert {t.dtype for t in found} == {dtype} and all(t.imag.abs().sum() > 0 for t in found)
    close(found, expected, bound(dtype))
    close(gradients(ours, ours, x), gradients(theirs, theirs, x), bound(dtype))
    states = torch.randn_like(expected[1]), torch.randn_like(expected[2])
    close(tensors(ours(x, states)), tensors(theirs(x, states)), bound(dtype))


@every_complex
def test_a_complex_layer_takes_packed_and_unbatched_input(dtype):
    theirs, ours = torch.nn.LSTM(4, 8, dtype=dtype), lstm_triton.LSTM(4, 8, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    for input in (packed((3, 5, 1), 4, dtype=dtype), sequence(dtype)[:, 0]):
        close(tensors(ours(input)), tensors(theirs(input)), bound(dtype))


@every_complex
def test_a_complex_cell_computes_what_torchs_does(dtype):
    theirs, ours = torch.nn.LSTMCell(4, 8, dtype=dtype), lstm_triton.LSTMCell(4, 8, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    x, states = sequence(dtype)[0], torch.randn(2, 3, 8, dtype=dtype).unbind()
    for hx in (None, states):
        close(ours(x, hx), theirs(x, hx), bound(dtype))
        expected = gradients(theirs, lambda x, hx=hx: theirs(x, hx), x)
        close(gradients(ours, lambda x, hx=hx: ours(x, hx), x), expected, bound(dtype))


@every_complex
def test_a_complex_model_is_converted_and_back(dtype):
    layer, cell = torch.nn.LSTM(4, 8, 2, dtype=dtype), torch.nn.LSTMCell(4, 8, dtype=dtype)
    model = torch.nn.ModuleDict(dict(layer=layer, cell=cell))
    x = sequence(dtype)

    def results():
        return [*tensors(model["layer"](x)), *model["cell"](x[0]), *gradients(model["layer"], model["layer"], x)]

    expected = results()
    convert.from_torch(model)
    assert type(model["layer"]) is lstm_triton.LSTM and type(model["cell"]) is lstm_triton.LSTMCell
    close(results(), expected, bound(dtype))
    convert.to_torch(model)
    close(results(), expected, bound(dtype))


@every_complex
@pytest.mark.parametrize("steps", [4, 1])
def test_a_complex_coupled_layer_computes_its_equations(steps, dtype):
    """As a standard layer whose input gate has the forget gate's weights with the other sign."""
    ours, theirs = lstm_triton.LSTM(4, 8, dtype=dtype, coupled=True), torch.nn.LSTM(4, 8, dtype=dtype)
    theirs.load_state_dict({name: torch.cat([-w[:8], w]) for name, w in ours.state_dict().items()})
    x = sequence(dtype, steps)
    close(tensors(ours(x)), tensors(theirs(x)), bound(dtype))
    close(gradients(ours, ours, x)[:1], gradients(theirs, theirs, x)[:1], bound(dtype))


@every_complex
@pytest.mark.parametrize("options", [dict(), dict(coupled=True), dict(num_layers=2, bidirectional=True)], ids=str)
def test_a_compiled_complex_layer_computes_what_it_does_eagerly(options, dtype):
    module, x = lstm_triton.LSTM(4, 8, dtype=dtype, **options), sequence(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        close(tensors(compiled(x)), tensors(module(x)), bound(dtype))
        close(gradients(module, compiled, x), gradients(module, module, x), bound(dtype))


def refused(dtype, call):
    with pytest.raises(TypeError, match=WORDS.format(str(dtype).removeprefix("torch."))):
        call()


@every_complex
@pytest.mark.parametrize("spec", WITH_PEEPHOLE, ids=lambda spec: spec.name)
def test_peepholes_refuse_complex_types(spec, dtype):
    layer = lstm_triton.LSTM(4, 8, dtype=dtype, **variant(spec))
    cell = lstm_triton.LSTMCell(4, 8, dtype=dtype, **variant(spec))
    x = sequence(dtype)
    for call in (
        lambda: layer(x),
        lambda: layer(x[:1]),
        lambda: layer(x[:, :0]),
        lambda: layer(packed((3, 2), 4, dtype=dtype)),
        lambda: cell(x[0]),
    ):
        refused(dtype, call)
        with torch.no_grad():
            refused(dtype, call)
        with lstm_triton.backend("torch"):
            refused(dtype, call)


@every_complex
@pytest.mark.parametrize("spec", [LSTMSpec(), LSTMSpec(coupled=True)], ids=lambda spec: spec.name)
@pytest.mark.parametrize("steps", [5, 1])
def test_what_torchs_operator_has_not_is_refused_for_complex_types(spec, steps, dtype):
    layer, x = lstm_triton.LSTM(4, 8, dtype=dtype, **variant(spec)), sequence(dtype, steps)
    weights = dict(layer.named_parameters())
    asked = [dict(resets=torch.zeros(steps, 3, dtype=torch.bool)), dict(return_cell_states=True)]
    for options in asked + [dict(lengths=[5, 2, 3])] * (steps > 1):
        refused(dtype, lambda options=options: layer(x, **options))
    for transformed in (
        lambda: grad(lambda x: layer(x)[0].abs().sum())(x),
        lambda: vmap(lambda x: layer(x)[0])(torch.stack([x, x])),
        lambda: vmap(grad(lambda w: functional_call(layer, w, (x,))[0].abs().sum()))(
            {name: torch.stack([w, w]) for name, w in weights.items()}
        ),
        lambda: jvp(lambda x: layer(x)[0], (x,), (x,)),
    ):
        refused(dtype, transformed)


@every_complex
def test_a_complex_cell_is_refused_where_torchs_operator_does_not_serve(dtype):
    coupled, cell = lstm_triton.LSTMCell(4, 8, dtype=dtype, coupled=True), lstm_triton.LSTMCell(4, 8, dtype=dtype)
    x = sequence(dtype)
    refused(dtype, lambda: coupled(x[0]))
    refused(dtype, lambda: vmap(cell)(x))


def filled(module, dtype):
    """The module with parameters of any type, as a quantizer or a careless `to` may leave them."""
    for name, parameter in list(module.named_parameters()):
        value = torch.zeros(parameter.shape).to(dtype)
        setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
    return module


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", REFUSED, ids=str)
@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
def test_other_types_are_refused_at_the_call(spec, dtype):
    layer = filled(lstm_triton.LSTM(4, 8, **variant(spec)), dtype)
    cell = filled(lstm_triton.LSTMCell(4, 8, **variant(spec)), dtype)
    x = torch.zeros(5, 3, 4).to(dtype)
    for call in (lambda: layer(x), lambda: layer(x[:1]), lambda: layer(x, lengths=[5, 1, 2]), lambda: cell(x[0])):
        refused(dtype, call)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", REFUSED, ids=str)
@pytest.mark.parametrize("kind", [torch.nn.LSTM, torch.nn.LSTMCell])
def test_other_types_are_refused_at_conversion_before_anything_is_changed(kind, dtype):
    model = torch.nn.ModuleDict(dict(first=torch.nn.LSTM(4, 8), second=filled(kind(4, 8), dtype)))
    words = rf"^second \({kind.__name__}\) has weight_ih\w* of {dtype}, which this library does not compute: only .*"
    with pytest.raises(ValueError, match=words):
        convert.from_torch(model)
    assert type(model["first"]) is torch.nn.LSTM and type(model["second"]) is kind
    with pytest.raises(ValueError, match=r"^the module \("):
        convert.from_torch(model["second"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, *COMPLEX], ids=str)
def test_computed_types_are_converted_also_on_meta_and_parametrized(dtype):
    assert type(convert.from_torch(torch.nn.LSTM(4, 8, dtype=dtype))) is lstm_triton.LSTM
    assert type(convert.from_torch(torch.nn.LSTM(4, 8, dtype=dtype, device="meta"))) is lstm_triton.LSTM
    module = torch.nn.LSTM(4, 8)
    torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    assert isinstance(convert.from_torch(module), lstm_triton.LSTM)
