"""One script that uses only `torch.nn.LSTM`'s interface, run with `torch.nn` and with `lstm_triton` in its place.

A `Configuration` says what the script does; `script(nn, configuration)` does it with the `LSTM` of `nn` and returns all
that can be observed, by name and in the order of events; `differences` compares two such runs.

Shapes: T time steps, B batch rows, I input features, H hidden units, P hidden size after projection (else H), L layers,
D directions.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from tests.support.parity import BOUND

ATTRIBUTES = (
    "mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size",
    "training",
)  # fmt: skip

ONE_DNN = "LSTM with projections is not supported with oneDNN"
"""The start of a warning of PyTorch's operator about itself: the steps written out in this library do not give it."""

# What a script may do


@dataclass(frozen=True)
class Configuration:
    """What the script does. The values of the options are in `OPTIONS`, of the faults in the tables below.

    - arguments: of the constructor; refused: what is wrong with them at a first attempt
    - T, B: steps and rows; lengths: the steps of each row, for packed input
    - faults: what is wrong with a first call
    """

    arguments: dict[str, Any]
    T: int
    B: int
    lengths: tuple[int, ...] = ()
    refused: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    built: str = "by keyword"
    mode: str = "train"
    frozen: str = "nothing"
    form: str = "padded"
    layout: str = "contiguous"
    states: str = "none"
    tracked: str = "nothing"
    under: str = "grad"
    used: str = "all results"
    backward: str = "once"
    changed: str = "nothing"
    seed: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return self.arguments["dtype"]

    @property
    def packed(self) -> bool:
        return self.form.startswith("packed")

    @property
    def states_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of h_0 and c_0."""
        given = self.arguments
        rows = () if self.form == "unbatched" else (self.B,)
        first = given["num_layers"] * (2 if given["bidirectional"] else 1)
        return (first, *rows, given["proj_size"] or given["hidden_size"]), (first, *rows, given["hidden_size"])

    def options(self) -> set[str]:
        """The options that it has, as in `every_option`."""
        given = self.arguments
        values = {f"{name}: {getattr(self, name)}" for name in OPTIONS}
        values |= {f"{name}: {given[name]}" for name in ("bias", "batch_first", "bidirectional", "dtype")}
        values |= {f"num_layers: {given['num_layers']}", f"proj_size: {given['proj_size'] > 0}"}
        values |= {f"dropout: {given['dropout'] > 0}, more than one layer: {given['num_layers'] > 1}"}
        return values


OPTIONS = dict(
    built=["by keyword", "by position", "by to()", "as a copy", "from a state dict"],
    mode=["train", "eval"],
    frozen=["nothing", "everything", "all but the last parameter", "the first layer", "the biases"],
    form=["padded", "unbatched", "packed", "packed in order"],
    layout=["contiguous", "transposed", "every second", "one row for all"],
    states=["none", "a tuple", "a list by keyword", "transposed", "one row for all"],
    tracked=["nothing", "input", "input and states"],
    under=["grad", "no_grad", "inference_mode"],
    used=["all results", "output", "h_n", "c_n", "states of the first layer"],
    backward=["once", "twice", "twice with the graph retained"],
    changed=["nothing", "the output", "the last hidden state"],
)
"""The values of each option; the first is the plain one. changed: in place, between the forward and backward pass."""


def every_option() -> set[str]:
    """All options that configurations have."""
    values = {f"{name}: {value}" for name, choices in OPTIONS.items() for value in choices}
    values |= {f"{name}: {value}" for name in ("bias", "batch_first", "bidirectional") for value in (False, True)}
    values |= {f"dtype: {dtype}" for dtype in (torch.float32, torch.float64)}
    values |= {f"num_layers: {n}" for n in (1, 2, 3)} | {f"proj_size: {value}" for value in (False, True)}
    return values | {f"dropout: {a}, more than one layer: {b}" for a in (False, True) for b in (False, True)}


OUTCOMES: dict[str, Callable[[dict[str, Any]], bool]] = {
    "gradients": lambda seen: seen["backward: error"] is None,
    "no gradients": lambda seen: "does not require grad" in str(seen["backward: error"]),
    "a graph that is gone": lambda seen: "a second time" in str(seen["backward: error"]),
    "a change that is in the way": lambda seen: "modified by an inplace operation" in str(seen["backward: error"]),
    "a change that is not": lambda seen: (
        seen["backward: error"] is None and seen["change"] and not seen["change: error"]
    ),
    "a warning of dropout": lambda seen: "dropout option adds" in str(seen["construction: warnings"]),
    "a warning of the operator": lambda seen: ONE_DNN in str(seen["call: warnings"]),
}
"""What may come of a script, from what was seen."""


def outcomes(seen: dict[str, Any]) -> set[str]:
    """What came of a script."""
    return {name for name, came in OUTCOMES.items() if came(seen)}


REFUSED: dict[str, dict[str, Any]] = {
    "dropout below zero": dict(dropout=-0.1),
    "dropout above one": dict(dropout=1.5),
    "dropout not a number": dict(dropout=float("nan")),
    "dropout a bool": dict(dropout=True),
    "dropout a number as text": dict(dropout="0.5"),
    "dropout a word": dict(dropout="half"),
    "bias an int": dict(bias=1),
    "batch_first a word": dict(batch_first="yes"),
    "input_size a float": dict(input_size=3.0),
    "input_size none": dict(input_size=None),
    "input_size zero": dict(input_size=0),
    "hidden_size text": dict(hidden_size="4"),
    "hidden_size negative": dict(hidden_size=-1),
    "num_layers zero": dict(num_layers=0),
    "num_layers a float": dict(num_layers=1.5),
    "num_layers text": dict(num_layers="2"),
    "proj_size negative": dict(proj_size=-1),
    "proj_size as large as hidden_size": dict(proj_size=9),
    "proj_size a float": dict(proj_size=0.5),
    "dtype of integers": dict(dtype=torch.int64),
    "device unknown": dict(device="nowhere"),
    "keyword unknown": dict(nonlinearity="relu"),
}
"""Constructor arguments that `torch.nn.LSTM` refuses."""


@dataclass
class Call:
    """The arguments of a call."""

    input: Any
    hx: Any
    configuration: Configuration
    more: tuple[Any, ...] = ()

    def each_state(self, function: Callable[[Tensor], Tensor]) -> None:
        self.hx = tuple(function(state) for state in self.hx)

    def state(self, n: int, function: Callable[[Tensor], Any]) -> None:
        self.hx = tuple(function(state) if n == k else state for k, state in enumerate(self.hx))

    def data(self, function: Callable[[Tensor], Tensor]) -> None:
        """Changes the features of the input, packed or not."""
        packed = isinstance(self.input, PackedSequence)
        self.input = self.input._replace(data=function(self.input.data)) if packed else function(self.input)

    def no_steps(self) -> None:
        first = self.configuration.arguments["batch_first"] and self.configuration.form == "padded"
        self.input = self.input[:, :0] if first else self.input[:0]


def other(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float64 else torch.float64


def wider(t: Tensor) -> Tensor:
    return torch.cat([t, t[..., :1]], -1)


def longer(t: Tensor) -> Tensor:
    return torch.cat([t, t[:1]])


def more_rows(t: Tensor) -> Tensor:
    return torch.cat([t, t.new_zeros(len(t), 1, t.shape[2])], 1)


OF_INPUT: dict[str, Callable[[Call], Any]] = {
    "no steps": Call.no_steps,
    "input of one dimension": lambda call: call.data(lambda x: x.flatten()),
    "input of four dimensions": lambda call: call.data(lambda x: x[(None,) * (4 - x.dim())]),
    "a feature more": lambda call: call.data(wider),
    "a feature less": lambda call: call.data(lambda x: x[..., 2:]),
    "input of the other float type": lambda call: call.data(lambda x: x.to(other(x.dtype))),
    "input of integers": lambda call: call.data(lambda x: x.long()),
    "input on another device": lambda call: call.data(lambda x: x.to("meta")),
    "input not a tensor": lambda call: setattr(call, "input", [[0.0]]),
    "an argument more": lambda call: setattr(call, "more", (True,)),
}
OF_STATES: dict[str, Callable[[Call], Any]] = {
    "h_0 wider": lambda call: call.state(0, wider),
    "c_0 wider": lambda call: call.state(1, wider),
    "h_0 of a layer more": lambda call: call.state(0, longer),
    "states of a layer more": lambda call: call.each_state(longer),
    "states of a row more": lambda call: call.each_state(more_rows),
    "states of other dimensions": lambda call: call.each_state(lambda s: s[0] if s.dim() == 3 else s[:, None]),
    "c_0 of other dimensions": lambda call: call.state(1, lambda s: s[0] if s.dim() == 3 else s[:, None]),
    "h_0 of the other float type": lambda call: call.state(0, lambda s: s.to(other(s.dtype))),
    "h_0 on another device": lambda call: call.state(0, lambda s: s.to("meta")),
    "c_0 missing": lambda call: call.state(1, lambda s: None),
    "three states": lambda call: setattr(call, "hx", (*call.hx, call.hx[1])),
    "one state": lambda call: setattr(call, "hx", call.hx[:1]),
    "h_0 for both states": lambda call: setattr(call, "hx", call.hx[0]),
}
FAULTS = OF_INPUT | OF_STATES
"""What a call may have that `torch.nn.LSTM` refuses; several are done in this order."""

UNCHECKED = {
    "unbatched": {"three states", "one state", "states of a row more"},
    "packed": {
        "no steps", "input not a tensor", "input on another device", "h_0 of a layer more", "c_0 missing",
        "states of other dimensions", "c_0 of other dimensions", "three states", "one state", "h_0 for both states",
        "states of a row more",
    },
}  # fmt: skip
"""Faults that this form cannot have, or that `torch.nn.LSTM` does not see: it drops what is too much, or crashes."""
UNCHECKED["packed in order"] = UNCHECKED["packed"] - {"three states", "states of a row more"}


def possible_forms(faults: Iterable[str]) -> list[str]:
    """The forms of input with which `torch.nn.LSTM` sees all of these faults."""
    return [form for form in OPTIONS["form"] if not UNCHECKED.get(form, set()) & set(faults)]


# The script


@dataclass
class Record:
    """What is seen, by name, in the order of events."""

    seen: dict[str, Any] = field(default_factory=dict)

    def tensor(self, name: str, tensor: Tensor | None) -> None:
        """A tensor as it is now."""
        if isinstance(tensor, Tensor):
            self.seen[name] = Seen(
                tensor.detach().clone(), outside(tensor), tensor.requires_grad, tensor.is_inference()
            )
        else:
            self.seen[name] = tensor

    def attempt(self, name: str, function: Callable[[], Any]) -> Any:
        """What the function returns, None where it raises; its error and its warnings are seen."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            before = torch.is_warn_always_enabled()
            torch.set_warn_always(True)
            try:
                result, error = function(), None
            except Exception as raised:
                result, error = None, (type(raised), str(raised))
            finally:
                torch.set_warn_always(before)
        self.seen[f"{name}: error"] = error
        # Each once, as they are shown: this library calls PyTorch's operator for every layer.
        self.seen[f"{name}: warnings"] = sorted({(w.category.__name__, str(w.message)) for w in caught})
        return result


@dataclass
class Seen:
    """A tensor's values, and what else of it can be seen; the tensor may have changed since."""

    values: Tensor
    strides: tuple[int, ...]
    requires_grad: bool
    inference: bool

    def __str__(self) -> str:
        return f"a tensor {tuple(self.values.shape)}"


def outside(tensor: Tensor) -> tuple[int, ...]:
    """The strides that matter: of dimensions with more than one element."""
    if tensor.layout != torch.strided or not tensor.numel():
        return ()
    return tuple(stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)


def script(nn: Any, configuration: Configuration) -> dict[str, Any]:
    """The script, with the LSTM of `nn`."""
    record = Record()
    c = configuration
    if c.refused:
        wrong = {name: value for fault in c.refused for name, value in REFUSED[fault].items()}
        record.attempt("refused construction", lambda: nn.LSTM(**(c.arguments | wrong)))
    torch.manual_seed(c.seed)
    lstm = record.attempt("construction", lambda: built(nn, c))
    watch_module(record, lstm)
    lstm.train(c.mode == "train")
    freeze(lstm, c.frozen)

    generator = torch.Generator().manual_seed(c.seed)
    x, x_leaf = input_of(c, generator)
    states, states_leaves = states_of(c, generator)
    if c.faults:
        record.attempt("refused call", lambda: faulty_call(lstm, c, x, states))
        watch_parameters(record, "after the refusal", lstm)

    torch.manual_seed(c.seed + 1)
    with {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[c.under]():
        result = record.attempt("call", lambda: call(lstm, c, x, states))
    record.tensor("random numbers after the call", torch.rand(2))
    watch_result(record, "call", result)
    output, (h_n, c_n) = result
    data = output.data if c.packed else output

    def change() -> None:
        if c.changed != "nothing":
            (data if c.changed == "the output" else h_n).mul_(1.5)

    record.seen["change"] = c.changed != "nothing"
    record.attempt("change", change)
    used = {
        "all results": (data, h_n, c_n), "output": (data,), "h_n": (h_n,), "c_n": (c_n,),
        "states of the first layer": (h_n[:1], c_n[:1]),
    }[c.used]  # fmt: skip
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in used]
    optimizer = torch.optim.SGD(lstm.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)

    def backward() -> None:
        loss = sum((w * t).sum() for w, t in zip(weights, used, strict=True))
        for _ in range(1 if c.backward == "once" else 2):
            loss.backward(retain_graph="retained" in c.backward)

    record.attempt("backward", backward)
    for name, p in lstm.named_parameters():
        record.tensor(f"gradient of {name}", p.grad)
    for name, leaf in dict(input=x_leaf, h_0=states_leaves[0], c_0=states_leaves[1]).items():
        record.tensor(f"gradient of {name}", leaf.grad)
        record.tensor(f"{name} afterwards", leaf)
    optimizer.step()
    watch_parameters(record, "after the optimizer", lstm)
    with torch.no_grad():
        result = record.attempt("evaluation", lambda: lstm.eval()(x, None))
    watch_result(record, "evaluation", result)
    return record.seen


def built(nn: Any, c: Configuration) -> Any:
    """The module, as the configuration builds it."""
    if c.built == "by position":
        names = (
            "input_size",
            "hidden_size",
            "num_layers",
            "bias",
            "batch_first",
            "dropout",
            "bidirectional",
            "proj_size",
        )
        return nn.LSTM(*(c.arguments[name] for name in names), None, c.dtype)
    if c.built == "by to()":
        return nn.LSTM(**(c.arguments | dict(dtype=other(c.dtype)))).to(c.dtype)
    lstm = nn.LSTM(**c.arguments)
    if c.built == "as a copy":
        return copy.deepcopy(lstm)
    if c.built == "from a state dict":
        saved = torch.nn.LSTM(**c.arguments).state_dict()
        assert str(lstm.load_state_dict(saved, strict=True)) == "<All keys matched successfully>"
    return lstm


def freeze(lstm: Any, what: str) -> None:
    """Parameters that require no gradient."""
    names = [name for name, _ in lstm.named_parameters()]
    frozen = {
        "nothing": [], "everything": names, "all but the last parameter": names[:-1],
        "the first layer": [name for name in names if "_l0" in name],
        "the biases": [name for name in names if "bias" in name],
    }[what]  # fmt: skip
    for name in frozen:
        getattr(lstm, name).requires_grad_(False)


def input_of(c: Configuration, generator: torch.Generator) -> tuple[Any, Tensor]:
    """The input, and the leaf that it is made of."""
    T, B, I = c.T, c.B, c.arguments["input_size"]  # noqa: E741
    first, second = (B, T) if c.arguments["batch_first"] else (T, B)
    rows = 0 if c.arguments["batch_first"] else 1
    if c.form == "unbatched":
        first, second = 1, T
        rows = 0
    shape = {
        "contiguous": (first, second, I), "transposed": (I, second, first), "every second": (first, second * 2, I),
        "one row for all": (min(first, 1), second, I) if rows == 0 else (first, min(second, 1), I),
    }[c.layout]  # fmt: skip
    leaf = torch.randn(shape, generator=generator, dtype=torch.float64).to(c.dtype)
    leaf.requires_grad_(c.tracked != "nothing")
    x = {
        "contiguous": lambda: leaf, "transposed": lambda: leaf.transpose(0, 2), "every second": lambda: leaf[:, ::2],
        "one row for all": lambda: leaf.expand(first, second, I),
    }[c.layout]()  # fmt: skip
    if c.form == "unbatched":
        return x[0], leaf
    if c.packed:
        in_order = c.form == "packed in order"
        x = pack_padded_sequence(x, list(c.lengths), batch_first=rows == 0, enforce_sorted=in_order)
    return x, leaf


def states_of(c: Configuration, generator: torch.Generator) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(h_0, c_0), and the leaves that they are made of."""
    states, leaves = [], []
    for shape in c.states_shapes:
        if c.states == "transposed":
            kept = shape[::-1]
        else:
            kept = shape if c.states != "one row for all" else (*shape[:-2], min(shape[-2], 1), shape[-1])
        leaf = torch.randn(kept, generator=generator, dtype=torch.float64).to(c.dtype)
        leaves.append(leaf.requires_grad_(c.tracked == "input and states" and c.states != "none"))
        states.append(leaf.transpose(0, -1) if c.states == "transposed" else leaf.expand(shape))
    return tuple(states), tuple(leaves)


def call(lstm: Any, c: Configuration, x: Any, states: tuple[Tensor, Tensor]) -> Any:
    """The call, with or without states, as the configuration writes it."""
    if c.states == "none":
        return lstm(x)
    return lstm(input=x, hx=list(states)) if c.states == "a list by keyword" else lstm(x, states)


def faulty_call(lstm: Any, c: Configuration, x: Any, states: tuple[Tensor, Tensor]) -> Any:
    """A call with the faults that the configuration has, in the order of the table."""
    wrong = Call(x, states if c.states != "none" or any(name in OF_STATES for name in c.faults) else None, c)
    for name in FAULTS:
        if name in c.faults:
            FAULTS[name](wrong)
    return lstm(wrong.input, wrong.hx, *wrong.more)


# What is seen


def watch_module(record: Record, lstm: Any) -> None:
    """The module as it was built."""
    # This library's class says at the end whose it is.
    record.seen["repr"] = tuple(text.replace(", lstm_triton", "") for text in (repr(lstm), lstm.extra_repr()))
    record.seen["attributes"] = {name: getattr(lstm, name) for name in ATTRIBUTES}
    record.seen["names"] = [name for name, _ in lstm.named_parameters()], list(lstm.state_dict())
    record.seen["all_weights"] = [[tuple(w.shape) for w in weights] for weights in lstm.all_weights]
    record.seen["versions"] = dict(lstm.state_dict()._metadata)
    watch_parameters(record, "initial", lstm)


def watch_parameters(record: Record, when: str, lstm: Any) -> None:
    """Everything in the state dict."""
    for name, value in lstm.state_dict().items():
        record.tensor(f"{when} {name}", value)


def watch_result(record: Record, when: str, result: Any) -> None:
    """What a call returned: its structure, and every tensor of it."""
    output, (h_n, c_n) = result
    record.seen[f"{when}: structure"] = [type(part) for part in (result, output, result[1], h_n, c_n)]
    if isinstance(output, PackedSequence):
        for name in PackedSequence._fields:
            record.tensor(f"{when}: output.{name}", getattr(output, name))
        padded, lengths = pad_packed_sequence(output)
        record.tensor(f"{when}: output padded", padded)
        record.tensor(f"{when}: lengths", lengths)
    else:
        record.tensor(f"{when}: output", output)
    record.tensor(f"{when}: h_n", h_n)
    record.tensor(f"{when}: c_n", c_n)


# The comparison


def accident(c: Configuration, name: str, error: type) -> str | None:
    """Why the words of an error that `torch.nn` raises here are no promise: then it is enough to refuse, too."""
    if name == "refused construction: error":
        if "keyword unknown" in c.refused:
            return "it names the base class, whose constructor it is"
        if "dropout a word" in c.refused:
            return "float() is tried before the check"
    if name == "refused call: error":
        if c.packed and c.faults != ("an argument more",):
            return "packed input is not checked: the operator fails somewhere inside"
        if "h_0 of the other float type" in c.faults:
            return "it comes from inside of the matrix product, another one from oneDNN"
        if error is IndexError:
            return "it looks for a second state where there is one"
    if name == "backward: error" and c.changed != "nothing":
        return "it names the function that kept the tensor"
    return None


def differences(c: Configuration, expected: dict[str, Any], actual: dict[str, Any], operator: bool = True) -> list[str]:
    """What a script would notice, in words; nothing where both runs are the same.

    operator: whether both use PyTorch's operator, and so give its warnings of itself.
    """
    if list(actual) != list(expected):
        return [f"other events: {sorted(actual.keys() ^ expected.keys())}"]
    found = []
    for name, value in expected.items():
        if name.endswith(": warnings") and (not operator or name == "refused call: warnings"):
            value = [warning for warning in value if not warning[1].startswith(ONE_DNN)]
        if isinstance(value, Seen) and isinstance(actual[name], Seen):
            bound = 0.0 if name.startswith(("initial ", "random ")) else BOUND[c.dtype]
            found += [f"{name}: {text}" for text in tensor_differences(value, actual[name], bound)]
        elif (
            name.endswith(": error") and value is not None and actual[name] is not None and accident(c, name, value[0])
        ):
            continue
        elif actual[name] != value:
            found.append(f"{name}: {actual[name]}, expected {value}")
    return found


def tensor_differences(expected: Seen, actual: Seen, bound: float) -> Iterator[str]:
    """What differs between two tensors, their values by ||actual - expected|| / max(||expected||, 0.1).

    0.1, since terms of a gradient that are about one may cancel to much less.
    """
    for what in ("dtype", "shape", "device", "layout"):
        if getattr(actual.values, what) != getattr(expected.values, what):
            yield f"{what} {getattr(actual.values, what)}, expected {getattr(expected.values, what)}"
            return
    for what in ("strides", "requires_grad", "inference"):
        if getattr(actual, what) != getattr(expected, what):
            yield f"{what} {getattr(actual, what)}, expected {getattr(expected, what)}"
    a, e = actual.values.double(), expected.values.double()
    error = float((a - e).norm() / e.norm().clamp_min(0.1))
    if not error <= bound:
        yield f"relative error {error:.1e}"
