"""Convert every `torch.nn.LSTM` and `torch.nn.LSTMCell` of a model to this library's class, and back.

A converted module stays the same object; only its class changes, as PyTorch itself does when it parametrizes a module.
So its parameters, buffers, hooks and attributes are unchanged, and whatever refers to the module or to its parameters
goes on working: optimizers, tied weights, handles of hooks, a second place in the model, a plain list of modules.
`from_torch` can add peepholes, as new parameters, and drop the input gates, which makes new parameters.

`report` decides what becomes of each layer, and changes nothing; `Report.apply` carries it out.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from lstm_triton_kernels.sizes import SUPPORTED_DTYPES
from lstm_triton_kernels.spec import LSTMSpec, OutputPeephole, Peephole
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lstm_triton.modules import LSTM, CoupledLSTM, LSTMCell, PeepholeLSTM, gone
from lstm_triton.routing import CPU_DTYPES

Model = TypeVar("Model", bound=nn.Module)

COMPUTED_DTYPES = {*SUPPORTED_DTYPES, *CPU_DTYPES}
"""The parameter types of a standard LSTM that the library computes; the complex ones only on a CPU."""

OURS: dict[type[nn.Module], type[nn.Module]] = {nn.LSTM: LSTM, nn.LSTMCell: LSTMCell}
"""The class that `from_torch` gives a module of each class."""

TORCHS: dict[type[nn.Module], type[nn.Module]] = {
    LSTM: nn.LSTM, CoupledLSTM: nn.LSTM, PeepholeLSTM: nn.LSTM, LSTMCell: nn.LSTMCell
}  # fmt: skip
"""The class that `to_torch` gives a module of each class; the variant must be the standard one."""

Outcome = Literal["convert", "leave", "refuse"]


class Entry(NamedTuple):
    """What becomes of one layer.

    - path: where it is in the model, "" for the model itself
    - cls: its class, as "torch.nn.LSTM"
    - outcome: "convert"; "leave", as it is; or "refuse", for which `Report.apply` raises ValueError
    - reason: why, or what changes with the conversion
    """

    path: str
    cls: str
    outcome: Outcome
    reason: str


@dataclass(frozen=True)
class Report:
    """What `from_torch` does with a model, and why: print it, read its entries, or `apply` it.

    - model: the model that is to be converted
    - entries: one for each recurrent layer or cell of the model, in the order of `named_modules`
    """

    model: nn.Module
    entries: tuple[Entry, ...]
    _changes: tuple[Callable[[], None], ...] = field(repr=False)

    def apply(self) -> nn.Module:
        """Convert the model in place, and return it.

        A report is applied once, to the model as it was when the report was made. Raises, before anything is changed,
        ValueError with the reason of the first layer that is refused; RuntimeError if a layer is of another class than
        in the report.
        """
        refused = [entry for entry in self.entries if entry.outcome == "refuse"]
        if refused:
            raise ValueError(f"{refused[0].path or 'the module'} ({simple(refused[0].cls)}) {refused[0].reason}")
        now = dict(self.model.named_modules())
        for entry in self.entries:
            if entry.outcome == "convert" and (entry.path not in now or name_of(now[entry.path]) != entry.cls):
                raise RuntimeError(
                    f"{entry.path or 'the module'} is no {entry.cls} any more: the report was applied, or the model "
                    "changed since; make a new one"
                )
        for change in self._changes:
            change()
        return self.model

    def __str__(self) -> str:
        """Return a table of the entries, and how many there are of each outcome."""
        rows = [("layer", "class", "outcome", "reason"), *((e.path or "(the model)", *e[1:]) for e in self.entries)]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = ["  ".join([*map(str.ljust, row, widths), row[3]]) for row in rows]
        counts = [sum(entry.outcome == outcome for entry in self.entries) for outcome in ("convert", "leave", "refuse")]
        return "\n".join([*lines, "{} to convert, {} left as they are, {} refused".format(*counts)])


def from_torch(
    module: Model,
    *,
    peephole: Peephole | None = None,
    output_peephole: OutputPeephole = "previous",
    coupled: bool = False,
) -> Model:
    """Convert every `torch.nn.LSTM` and `torch.nn.LSTMCell` of a model to this library's classes, in place.

    - module: the model, or a single layer or cell
    - peephole, output_peephole: as of `LSTM`: peepholes to add. They start at zero, so that the model computes the same
      function as before, and training can go on from there
    - coupled: whether to drop the input gates, in favour of 1 - f. Then the model computes another function: a coupled
      LSTM cannot compute what a standard one does. What is left of the weights is a place to start training from
    - returns the same object, converted; `report` with the same arguments says what will be done, and why

    The state dict, the outputs, the parameters (the same objects), options, hooks, training flags and other attributes
    stay the same; no parameter is allocated and no random number is drawn. Parametrized and pruned modules are
    converted like others. `strategy` and `recompute` have their defaults afterwards and may be set.

    With a peephole there are new parameters, `weight_ch_l{k}` (of a cell `weight_ch`) of zeros, of the type and device
    of `weight_hh`: the others stay the same objects, and an optimizer that was made before has to be given the new ones
    (`add_param_group`). With coupled=True weights and biases are new parameters, of the blocks f, g and o of the old
    ones; what was tied stays tied. Then make optimizers after the conversion.

    Peepholes of zero leave the outputs as they were bit for bit where the same engine computes both variants. On a CPU
    that is so in float16 and bfloat16, beside `LSTM` of the standard variant. In float32 and float64 the standard
    variant is computed there by PyTorch's own operator, which sums in another order, and the outputs agree to rounding.

    A subclass of `torch.nn.LSTM` or `torch.nn.LSTMCell` may compute something else, and is left as it is; so are other
    classes, such as `torch.ao.nn.quantizable.LSTM`, and scripted modules.

    Raises TypeError if it is no module, and TypeError or ValueError as `LSTM` does for a variant that there is not;
    ValueError naming the layer, before anything is changed, if a layer has a replaced `forward`, has an attribute with
    a name that this library's class uses, is sharded by FSDP2, or has parameters of a type other than float16,
    bfloat16, float32, float64, complex64 and complex128 (with options: of a complex type); with coupled=True also if it
    is parametrized or pruned, or shares a parameter with a module that is not converted.
    """
    report(module, peephole=peephole, output_peephole=output_peephole, coupled=coupled).apply()
    return module


def to_torch(module: Model) -> Model:
    """Convert every `LSTM` and `LSTMCell` of this library in a model to PyTorch's classes, in place.

    - module: the model, or a single layer or cell
    - returns the same object, converted

    What stays the same is as in `from_torch`; `strategy` and `recompute` are lost, and on a GPU PyTorch moves the
    values of the parameters into one block for cuDNN, as it does for every LSTM. `CoupledLSTM` and `PeepholeLSTM` are
    converted if they are of the standard variant. Other subclasses may compute something else and are left as they are.

    Raises TypeError if it is no module; ValueError naming the layer, before anything is changed, if a layer (also one
    of a subclass) is not of the standard variant, has regularised steps, has a replaced `forward`, has an attribute
    with a name that PyTorch's class uses, or is sharded by FSDP2.
    """
    report_of(module, TORCHS, LSTMSpec()).apply()
    return module


def report(
    module: nn.Module,
    *,
    peephole: Peephole | None = None,
    output_peephole: OutputPeephole = "previous",
    coupled: bool = False,
) -> Report:
    """Return what `from_torch` with these arguments does with each recurrent layer of a model; nothing is changed.

    Print it: a table of the layers, their classes, the outcome ("convert", "leave", "refuse") and the reason. Layers
    that are refused are all listed; `from_torch` raises for the first of them.

    Raises TypeError if it is no module, and TypeError or ValueError as `LSTM` does for a variant that there is not.
    """
    return report_of(module, OURS, LSTMSpec.of(coupled, peephole, output_peephole))


def report_of(module: nn.Module, classes: dict[type[nn.Module], type[nn.Module]], spec: LSTMSpec) -> Report:
    """Return the report on giving each module whose class is a key of `classes` the class that is the value.

    - spec: the variant that the modules have afterwards

    Raises TypeError if it is no module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module should be a torch.nn.Module, got: {type(module).__name__}")
    found = {path: m for path, m in module.named_modules() if is_recurrent(m)}
    shared = holders(module) if spec.coupled else {}
    new_of: dict[int, nn.Parameter] = {}  # parameters without an input gate, by the id of those that they come from
    entries, changes = [], []
    for path, layer in found.items():
        kind = parametrize.type_before_parametrizations(layer)
        pair = (skeleton(kind, layer), skeleton(classes[kind], layer, spec)) if kind in classes else None
        outcome: Outcome = "leave"
        if (reason := why_refused(layer, pair, classes is OURS, spec, shared)) is not None:
            outcome = "refuse"
        elif pair is not None:
            outcome, reason = "convert", what_changes(pair[1], spec)
            changes.append(change(layer, *pair, spec, new_of))
        entries.append(Entry(path, name_of(layer), outcome, reason or why_left(layer)))
    return Report(module, tuple(entries), tuple(changes))


# What becomes of a layer, and why: in words.


def is_recurrent(module: nn.Module) -> bool:
    """Return whether a report has an entry for the module: PyTorch's recurrent classes, also scripted."""
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return True
    name = module.original_name if isinstance(module, torch.jit.ScriptModule) else type(module).__name__
    theirs = isinstance(module, torch.jit.ScriptModule) or type(module).__module__.startswith("torch.ao.")
    return theirs and name.removesuffix("Cell") in ("LSTM", "GRU", "RNN")


def why_left(module: nn.Module) -> str:
    """Return why a recurrent module is left as it is."""
    if isinstance(module, torch.jit.ScriptModule):
        return f"scripted from a class {module.original_name}: its program is fixed"
    if type(module).__module__.startswith("torch.ao."):
        return "a class of its own, for quantization"
    if isinstance(module, (LSTM, LSTMCell)):
        return f"of lstm_triton already, variant {module.spec.name!r}"
    if isinstance(module, (nn.LSTM, nn.LSTMCell)):
        return "a subclass, which may compute something else"
    return "not an LSTM"


def what_changes(new: nn.Module, spec: LSTMSpec) -> str:
    """Return what the conversion to the skeleton `new` changes."""
    if spec.standard:
        return "computes the same"
    added = [name for name, _ in new.named_parameters() if "_ch" in name]
    zeros = f"{', '.join(added)} of zeros" if added else ""
    if spec.coupled:
        words = "the outputs change: the input gate's weights are dropped, i = 1 - f; new parameters"
        return f"{words}, and {zeros}" if zeros else words
    return f"computes the same function; new: {zeros}"


def why_refused(
    module: nn.Module,
    pair: tuple[nn.Module, nn.Module] | None,
    ours: bool,
    spec: LSTMSpec,
    shared: dict[int, list[str]],
) -> str | None:
    """Return why a recurrent module cannot be converted, in words that follow its name; None if nothing is in the way.

    - pair: skeletons of its class and of the class that it would get; None if it is left as it is
    - ours: whether it would get a class of this library
    - shared: of `holders`
    """
    if not ours and isinstance(module, (LSTM, LSTMCell)):
        if not module.spec.standard:
            return (
                f"is of the variant {module.spec.name!r}, which PyTorch does not have: only the standard variant can "
                "be converted"
            )
        if given := module.regularization:
            return f"has {', '.join(given)}, which PyTorch does not have: set them to their defaults first"
    if isinstance(module, (LSTM, LSTMCell, nn.LSTM, nn.LSTMCell)) and is_sharded(module):
        return "is sharded: convert the model before fully_shard"
    if pair is None:
        return None
    obstacle = why_not_types(module, spec) if ours else None
    obstacle = obstacle or why_not_kept(module, *pair)
    return obstacle or (why_not_coupled(module, pair[0], shared) if spec.coupled else None)


def why_not_types(module: nn.Module, spec: LSTMSpec) -> str | None:
    """Return that a parameter is of a type that the library does not compute; None if all are computed."""
    for parameter, value in module.named_parameters():
        if value.dtype not in COMPUTED_DTYPES:
            return (
                f"has {parameter} of {value.dtype}, which this library does not compute: only "
                f"{', '.join(map(str, SUPPORTED_DTYPES))}, and on a CPU complex64 and complex128"
            )
        if not spec.standard and value.dtype.is_complex:
            return f"has {parameter} of {value.dtype}, in which only the standard variant is computed"
    return None


def why_not_kept(module: nn.Module, old: nn.Module, new: nn.Module) -> str | None:
    """Return what the module, of the class of `old`, has of its own that the class of `new` would not keep."""
    state = vars(module)
    if "forward" in state:
        return (
            "has a forward that was set on the instance, which may be anything: remove it (del module.forward), "
            "convert, and set it again"
        )
    taken = {*state, *module._parameters, *module._buffers, *module._modules} - set(dir(old))
    clash = sorted(attribute for attribute in taken if hasattr(new, attribute))
    if clash:
        return f"has attributes that {type(new).__module__}.{type(new).__name__} uses itself: rename {', '.join(clash)}"
    return None


def why_not_coupled(module: nn.Module, old: nn.Module, shared: dict[int, list[str]]) -> str | None:
    """Return what keeps the weights from losing their input gate: computed, or shared with other modules."""
    for name in old._parameters:
        if name not in module._parameters:
            return (
                f"has a {name} that is computed, by a parametrization or by pruning: the blocks of a coupled LSTM can "
                "only be taken from a parameter; remove it first"
            )
    for name in old._parameters:
        if others := shared.get(id(module._parameters[name])):
            return f"shares {name} with {', '.join(others)}, which would not be changed with it"
    return None


def holders(model: nn.Module) -> dict[int, list[str]]:
    """Return by id of each parameter the names under which modules hold it that do not become coupled."""
    found: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        kind = parametrize.type_before_parametrizations(module)
        own = skeleton(kind, module)._parameters if kind in OURS else {}
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if name not in own:
                found.setdefault(id(parameter), []).append(f"{path}.{name}".lstrip("."))
    return found


def name_of(module: nn.Module) -> str:
    """Return the class of a module as a user writes it: "torch.nn.LSTM"."""
    cls = parametrize.type_before_parametrizations(module)
    public = {nn: "torch.nn", sys.modules["lstm_triton"]: "lstm_triton"}
    for package, name in public.items():
        if getattr(package, cls.__name__, None) is cls:
            return f"{name}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def simple(cls: str) -> str:
    """Return the last part of a dotted name."""
    return cls.rpartition(".")[2]


def is_sharded(module: nn.Module) -> bool:
    """Return whether the module was given to `fully_shard`, which makes a class of its own for it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


# How a layer is converted.


def change(
    module: nn.Module, old: nn.Module, new: nn.Module, spec: LSTMSpec, new_of: dict[int, nn.Parameter]
) -> Callable[[], None]:
    """Return the function that gives the module, of the class of `old`, the class and the variant of `new`.

    - new_of: parameters without an input gate by the id of those that they come from, for all modules of a model
    """
    state = vars(module)

    def apply() -> None:
        for held, had, has in (
            (state, vars(old), vars(new)),
            (module._parameters, absent(old), absent(new)),
        ):
            for attribute in had.keys() - has.keys():
                held.pop(attribute, None)
            for attribute in has.keys() - held.keys():
                held[attribute] = has[attribute]
        parametrized = parametrize.is_parametrized(module)
        if parametrized:
            cls = type(module)
            module.__class__ = type(f"Parametrized{type(new).__name__}", (type(new),), dict(vars(cls)))
        else:
            module.__class__ = type(new)
        if not spec.standard:
            give_variant(module, new, spec, new_of)
        # PyTorch's list of weights. Those that are parametrized it computes at the next call; to compute them here
        # could change them (a power iteration) or draw random numbers.
        elif isinstance(module, nn.LSTM) and not parametrized:
            module._init_flat_weights()

    return apply


def give_variant(module: Any, new: Any, spec: LSTMSpec, new_of: dict[int, nn.Parameter]) -> None:
    """Give a module, already of this library's class, the options and the parameters of the variant."""
    module._set_variant(spec)
    held: dict[str, nn.Parameter | None] = module._parameters
    parameters = module.named_parameters(remove_duplicate=False)
    recurrent = next(parameter for name, parameter in parameters if "weight_hh" in name)
    for name, parameter in new._parameters.items():
        if "weight_ch" in name and parameter is not None:
            held[name] = nn.Parameter(torch.zeros(parameter.shape, dtype=recurrent.dtype, device=recurrent.device))
        elif spec.coupled and "weight_hr" not in name and (given := held.get(name)) is not None:
            if id(given) not in new_of:
                new_of[id(given)] = nn.Parameter(without_input_gate(given), given.requires_grad)
            held[name] = new_of[id(given)]
    # In the order of a module that was built so: by it the states of an optimizer are saved.
    for name in [*(name for name in new._parameters if name in held), *(n for n in held if n not in new._parameters)]:
        held[name] = held.pop(name)
    if isinstance(module, LSTM):
        names = new._flat_weights_names
        module._all_weights, module._flat_weights_names = new._all_weights, names
        flat = [held.get(name) for name in names]
        refs: list[Any] = [gone if weight is None else weakref.ref(weight) for weight in flat]
        module._flat_weights, module._flat_weight_refs = flat, refs


def without_input_gate(stacked: Tensor) -> Tensor:
    """Return the blocks f, g and o of a weight or bias whose rows are the blocks i, f, g and o."""
    blocks = LSTMSpec().split_gates(stacked.detach(), 0)
    return torch.cat([blocks[gate] for gate in LSTMSpec(coupled=True).gates])


def absent(module: nn.Module) -> dict[str, None]:
    """Return the parameters that a module is registered to have none of, as a cell without bias."""
    return {name: None for name, parameter in module._parameters.items() if parameter is None}


def skeleton(cls: type[nn.Module], like: nn.Module, spec: LSTMSpec | None = None) -> nn.Module:
    """Return a module of that class on the meta device, with those options of `like` that decide on the parameters.

    - spec: the variant, where the class is this library's; None: the default of the class
    """
    options = ["input_size", "hidden_size", "bias"]
    if issubclass(cls, (nn.LSTM, LSTM)):
        options += ["num_layers", "bidirectional", "proj_size"]
    variant = spec.options if spec is not None and issubclass(cls, (LSTM, LSTMCell)) else {}
    return cls(**{option: getattr(like, option) for option in options}, **variant, device="meta")
