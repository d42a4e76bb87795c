"""ONNX by both exporters: every variant and option, computed by onnxruntime, against this library in float64."""

from __future__ import annotations

import io
import re
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from lstm_triton_kernels.spec import ABLATIONS, NORMALIZED, VARIANTS, LSTMSpec
from torch.export import Dim
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import lstm_triton
from lstm_triton import onnx_node
from tests.support.composes import tensors

SIZES = [(5, 2), (8, 4), (1, 1)]
"""T and B: of the example that is exported, and of later calls."""

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 3e-3}
"""Of ||found - expected|| / ||expected|| of each result; normalised in float64 1e-9, since ONNX's eps is a float32."""

STATES, LENGTHS, RESETS = "states", "lengths", "resets"
BOTH = dict(num_layers=2, bidirectional=True)


class Model(torch.nn.Module):
    """An LSTM whose arguments and results are in one tuple; `asked` names the arguments beside the input."""

    def __init__(self, spec=None, asked=(), cells=False, gates=False, **options):
        super().__init__()
        variant = {} if spec is None else spec.options
        self.lstm, self.asked = lstm_triton.LSTM(3, 4, **variant, **options), asked
        self.returned = dict(return_cell_states=cells, return_gates=gates)

    def forward(self, x, *rest):
        given = dict(zip(self.asked, rest, strict=True))
        hx = given.pop(STATES, None)
        return tuple(tensors(self.lstm(x, hx, **self.returned, **given)))


def example(model, T, B):
    """Random arguments of a call."""
    lstm = model.lstm
    D = lstm.num_layers * (2 if lstm.bidirectional else 1)
    random = dict(
        states=lambda: (torch.randn(D, B, lstm.proj_size or 4), torch.randn(D, B, 4)),
        lengths=lambda: torch.randint(1, T + 1, (B,)),
        resets=lambda: torch.rand(*((B, T) if lstm.batch_first else (T, B))) < 0.4,
    )
    x = torch.randn(*((B, T) if lstm.batch_first else (T, B)), 3)
    return converted((x, *(random[name]() for name in model.asked)), lstm.weight_ih_l0.dtype)


def converted(arguments, dtype):
    """The arguments, with what is of floating point in that type."""
    return torch.utils._pytree.tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, arguments)


def dynamic(model):
    """`dynamic_shapes` of the arguments: any T and B."""
    steps, rows = Dim("T", min=1), Dim("B", min=1)
    time, batch = (1, 0) if model.lstm.batch_first else (0, 1)
    of_each = dict(states=({1: rows}, {1: rows}), lengths={0: rows}, resets={time: steps, batch: rows})
    rest = tuple(of_each[name] for name in model.asked)
    return ({time: steps, batch: rows}, rest) if rest else ({time: steps, batch: rows},)


def exported(model, arguments, by, shapes, **options):
    """The bytes of the ONNX model."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if by == "TorchScript":
            names = [f"input_{n}" for n in range(len(torch.utils._pytree.tree_leaves(arguments)))]
            axes = {name: list(axes) for name, axes in zip(names, leaves(shapes), strict=True)} if shapes else None
            torch.onnx.export(model, arguments, file, dynamo=False, input_names=names, dynamic_axes=axes, **options)
            return file.getvalue()
        if by == "program":
            model = torch.export.export(model, arguments, dynamic_shapes=shapes)
        elif by == "PyTorch's program":
            with lstm_triton.backend("torch"):
                model = torch.export.export(model, arguments, dynamic_shapes=shapes)
        given = () if by.endswith("program") else (arguments,)
        shapes = None if by.endswith("program") else shapes
        torch.onnx.export(model, *given, dynamo=True, dynamic_shapes=shapes, verbose=False, **options).save(file)
    return file.getvalue()


def leaves(shapes):
    """The axes of each tensor of `dynamic`, in order."""
    return [axes for part in shapes for axes in (leaves(part) if isinstance(part, tuple) else [part])]


def run(model_bytes, arguments):
    """What onnxruntime computes."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model_bytes, options)
    names = [given.name for given in session.get_inputs()]
    flat = torch.utils._pytree.tree_leaves(arguments)
    return session.run(None, dict(zip(names, [t.numpy() for t in flat], strict=True)))


def nodes(model_bytes):
    """The operators of the graph that are an LSTM or a loop, and the opset."""
    model = onnx.load_from_string(model_bytes)
    found = [node.op_type for node in model.graph.node if node.op_type in ("LSTM", "Scan", "Loop")]
    return found, {entry.domain: entry.version for entry in model.opset_import}[""]


def compare(model, model_bytes, calls):
    """Compare onnxruntime with the library in float64 on the same values, on calls of these sizes."""
    dtype = model.lstm.weight_ih_l0.dtype
    tolerance = 1e-9 if model.lstm.layer_norm and dtype == torch.float64 else TOLERANCE[dtype]
    given = [example(model, T, B) for T, B in calls]
    found = [run(model_bytes, arguments) for arguments in given]
    wide = model.double()
    for arguments, results in zip(given, found, strict=True):
        with torch.no_grad():
            expected = wide(*converted(arguments, torch.float64))
        for actual, wanted in zip(results, expected, strict=True):
            assert actual.shape == tuple(wanted.shape)
            error = np.linalg.norm(actual.astype(np.float64) - wanted.numpy())
            assert error <= tolerance * np.linalg.norm(wanted.numpy())


OPTIONS = [
    dict(cells=True, cell_clip=0.3, batch_first=True),
    dict(proj_size=2, bidirectional=True),
    dict(asked=(RESETS,), bidirectional=True),
    dict(),
    dict(asked=(LENGTHS,), bidirectional=True, bias=False),
    dict(asked=(STATES, LENGTHS, RESETS), cells=True, zoneout=(0.1, 0.2), num_layers=2),
    dict(dtype=torch.float64, proj_size=3, proj_clip=0.1, asked=(STATES,)),
]
"""Each variant has one of them, by TorchScript, which exports faster, two."""

IN_TURN = [(spec, OPTIONS[n % len(OPTIONS)]) for n, spec in enumerate((*VARIANTS, *NORMALIZED[3::5]))]
NODE = [
    (LSTMSpec(), dict(asked=(STATES,), **BOTH)),
    (LSTMSpec(coupled=True), dict(asked=(LENGTHS,), batch_first=True, bidirectional=True)),
    (LSTMSpec(True, "diagonal", "current"), dict(asked=(STATES, LENGTHS), bias=False, **BOTH)),
    (LSTMSpec(False, "diagonal", "current"), dict()),
    (LSTMSpec(), dict(dtype=torch.float16)),
    (LSTMSpec(False, "diagonal", "current", input_gate=False), dict(bidirectional=True)),
]
SCAN = [
    (LSTMSpec(), dict(dtype=torch.float64)),
    (LSTMSpec(peephole="full"), dict(dtype=torch.float16)),
    (LSTMSpec(input_activation="identity", output_activation="identity", forget_gate=False), dict(asked=(LENGTHS,))),
]
DYNAMO = [(*case, "dynamo", "Scan") for case in IN_TURN[1:] + SCAN] + [(*case, "dynamo", "LSTM") for case in NODE]
DYNAMO += [(LSTMSpec(True, "diagonal", "current"), BOTH, "program", "LSTM")]
DYNAMO += [(LSTMSpec(True, "full", layer_norm=True), OPTIONS[2], by, "Scan") for by in ("program", "PyTorch's program")]
DYNAMO += [(LSTMSpec(), OPTIONS[4], "PyTorch's program", "Scan")]
EVERY = [
    (spec, OPTIONS[(n + shift) % len(OPTIONS)])
    for n, spec in enumerate((*VARIANTS, *NORMALIZED, *ABLATIONS))
    for shift in (0, 3)
]
TORCHSCRIPT = [(*case, "TorchScript", None) for case in EVERY] + [(*case, "TorchScript", "LSTM") for case in NODE]
TORCHSCRIPT += [(*case, "TorchScript", "Loop") for case in SCAN]
EVERYTHING = dict(asked=(STATES, LENGTHS, RESETS), gates=True)
TORCHSCRIPT += [(LSTMSpec(True, "full"), EVERYTHING | BOTH, "TorchScript", "Loop")]
DYNAMO += [(LSTMSpec(True, "diagonal", "current"), EVERYTHING | dict(bidirectional=True), "dynamo", "Scan")]


@pytest.mark.parametrize(
    "spec, options, by, node", DYNAMO + TORCHSCRIPT, ids=lambda case: getattr(case, "name", str(case))
)
def test_onnxruntime_computes_the_same_for_any_number_of_steps_and_rows(spec, options, by, node):
    model = Model(spec, **options).eval()
    model_bytes = exported(model, example(model, *SIZES[0]), by, dynamic(model))
    found, opset = nodes(model_bytes)
    assert opset == 20 and len(set(found)) == 1
    if node is not None:
        assert found[0] == node
    compare(model, model_bytes, SIZES)


@pytest.mark.parametrize("by", ["dynamo", "TorchScript"])
def test_a_module_by_itself_can_be_exported_and_its_sizes_fixed_and_its_input_unbatched(by):
    lstm = lstm_triton.PeepholeLSTM(3, 4).eval()
    x = torch.randn(5, 3)
    output, h_n, c_n = run(exported(lstm, (x,), by, None), (x,))
    for actual, wanted in zip((output, h_n, c_n), tensors(lstm(x)), strict=True):
        np.testing.assert_allclose(actual, wanted.detach().numpy(), atol=1e-6)


def test_the_older_exporter_gives_keywords_to_a_module_by_itself():
    lstm, file = lstm_triton.LSTM(3, 4, peephole="full").eval(), io.BytesIO()
    x, lengths = torch.randn(5, 2, 3), torch.tensor([5, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(lstm, (x,), file, dynamo=False, kwargs=dict(lengths=lengths, return_cell_states=True))
    found = run(file.getvalue(), (x, lengths))
    wanted = tensors(lstm(x, lengths=lengths, return_cell_states=True))
    for actual, expected in zip(found, wanted, strict=True):
        np.testing.assert_allclose(actual, expected.detach().numpy(), atol=1e-6)


@pytest.mark.parametrize("by", ["dynamo", "TorchScript"])
def test_lengths_that_are_full_in_the_example_are_read_later(by):
    model = Model(LSTMSpec(peephole="diagonal"), asked=(LENGTHS,)).eval()
    model_bytes = exported(model, (torch.randn(5, 2, 3), torch.tensor([5, 5])), by, dynamic(model))
    compare(model, model_bytes, SIZES)


@pytest.mark.parametrize("by", ["dynamo", "TorchScript"])
def test_an_onnx_model_of_an_older_opset_computes_the_same(by):
    model = Model(LSTMSpec(peephole="full", layer_norm=True)).eval()
    model_bytes = exported(model, example(model, *SIZES[0]), by, dynamic(model), opset_version=18)
    assert nodes(model_bytes)[1] == 18
    compare(model, model_bytes, SIZES)


@pytest.mark.parametrize("by", ["dynamo", "TorchScript"])
@pytest.mark.parametrize(
    "options",
    [dict(), dict(coupled=True, peephole="full", layer_norm=True, zoneout=(0.1, 0.2), cell_clip=0.3)],
    ids=str,
)
def test_a_cell_computes_the_same_in_onnxruntime(options, by):
    cell = lstm_triton.LSTMCell(3, 4, **options).eval()
    states = (torch.randn(2, 4), torch.randn(2, 4))
    model_bytes = exported(cell, (torch.randn(2, 3), states), by, ({0: Dim("B", min=1)}, ({0: Dim("B", min=1)},) * 2))
    arguments = (torch.randn(5, 3), (torch.randn(5, 4), torch.randn(5, 4)))
    for actual, wanted in zip(run(model_bytes, arguments), cell(*arguments), strict=True):
        np.testing.assert_allclose(actual, wanted.detach().numpy(), atol=1e-6)


class Packed(torch.nn.Module):
    """An LSTM of an input that it packs."""

    def __init__(self, **options):
        super().__init__()
        self.lstm = lstm_triton.LSTM(3, 4, **options)

    def forward(self, x, lengths):
        return pad_packed_sequence(self.lstm(pack_padded_sequence(x, lengths))[0])[0]


WITH_LENGTHS = (torch.randn(5, 2, 3), torch.tensor([5, 2]))


@pytest.mark.parametrize("coupled", [False, True], ids=["standard", "coupled"])
def test_the_older_exporter_takes_packed_rows_as_many_as_in_the_example(coupled):
    model = Packed(coupled=coupled).eval()
    model_bytes = exported(model, WITH_LENGTHS, "TorchScript", ({0: Dim("T"), 1: Dim("B")}, {0: Dim("B")}))
    for arguments in (WITH_LENGTHS, (torch.randn(7, 2, 3), torch.tensor([7, 4]))):
        (actual,) = run(model_bytes, arguments)
        np.testing.assert_allclose(actual, model(*arguments).detach().numpy(), atol=1e-6)


DRAWN = r"draws random masks in training.*call model.eval\(\) before"
TRAINING = dict(training=torch.onnx.TrainingMode.PRESERVE)
PACKED = "a PackedSequence cannot be exported to ONNX: give a padded input and lengths"
REFUSED = {
    "masks of steps": (lambda: Model(zoneout=(0.1, 0.1)), None, "dynamo", DRAWN, {}),
    "masks of a program's steps": (lambda: Model(recurrent_dropout=0.5), None, "program", DRAWN, {}),
    "masks of weights": (lambda: Model(weight_dropout=0.5), None, "dynamo", DRAWN, {}),
    "masks by TorchScript": (lambda: Model(recurrent_dropout=0.5), None, "TorchScript", DRAWN, TRAINING),
    "packed rows": (lambda: Packed(), WITH_LENGTHS, "dynamo", PACKED, {}),
    "packed rows with peepholes by TorchScript": (
        lambda: Packed(peephole="full"), WITH_LENGTHS, "TorchScript", PACKED, {}
    ),
    "an opset without normalisation": (
        lambda: Model(LSTMSpec(layer_norm=True)), None, "TorchScript", "needs opset_version 17", dict(opset_version=16)
    ),
}  # fmt: skip


@pytest.mark.parametrize("make, arguments, by, words, options", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_exported_is_refused_with_a_way_out(make, arguments, by, words, options):
    model = make()
    with pytest.raises(RuntimeError) as raised:
        exported(model, arguments or example(model, *SIZES[0]), by, None, **options)
    cause: BaseException = raised.value
    while cause.__cause__ is not None:  # the exporter wraps what it meets
        cause = cause.__cause__
    assert isinstance(cause, RuntimeError) and re.search(words, str(cause))


def test_cell_clip_is_not_the_clip_of_onnx():
    """The node's attribute bounds what the activations read; a layer with cell_clip is no node, whatever its value."""
    assert onnx_node.why_not(LSTMSpec(), False, torch.float32, ("cell_clip",)) == "ONNX's LSTM node has no cell_clip"
    x, weight = np.full((1, 1, 1), 3.0, np.float32), np.full((1, 4, 1), 1.0, np.float32)
    attributes = dict(hidden_size=1, clip=0.5)
    node = onnx.helper.make_node("LSTM", ["x", "w", "r"], ["", "", "c"], **attributes)
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("x", "w", "r", "c")]
    graph = onnx.helper.make_graph([node], "one step", values[:3], values[3:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (c,) = session.run(["c"], dict(x=x, w=weight, r=weight))
    bounded = torch.sigmoid(torch.tensor(0.5)) * torch.tanh(torch.tensor(0.5))  # of a cell that was clipped, 0.5
    np.testing.assert_allclose(c.item(), bounded.item(), rtol=1e-6)
