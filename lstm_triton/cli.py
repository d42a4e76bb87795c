"""The program `lstm-triton`: what is installed, and what computes a layer and why."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from lstm_triton_kernels.sizes import Layer
from lstm_triton_kernels.spec import BY_NAME, NAMES_IN_WORDS, VARIANTS, LSTMSpec

import lstm_triton
from lstm_triton import explain, routing
from lstm_triton.dtypes import DTYPES, SHORT, dtype_name
from lstm_triton.plan_words import plural

LARGEST_SIZE = 2**31 - 1
"""Of every size: no tensor of a layer beyond it fits a GPU."""

EXAMPLES = """\
examples:
  lstm-triton info                                     versions, devices, and the backend of each
  lstm-triton info --hidden 768 --gpu h100             how an LSTM of 768 units is computed on an H100
  lstm-triton info --hidden 768 --batch 64 --dtype bf16 --variant diagonal --gpu all --json
  lstm-triton info --hidden 768 --gpu l4 --compile     with registers and spills, as compiled for an L4
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program with these arguments (default: those of the process) and return the exit code.

    Exits with 2 for an unknown option or value, as `argparse` does, and returns 1 where something is missing.
    """
    parser = build_parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        getattr(options, "parser", parser).error(f"unrecognized arguments: {' '.join(unknown)}")
    if options.command is None:
        parser.print_help()
        return 0
    try:
        print(info(options))
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the program's options."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("lstm-triton", description=__doc__, epilog=EXAMPLES, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"lstm-triton {lstm_triton.__version__}")
    commands = parser.add_subparsers(dest="command", title="commands")
    about = "print versions and devices; with --hidden, what strategy='auto' takes for a layer on a GPU, and why"
    command = commands.add_parser("info", help=about, description=about, epilog=EXAMPLES, formatter_class=raw)
    names = (
        ", ".join(spec.name for spec in VARIANTS)
        + "; with layer normalisation norm, coupled+norm, ...; of ablations no-forget-gate, identity-output, ..."
    )
    of_layer = command.add_argument_group("the layer (all of these need --hidden)")
    of_layer.add_argument("--hidden", type=positive, metavar="N", help="hidden units")
    of_layer.add_argument("--batch", type=positive, metavar="N", help="batch rows (default: 16)")
    of_layer.add_argument("--input", type=positive, metavar="N", help="input features (default: as --hidden)")
    of_layer.add_argument("--steps", type=positive, metavar="N", help="time steps (default: 512)")
    of_layer.add_argument("--layers", type=positive, metavar="N", help="layers of the stack (default: 1)")
    of_layer.add_argument("--bidirectional", action="store_true", default=None, help="both directions")
    dtypes = f"one of {', '.join(DTYPES)}, or short {', '.join(SHORT)} (default: float32)"
    of_layer.add_argument("--dtype", type=checked(dtype_name), metavar="NAME", help=dtypes)
    of_layer.add_argument("--variant", type=checked(variant_name), metavar="NAME", help=f"one of {names}")
    of_layer.add_argument("--proj", type=positive, metavar="N", help="size of a projection (default: none)")
    of_layer.add_argument("--inference", action="store_true", default=None, help="no backward pass follows")
    of_layer.add_argument("--packed", action="store_true", default=None, help="the input is a PackedSequence")
    lengths = "the call has lengths= or resets=, which cuDNN has not"
    of_layer.add_argument("--lengths", action="store_true", default=None, help=lengths)
    gpus = f"repeat for several: {', '.join(explain.GPUS)}; or all (default: the GPU that is here, else an H100)"
    of_layer.add_argument("--gpu", action="append", type=checked(gpu_name), metavar="NAME", help=gpus)
    compiling = "compile the plans for the GPU, which need not be here: registers, spills, shared memory"
    of_layer.add_argument("--compile", action="store_true", default=None, help=compiling)
    command.add_argument("--json", action="store_true", help="print JSON instead of text")
    command.set_defaults(parser=command)
    return parser


def positive(text: str) -> int:
    """Return a size. Raises ArgumentTypeError for anything but an integer from 1 to 2**31 - 1."""
    if not (text.isdecimal() and len(text) < 20 and 1 <= int(text) <= LARGEST_SIZE):
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 1 to 2**31 - 1")
    return int(text)


def checked(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a type for `argparse` that keeps the message of a ValueError."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


def variant_name(text: str) -> str:
    """Return the name of a variant. Raises ValueError if there is none of that name."""
    if text.lower() not in BY_NAME:
        raise ValueError(f"unknown variant {text!r}: choose from {NAMES_IN_WORDS}")
    return text.lower()


def gpu_name(text: str) -> str:
    """Return "all" or the key of a GPU. Raises ValueError if there is none of that name."""
    return "all" if text.lower() == "all" else explain.gpu_key(text)


def info(options: argparse.Namespace) -> str:
    """Return what `lstm-triton info` prints."""
    if options.hidden is None:
        of_layer = ("batch", "input", "steps", "layers", "bidirectional", "dtype", "variant", "proj", "inference",
                    "packed", "lengths", "gpu", "compile")  # fmt: skip
        alone = [f"--{name}" for name in of_layer if getattr(options, name) is not None]
        if alone:
            options.parser.error(f"{', '.join(alone)}: add --hidden N, the size of the layer to explain")
        installed = {"versions": versions(), "devices": devices()}
        return json.dumps(installed, indent=2) if options.json else installed_text(installed)
    if (options.proj or 0) >= options.hidden:
        options.parser.error(f"--proj must be smaller than --hidden {options.hidden}, got {options.proj}")
    dtype, precision = DTYPES[options.dtype or "float32"]
    layer = Layer(
        LSTMSpec.parse(options.variant or "standard"), options.steps or 512, options.batch or 16, options.hidden,
        2 if options.bidirectional else 1, dtype, precision, I=options.input or options.hidden, P=options.proj or 0,
        training=not options.inference, ragged=bool(options.packed or options.lengths), L=options.layers or 1,
    )  # fmt: skip
    chosen, note = explain.targets(options.gpu or ())
    asked = ("lengths",) if options.lengths else ()
    found = explain.explain(
        layer, chosen, asked=asked, packed=bool(options.packed), compiling=bool(options.compile), note=note
    )
    if options.json:
        return json.dumps({"versions": versions(), **found.to_dict()}, indent=2)
    return str(found)


def versions() -> dict[str, str]:
    """Return name and version of everything that decides which code runs."""
    try:
        triton_version = import_module("triton").__version__
    except ImportError:
        triton_version = "not installed"
    cudnn = torch.backends.cudnn.version()
    return {
        "lstm_triton": lstm_triton.__version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "CUDA": torch.version.cuda or "none: a build of PyTorch for CPUs",
        "cuDNN": str(cudnn) if cudnn else "none",
    }


def devices() -> dict[str, dict[str, str]]:
    """Return each device that the library can run on: what it is, its backend for float32, and why."""
    found = {torch.device("cpu"): f"{platform.machine()}, {plural(torch.get_num_threads(), 'thread')}"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"compute capability {properties.major}.{properties.minor}"
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        found[torch.device("cuda", index)] = f"{properties.name}, {capability}, {memory}"
    return {str(device): {"is": text, **backend(device)} for device, text in found.items()}


def backend(device: torch.device) -> dict[str, str]:
    """Return the backend that is chosen for float32 on a device, and why; "none" if the one asked for cannot run."""
    try:
        choice = routing.choose_backend(device, torch.float32)
    except (RuntimeError, ValueError) as error:
        return {"backend": "none", "why": str(error)}
    return {"backend": choice.name, "why": choice.reason}


def installed_text(found: dict[str, Any]) -> str:
    """Return versions and devices as text."""
    width = explain.PLAIN_WIDTH
    parts = [explain.facts_text("versions", found["versions"].items(), width)]
    parts += [explain.facts_text(name, device.items(), width) for name, device in found["devices"].items()]
    return "\n\n".join(parts)
