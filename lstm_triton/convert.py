"""Swap every `torch.nn.LSTM` and `LSTMCell` of a model for this library's, and back.

A swapped module stays the object that it is; only its class changes, as where PyTorch parametrizes a module. So its
parameters, buffers, hooks and attributes are what they were, and whatever refers to it or to them goes on working:
optimizers, tied weights, handles of hooks, a second place in the model, a list that PyTorch does not know of.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

from lstm_triton_kernels.sizes import SUPPORTED_DTYPES
from torch import nn
from torch.nn.utils import parametrize

from lstm_triton.modules import LSTM, CoupledLSTM, LSTMCell, PeepholeLSTM
from lstm_triton.routing import CPU_DTYPES

Model = TypeVar("Model", bound=nn.Module)

COMPUTED_DTYPES = {*SUPPORTED_DTYPES, *CPU_DTYPES}
"""The types of a standard LSTM that the library computes, the complex ones on a CPU alone."""

OURS: dict[type[nn.Module], type[nn.Module]] = {nn.LSTM: LSTM, nn.LSTMCell: LSTMCell}
"""What `from_torch` makes of which class."""

TORCHS: dict[type[nn.Module], type[nn.Module]] = {
    LSTM: nn.LSTM, CoupledLSTM: nn.LSTM, PeepholeLSTM: nn.LSTM, LSTMCell: nn.LSTMCell
}  # fmt: skip
"""What `to_torch` makes of which class; the variant must be the standard one."""


def from_torch(module: Model) -> Model:
    """Make every `torch.nn.LSTM` and `LSTMCell` in the model this library's `LSTM` and `LSTMCell`, in place.

    Returns the module. State dict, outputs, parameters (the very objects), options, hooks, training flags and other
    attributes stay the same; nothing is allocated and no random number drawn. Parametrized and pruned modules are
    converted like others. `strategy` and `recompute` have their defaults afterwards and may be set.

    A subclass of `torch.nn.LSTM` or `LSTMCell` may compute something else, so it is left as it is; so is what is no
    such module, as `torch.ao.nn.quantizable.LSTM` or a scripted module.

    Raises TypeError for what is no module; ValueError naming the module, before anything is changed, where one has a
    replaced `forward`, an attribute with a name that this library's module uses, or parameters of a type that the
    library does not compute: it does float16, bfloat16, float32 and float64, and on a CPU complex64 and complex128.
    """
    return swap(module, OURS)


def to_torch(module: Model) -> Model:
    """Make every `LSTM` and `LSTMCell` of this library in the model `torch.nn.LSTM` and `LSTMCell`, in place.

    Returns the module. What stays the same is as in `from_torch`; `strategy` and `recompute` are lost, and on a GPU
    PyTorch moves the values of the parameters into one block for cuDNN, as wherever it builds an LSTM. `CoupledLSTM`
    and `PeepholeLSTM` are converted where they are of the standard variant. Other subclasses may compute something
    else and are left as they are.

    Raises TypeError for what is no module; ValueError naming the module, before anything is changed, where one is not
    of the standard variant (a subclass too), has a replaced `forward`, or an attribute with a name that PyTorch's
    module uses.
    """
    return swap(module, TORCHS)


def swap(module: Model, classes: dict[type[nn.Module], type[nn.Module]]) -> Model:
    """Change the class of each module whose class is a key to its value. Raises as `from_torch` and `to_torch`."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module should be a torch.nn.Module, got: {type(module).__name__}")
    changes: list[Callable[[], None]] = []
    for path, found in module.named_modules():
        name = path or "the module"
        if classes is TORCHS and isinstance(found, (LSTM, LSTMCell)) and not found.spec.standard:
            raise ValueError(
                f"{name} ({type(found).__name__}) is of the variant {found.spec.name!r}, which PyTorch does not have: "
                "only the standard variant can be converted"
            )
        if isinstance(found, (LSTM, LSTMCell, nn.LSTM, nn.LSTMCell)) and is_sharded(found):
            raise ValueError(f"{name} ({type(found).__name__}) is sharded: convert the model before fully_shard")
        kind = parametrize.type_before_parametrizations(found)
        if kind in classes:
            if classes is OURS:
                check_types(name, found)
            changes.append(change(name, found, skeleton(kind, found), skeleton(classes[kind], found)))
    for apply in changes:
        apply()
    return module


def check_types(name: str, module: nn.Module) -> None:
    """Raise ValueError naming the module where a parameter is of a type that the library does not compute."""
    for parameter, value in module.named_parameters():
        if value.dtype not in COMPUTED_DTYPES:
            raise ValueError(
                f"{name} ({type(module).__name__}) has {parameter} of {value.dtype}, which this library does not "
                f"compute: only {', '.join(map(str, SUPPORTED_DTYPES))}, and on a CPU complex64 and complex128"
            )


def is_sharded(module: nn.Module) -> bool:
    """Return whether the module was given to `fully_shard`, which makes a class of its own for it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def change(name: str, module: nn.Module, old: nn.Module, new: nn.Module) -> Callable[[], None]:
    """Return the function that gives the module, of the class of `old`, the class of `new`.

    Raises ValueError where the module has something of its own that would not survive.
    """
    state = vars(module)
    if "forward" in state:
        raise ValueError(
            f"{name} ({type(old).__name__}) has a forward that was set on the instance, which may be anything: "
            "remove it (del module.forward), convert, and set it again"
        )
    taken = {*state, *module._parameters, *module._buffers, *module._modules} - set(dir(old))
    clash = sorted(attribute for attribute in taken if hasattr(new, attribute))
    if clash:
        raise ValueError(
            f"{name} ({type(old).__name__}) has attributes that {type(new).__module__}.{type(new).__name__} uses "
            f"itself: rename {', '.join(clash)}"
        )

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
        # PyTorch's list of weights. Those that are parametrized it computes at the next call; to compute them here
        # could change them (a power iteration) or draw random numbers.
        if isinstance(module, nn.LSTM) and not parametrized:
            module._init_flat_weights()

    return apply


def absent(module: nn.Module) -> dict[str, None]:
    """Return the parameters that a module is registered to have none of, as a cell without bias."""
    return {name: None for name, parameter in module._parameters.items() if parameter is None}


def skeleton(cls: type[nn.Module], like: nn.Module) -> nn.Module:
    """A module of that class with the options that decide on its parameters as in `like`, and no memory."""
    options = ["input_size", "hidden_size", "bias"]
    if issubclass(cls, (nn.LSTM, LSTM)):
        options += ["num_layers", "bidirectional", "proj_size"]
    return cls(**{option: getattr(like, option) for option in options}, device="meta")
