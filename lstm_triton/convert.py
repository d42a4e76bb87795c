"""Convert every `torch.nn.LSTM` and `torch.nn.LSTMCell` of a model to this library's class, and back.

A converted module stays the same object; only its class changes, as PyTorch itself does when it parametrizes a module.
So its parameters, buffers, hooks and attributes are unchanged, and whatever refers to the module or to its parameters
goes on working: optimizers, tied weights, handles of hooks, a second place in the model, a plain list of modules.
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
"""The parameter types of a standard LSTM that the library computes; the complex ones only on a CPU."""

OURS: dict[type[nn.Module], type[nn.Module]] = {nn.LSTM: LSTM, nn.LSTMCell: LSTMCell}
"""The class that `from_torch` gives a module of each class."""

TORCHS: dict[type[nn.Module], type[nn.Module]] = {
    LSTM: nn.LSTM, CoupledLSTM: nn.LSTM, PeepholeLSTM: nn.LSTM, LSTMCell: nn.LSTMCell
}  # fmt: skip
"""The class that `to_torch` gives a module of each class; the variant must be the standard one."""


def from_torch(module: Model) -> Model:
    """Convert every `torch.nn.LSTM` and `torch.nn.LSTMCell` of a model to this library's classes, in place.

    - module: the model, or a single layer or cell
    - returns the same object, converted

    The state dict, the outputs, the parameters (the same objects), options, hooks, training flags and other attributes
    stay the same; no parameter is allocated and no random number is drawn. Parametrized and pruned modules are
    converted like others. `strategy` and `recompute` have their defaults afterwards and may be set.

    A subclass of `torch.nn.LSTM` or `torch.nn.LSTMCell` may compute something else, and is left as it is; so are other
    classes, such as `torch.ao.nn.quantizable.LSTM`, and scripted modules.

    Raises TypeError if it is no module; ValueError naming the layer, before anything is changed, if a layer has a
    replaced `forward`, has an attribute with a name that this library's class uses, is sharded by FSDP2, or has
    parameters of a type other than float16, bfloat16, float32, float64, complex64 and complex128.
    """
    return swap(module, OURS)


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
    return swap(module, TORCHS)


def swap(module: Model, classes: dict[type[nn.Module], type[nn.Module]]) -> Model:
    """Give each module in it whose class is a key of `classes` the class that is the value.

    Raises as `from_torch` and `to_torch` do.
    """
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
        if classes is TORCHS and isinstance(found, (LSTM, LSTMCell)) and (given := found.regularization):
            raise ValueError(
                f"{name} ({type(found).__name__}) has {', '.join(given)}, which PyTorch does not have: set "
                "them to their defaults first"
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
    """Return a module of that class on the meta device, with those options of `like` that decide on the parameters."""
    options = ["input_size", "hidden_size", "bias"]
    if issubclass(cls, (nn.LSTM, LSTM)):
        options += ["num_layers", "bidirectional", "proj_size"]
    return cls(**{option: getattr(like, option) for option in options}, device="meta")
