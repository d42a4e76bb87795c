"""What a type checker and an IDE see of the public interface: types of results, wrong arguments, signatures."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import lstm_triton_kernels
import pytest
import torch
from lstm_triton_kernels.spec import OUTPUT_PEEPHOLES, PEEPHOLES

import lstm_triton
from lstm_triton import LSTM, CoupledLSTM, LSTMCell, PeepholeLSTM, functional, routing

PACKAGES = [Path(package.__file__).parent for package in (lstm_triton, lstm_triton_kernels)]

PROGRAM = """
import lstm_triton
from lstm_triton import CoupledLSTM, LSTMCell, PeepholeLSTM, functional
from lstm_triton.functional import Gates
from lstm_triton.routing import Backend, Strategy
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import assert_type

States = tuple[Tensor, Tensor]
lstm = lstm_triton.LSTM(3, 4, peephole="full", strategy="persistent")


def results(x: Tensor, packed: PackedSequence, asked: bool) -> None:
    assert_type(lstm(x), tuple[Tensor, States])
    assert_type(lstm(x, (x, x), return_cell_states=False), tuple[Tensor, States])
    assert_type(lstm(x, lengths=[3, 2], resets=x, return_cell_states=True), tuple[Tensor, States, Tensor])
    assert_type(lstm(packed), tuple[PackedSequence, States])
    assert_type(lstm(packed, return_cell_states=True), tuple[PackedSequence, States, PackedSequence])
    assert_type(lstm.forward(x, return_cell_states=True), tuple[Tensor, States, Tensor])
    assert_type(CoupledLSTM(3, 4)(x), tuple[Tensor, States])
    assert_type(PeepholeLSTM(3, 4)(packed), tuple[PackedSequence, States])
    assert_type(LSTMCell(3, 4)(x, (x, x)), States)
    assert_type(functional.lstm(x, None, [x], num_layers=2), tuple[Tensor, States])
    assert_type(functional.lstm(packed, None, [x]), tuple[PackedSequence, States])
    assert_type(functional.lstm(x, None, [x], return_cell_states=True), tuple[Tensor, States, Tensor])
    assert_type(lstm(x, return_gates=True), tuple[Tensor, States, Gates])
    every = lstm(packed, return_cell_states=True, return_gates=True)
    assert_type(every, tuple[PackedSequence, States, PackedSequence, Gates])
    assert_type(functional.lstm(x, None, [x], return_gates=True), tuple[Tensor, States, Gates])
    output, *rest = lstm(x, return_cell_states=asked)
    output, (h_n, c_n) = lstm(x)
    output, (h_n, c_n), cell_states = lstm(x, return_cell_states=True)
    output, (h_n, c_n), cell_states = lstm(x)  # error: misc
    lstm(x, length=[3])  # error: call-overload
    lstm(x, lengths="3")  # error: arg-type
    LSTMCell(3, 4)(x, x)  # error: arg-type


def arguments(x: Tensor, strategy: Strategy, backend: Backend, word: str) -> None:
    CoupledLSTM(3, 4, 2, batch_first=True, strategy=strategy)
    CoupledLSTM(3, 4, strategy="fast")  # error: arg-type
    CoupledLSTM(3, 4, coupling=True)  # error: call-arg
    PeepholeLSTM(3, 4, peephole="round")  # error: arg-type
    PeepholeLSTM("3", 4)  # error: arg-type
    lstm_triton.LSTM(3, 4, strategy="fast")  # error: arg-type
    lstm_triton.LSTM(3, 4, strategy=word)  # error: arg-type
    lstm_triton.LSTM(3, 4, output_peephole="next")  # error: arg-type
    LSTMCell(3, 4, peephole="round")  # error: arg-type
    lstm.strategy = "stepwise"
    lstm.strategy = "fast"  # error: assignment
    functional.lstm(x, None, [x], strategy="fast")  # error: call-overload
    with lstm_triton.backend(backend):
        pass
    lstm_triton.backend("cuda")  # error: arg-type
"""


def test_a_type_checker_knows_the_results_and_sees_wrong_arguments(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed")
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "mypy", "--python-version=3.10", "--follow-imports=silent", "--no-error-summary"]
    command += ["--config-file=", f"--cache-dir={tmp_path / 'cache'}", "--ignore-missing-imports", "program.py"]
    paths = os.pathsep.join(str(package.parent) for package in PACKAGES)
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | dict(MYPYPATH=paths), capture_output=True, text=True, timeout=300
    )
    found = re.findall(r"^program\.py:(\d+): error: .*\[([\w-]+)\]$", done.stdout, re.MULTILINE)
    lines = [line.partition("  # error: ") for line in PROGRAM.split("\n")]
    marked = [(str(n), code) for n, (_, mark, code) in enumerate(lines, 1) if mark]
    assert set(found) == set(marked), done.stdout + done.stderr


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_a_package_says_that_it_has_types(package):
    assert (package / "py.typed").is_file()


@pytest.mark.parametrize(
    "kind, option, default", [(CoupledLSTM, "coupled", True), (PeepholeLSTM, "peephole", "diagonal")]
)
def test_a_subclass_has_the_signature_of_lstm_with_one_other_default(kind, option, default):
    expected, found = inspect.signature(LSTM), inspect.signature(kind)
    parameters = [p.replace(default=default) if p.name == option else p for p in expected.parameters.values()]
    assert found == expected.replace(parameters=parameters) and found != expected


@pytest.mark.parametrize("kind", [CoupledLSTM, PeepholeLSTM], ids=lambda kind: kind.__name__)
def test_a_subclass_passes_on_every_argument(kind):
    options = dict(
        num_layers=2, bias=False, batch_first=True, dropout=0.5, bidirectional=True, proj_size=2, coupled=False,
        peephole="full", output_peephole="current", layer_norm=True, recurrent_dropout=0.3,
        recurrent_dropout_on="candidate", zoneout=(0.1, 0.2), weight_dropout=0.4, cell_clip=3.0, proj_clip=0.5,
        input_gate=True, forget_gate=True, output_gate=True, input_activation="identity", output_activation="identity",
        forget_bias=None, strategy="stepwise", recompute=True,
    )  # fmt: skip
    module, plain = (cls(3, 4, device="meta", dtype=torch.float64, **options) for cls in (kind, LSTM))
    assert repr(module).partition("(")[2] == repr(plain).partition("(")[2]
    for name, value in options.items():
        assert getattr(module, name) == value
    assert [(n, p.shape, p.dtype, p.device) for n, p in module.named_parameters()] == [
        (n, p.shape, p.dtype, p.device) for n, p in plain.named_parameters()
    ]
    own = re.compile("(?!.*_(ch|ln)_)").match  # names of parameters of every variant
    positional = kind(3, 4, 2, False, True, 0.5, True, 2, "meta", torch.float64)
    assert [(n, p.dtype, p.device) for n, p in positional.named_parameters() if own(n)] == [
        (n, p.dtype, p.device) for n, p in plain.named_parameters() if own(n)
    ]
    assert (positional.batch_first, positional.dropout, positional.proj_size) == (True, 0.5, 2)
    assert set(inspect.signature(kind).parameters) == {*options, "input_size", "hidden_size", "device", "dtype"}


@pytest.mark.parametrize(
    "ours, theirs", [(LSTM, torch.nn.LSTM), (LSTMCell, torch.nn.LSTMCell)], ids=["LSTM", "LSTMCell"]
)
def test_pytorchs_arguments_come_first_and_in_its_order(ours, theirs):
    their_arguments = [name for name in inspect.signature(theirs.forward).parameters if name != "self"]
    assert list(inspect.signature(ours.forward).parameters)[1:][: len(their_arguments)] == their_arguments
    parameters = inspect.signature(ours).parameters.values()
    assert all(p.kind is not p.VAR_POSITIONAL and p.kind is not p.VAR_KEYWORD for p in parameters)


def test_the_overloads_of_the_function_name_every_option():
    in_order = [name for name in inspect.signature(functional.lstm).parameters if not name.startswith("return_")]
    assert in_order == ["input", "hx", "weights", *functional.Options.__annotations__]


def test_the_declarations_for_type_checkers_are_not_there_at_run_time():
    for kind in (LSTM, LSTMCell, CoupledLSTM, PeepholeLSTM):
        assert kind.__call__ is torch.nn.Module.__call__


def test_the_names_of_options_are_those_of_their_types():
    assert get_args(routing.Strategy) == routing.STRATEGIES == ("auto", "persistent", "stepwise", "cudnn")
    assert get_args(routing.Backend) == routing.BACKENDS == ("auto", "triton", "torch")
    assert PEEPHOLES == (None, "diagonal", "full") and OUTPUT_PEEPHOLES == ("previous", "current")
