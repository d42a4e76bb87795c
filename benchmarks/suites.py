"""What is measured: the cases of every suite, and in which order.

Sizes: T time steps, B batch rows, I input features, H hidden units, L layers, D directions, P hidden size after
projection (0 without one).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from typing import Any

from lstm_triton_kernels.regularize import NONE, Rules
from lstm_triton_kernels.sizes import Layer

from lstm_triton import LSTMSpec, estimates, regularization
from lstm_triton.dtypes import DTYPES

STORAGE = {name: DTYPES[name][0] for name in ("float16", "bfloat16", "tf32", "float32")}
"""The types that are measured, to what tensors hold. "tf32" and "float32" differ in how matmuls round."""

FORWARD, TRAINING = "forward", "forward+backward"
MODES = (FORWARD, TRAINING)
"""Inference without gradients; a training step's forward and backward with gradients for the input and all weights."""

PERSISTENT, STANDARD, CPU = "cudnn-persistent", "cudnn-standard", "cpu"
REGIMES = (PERSISTENT, STANDARD, CPU)

VARIANTS = ("standard", "coupled", "diagonal", "full")
"""The cells that several suites measure, as `LSTMSpec.parse` names them."""

MORE_VARIANTS = (*VARIANTS, "full+current")
"""Those of the suite of variants: also a full peephole whose output gate reads c_t, a product within the step."""

REGULARIZED: dict[str, dict[str, Any]] = {
    "recurrent_dropout": dict(recurrent_dropout=0.25),
    "candidate_dropout": dict(recurrent_dropout=0.25, recurrent_dropout_on="candidate"),
    "zoneout": dict(zoneout=(0.1, 0.1)),
    "cell_clip": dict(cell_clip=3.0),
}
"""The standard cell with options of regularised steps, by the name that a case has for its variant."""

OWN = "own"
"""The suite of shapes that are given on the command line."""

SERVER, STREAMING_VAD = "DeepBench server", "Silero VAD"
INFERENCE = (SERVER, STREAMING_VAD)
"""Names of workloads that are measured forward only."""


@dataclass(frozen=True)
class Case:
    """One shape of one suite in one type and mode.

    - variant: name of an LSTMSpec, or one of REGULARIZED; dtype: a key of STORAGE; mode: one of MODES
    - ragged: rows have lengths uniform in 1..T; cell: one step by the cell's class (T = 1)
    - resets: probability that a row begins anew, with zero states, at a step
    - stream: T steps are a chunk of a stream: each call goes on from the states that the one before left
    - P: hidden size after projection, 0 without one
    - name: of the workload that has this shape
    - rank: its priority, 0 the highest; a run with a budget takes low ranks first
    """

    suite: str
    T: int
    B: int
    I: int
    H: int
    dtype: str
    mode: str = FORWARD
    L: int = 1
    D: int = 1
    P: int = 0
    variant: str = "standard"
    ragged: bool = False
    cell: bool = False
    resets: float = 0.0
    stream: bool = False
    name: str = ""
    rank: int = 0

    def __str__(self) -> str:
        shape = f"T={self.T} B={self.B} I={self.I} H={self.H} L={self.L} D={self.D}"
        resets = f"resets={self.resets:g}" if self.resets else ""
        shape += f" P={self.P}" if self.P else ""
        more = "lengths" * self.ragged, "cell" * self.cell, resets, "stream" * self.stream
        name = f"({self.name})" if self.name else ""
        return " ".join(filter(None, (self.suite, self.mode, self.dtype, self.variant, shape, *more, name)))

    @property
    def hidden(self) -> int:
        """Return the elements of a hidden state: P, or without a projection H."""
        return self.P or self.H

    @property
    def forward_only(self) -> bool:
        """Return whether there is no training step of it."""
        return self.stream or self.name in INFERENCE

    @property
    def spec(self) -> LSTMSpec:
        """Return the variant."""
        return spec_of(self.variant)

    @property
    def options(self) -> dict[str, Any]:
        """Return the options of regularised steps."""
        return REGULARIZED.get(self.variant, {})

    @property
    def rules(self) -> Rules:
        """Return the rules of the steps: in inference without dropout."""
        return rules_of(self.variant, self.mode == TRAINING)

    @property
    def training_only(self) -> bool:
        """Return whether in inference it would be the standard cell."""
        return bool(self.options) and replace(self, mode=FORWARD).rules == NONE

    @property
    def layer(self) -> Layer:
        """Return the first layer of the case."""
        dtype, precision = DTYPES[self.dtype]
        sizes = (self.T, self.B, self.H, self.D)
        ragged = self.ragged or self.resets > 0
        options: dict[str, Any] = dict(training=self.mode == TRAINING, ragged=ragged, L=self.L)
        return Layer(self.spec, *sizes, dtype, precision, self.I, self.P, **options)

    @property
    def steps(self) -> int:
        """Return the time steps of all layers and directions together."""
        return self.T * self.L * self.D


def spec_of(variant: str) -> LSTMSpec:
    """Return the variant of a case's `variant`. Raises ValueError listing all names for another."""
    return LSTMSpec() if variant in REGULARIZED else LSTMSpec.parse(variant)


def rules_of(variant: str, training: bool = True) -> Rules:
    """Return the rules of the steps of a case's `variant`."""
    default = dict(recurrent_dropout=0.0, recurrent_dropout_on="hidden", zoneout=(0.0, 0.0), cell_clip=None)
    given: dict[str, Any] = default | REGULARIZED.get(variant, {})
    return regularization.rules_of(**given, proj_clip=None, proj_size=0, training=training)


def regime(case: Case, device_type: str) -> str:
    """Return the algorithm that PyTorch asks cuDNN for at the case's shape: the standard variant, without resets."""
    if device_type == "cpu":
        return CPU
    layer = replace(case, resets=0.0).layer
    return PERSISTENT if estimates.asks_for_persistent(layer, layer.training) else STANDARD


def _cases(suite: str) -> Iterator[Case]:
    """Yield the cases of a suite, forward alone. Models that are trained in float32 use PyTorch's default, TF32."""
    new = partial(Case, suite)
    ranked = tuple(enumerate(("bfloat16", "float16", "tf32"), 1))
    small = partial(new, B=1, I=64, H=64, dtype="float32", rank=2)
    if suite == "anchor":
        yield from (new(1024, 16, 768, 768, dtype) for dtype in ("float16", "bfloat16"))
    elif suite == "odd":
        for rank, dtype in ((0, "bfloat16"), (1, "float16"), (1, "tf32"), (3, "float32")):
            yield new(512, 12, 300, 500, dtype, rank=rank)
    elif suite == "variants":
        for rank, dtype in ((0, "bfloat16"), (2, "float16"), (3, "tf32")):
            for (B, H), variant in product(((16, 768), (64, 512), (64, 1024)), MORE_VARIANTS[1:]):
                yield new(512, B, H, H, dtype, variant=variant, rank=rank + (H != 768))
    elif suite == "regularized":
        for rank, dtype in ((0, "bfloat16"), (2, "float16"), (3, "tf32")):
            for (B, H), variant in product(((16, 768), (64, 512)), (*REGULARIZED, "norm")):
                yield new(512, B, H, H, dtype, variant=variant, rank=rank + (H != 768))
    elif suite == "deepbench":  # the LSTM cases of baidu-research/DeepBench, rnn_problems.h
        half = partial(new, dtype="float16")
        sizes = [(25, H, B) for H in (512, 1024, 2048, 4096) for B in (16, 32, 64, 128)]
        sizes += [(50, 1536, B) for B in (8, 16, 32)] + [(150, 256, B) for B in (16, 32, 64)]
        for T, H, B in sizes:
            first = (H, B) in ((512, 64), (1024, 16), (256, 16), (1536, 16))
            yield half(T, B, H, H, name="DeepBench training", rank=1 if first else 2 if H <= 1536 else 3)
        for (T, H), B in product(((25, 512), (25, 1024), (25, 2048), (50, 1536), (150, 256)), (1, 2, 4)):
            yield half(T, B, H, H, name=SERVER, rank=2)
    elif suite == "workloads":
        yield from _workloads()
    elif suite == "cell":
        for rank, dtype in ((1, "bfloat16"), (2, "tf32"), (3, "float16")):
            for B, H in ((16, 512), (1, 512), (128, 1024), (1, 2048)):
                yield new(1, B, H, H, dtype, cell=True, rank=rank)
    elif suite == "core":  # every combination; its rank counts how far each of its sizes is from the middle
        of_t, of_dtype = {512: 1, 1024: 2, 128: 2}, {"bfloat16": 0, "float16": 1, "tf32": 1, "float32": 4}
        of_h = {512: 0, 1024: 0, 256: 1, 768: 1, 2048: 1, 64: 1, 128: 2, 1536: 2}
        of_b = {16: 0, 64: 0, 1: 1, 128: 1, 256: 1}
        for T, dtype, H, B in product(of_t, of_dtype, of_h, of_b):
            yield new(T, B, H, H, dtype, rank=of_t[T] + of_dtype[dtype] + of_h[H] + of_b[B])
    elif suite == "deep":
        for (rank, dtype), (L, D) in product(ranked, ((2, 1), (1, 2), (4, 1), (2, 2), (4, 2))):
            yield new(512, 64, 512, 512, dtype, L=L, D=D, rank=rank)
    elif suite == "ragged":
        for (rank, dtype), (B, H, D) in product(ranked, ((64, 512, 1), (64, 512, 2), (16, 1024, 1))):
            yield new(512, B, H, H, dtype, D=D, ragged=True, rank=rank)
    elif suite == "streaming":  # a voice detector, a layer of 512 units, and two; chunks and rows around one step of 16
        for H, dtype, L in ((128, "tf32", 1), (512, "tf32", 1), (512, "float16", 2)):
            for T, B in ((1, 1), (1, 16), (1, 256), (4, 16), (32, 16)):
                yield new(T, B, H, H, dtype, L=L, stream=True, rank=1 if T == 1 and B <= 16 else 2)
    elif suite == "overhead-cell":
        yield from (small(T=1, variant=variant, cell=True) for variant in VARIANTS)
    elif suite == "cpu":
        single = partial(new, dtype="float32")
        yield from (single(T=64, B=32, I=256, H=512, L=2, variant=variant) for variant in VARIANTS)
        yield from (single(T=64, B=16, I=H, H=H, rank=1) for H in (64, 128, 256, 512))
        for T, B in ((64, 1), (64, 4), (64, 64), (16, 16), (256, 16)):
            yield single(T=T, B=B, I=256, H=256, rank=2)
        yield from (single(T=64, B=16, I=256, H=256, variant=variant, rank=3) for variant in VARIANTS[1:])
    elif suite == "overhead":
        yield from (small(T=T, variant=variant) for T, variant in product((1, 25), VARIANTS))
    elif suite == "compile":
        yield new(200, 1, 64, 64, "float32", rank=1)
        yield new(64, 16, 256, 256, "float32", rank=2)


def _workloads() -> Iterator[Case]:
    """Yield the layers of published models, forward alone: their first type, with a lower priority their second."""
    half, single = ("float16",), ("tf32",)
    both = ("tf32", "bfloat16")

    def new(name: str, dtypes: tuple[str, ...], T: int, B: int, I: int, H: int, **options: Any) -> Iterator[Case]:
        for rank, dtype in enumerate(dtypes, 1):
            yield Case("workloads", T, B, I, H, dtype, name=name, rank=rank, **options)

    yield from new("RNN-T", half, 557, 32, 240, 1024, L=2)  # MLPerf: the encoder's layers before its reduction in time
    yield from new("RNN-T", half, 279, 32, 2048, 1024, L=3)  # and after it
    yield from new("streaming RNN-T", half, 250, 16, 640, 2048, P=640)  # He et al. 2019: one of the encoder's 8 layers
    # Sak et al. 2014: their layer, with its peepholes, of which the output gate's reads c_t; I is the layer below's P.
    yield from new("LSTMP", ("bfloat16",), 512, 16, 512, 1024, P=512, variant="diagonal+current")
    yield from new("GNMT", half, 50, 128, 1024, 1024, L=4)  # MLPerf
    yield from new("GNMT", half, 50, 128, 1024, 1024, D=2)  # and the encoder's first layer
    yield from new("DeepSpeech", both, 500, 16, 512, 256, L=4, D=2, ragged=True)  # AlgoPerf, packed
    yield from new("AWD-LSTM WT2", single, 70, 80, 400, 1150)  # its layers differ: 1150, 1150 and 400 units
    yield from new("AWD-LSTM WT2", single, 70, 80, 1150, 400)
    yield from new("AWD-LSTM enwik8", both, 200, 128, 400, 1840)
    yield from new("ELMo", single, 20, 128, 512, 4096, D=2, P=512)
    yield from new("IMPALA deep", single, 80, 32, 257, 256)
    yield from new("IMPALA shallow", single, 80, 32, 519, 519, L=2)
    yield from new("R2D2", single, 120, 64, 520, 512, resets=0.03)  # 40 steps of burn-in and 80 of training
    yield from new("torchrl", single, 128, 128, 256, 256, resets=0.03)
    yield from new("OpenAI Five", half, 16, 120, 4096, 4096)
    yield from new("basecalling", half, 1666, 64, 1024, 1024)  # Bonito and Dorado: one of five alternating layers
    yield from new("hydrology", single, 365, 256, 32, 128)  # neuralhydrology on CAMELS
    yield from new("hydrology", single, 365, 256, 32, 256)
    yield from new("TF-GridNet", both, 100, 2000, 192, 192, D=2)  # source separation
    yield from new("BSRNN", both, 100, 256, 128, 256, D=2)  # source separation
    yield from new("diarization", single, 500, 32, 60, 128, L=4, D=2)  # pyannote
    yield from new("TTS prosody", single, 200, 1, 640, 256, D=2)  # StyleTTS 2 and Kokoro
    yield from new("Demucs", single, 300, 8, 2048, 2048, L=2, D=2)
    yield from new("amp modelling", single, 8192, 16, 1, 24)  # neural-amp-modeler
    yield from new("amp modelling", single, 8192, 16, 1, 32)
    yield from new(STREAMING_VAD, single, 1, 1, 128, 128)  # a step of 32 ms


WORDS = {
    "anchor": "one layer of 768 units, 16 rows, 1,024 steps",
    "odd": "500 units, 12 rows: sizes that no tile divides",
    "variants": "coupled and peephole cells, beside the standard cell of `torch.nn.LSTM`",
    "regularized": "dropout in the recurrence, zoneout, clipping, layer normalisation, beside `torch.nn.LSTM` without",
    "deepbench": "DeepBench's LSTM shapes: 25 to 150 steps",
    "workloads": "layers of published models",
    "cell": "one step by `LSTMCell`",
    "core": "one layer, 64 to 2,048 units, 1 to 256 rows",
    "deep": "several layers, or both directions",
    "ragged": "rows of different lengths, packed",
    "streaming": "chunks of a stream, 1 to 32 steps of 1 to 256 rows: how long one waits for each",
    "overhead-cell": "one step of 64 units by `LSTMCell`: the cost of a call",
    "cpu": "a CPU: 64 to 512 units, and the variants",
    "overhead": "1 and 25 steps of 64 units: the cost of a call",
    "compile": "a module within `torch.compile`",
}
"""What a suite measures, in a few words."""

SUITES = tuple(WORDS)
CPU_SUITES = ("cpu", "overhead", "overhead-cell", "compile")
GPU_SUITES = tuple(name for name in SUITES if name not in ("cpu", "overhead", "compile"))
"""What `python -m benchmarks gpu` measures."""


def cases(suites: tuple[str, ...], dtypes: tuple[str, ...] = (), modes: tuple[str, ...] = MODES) -> list[Case]:
    """Return all cases of the named suites in the given types (none: all) and modes, the highest priority first."""
    found = [
        replace(case, mode=mode) for name in suites for mode in MODES for case in _cases(name)
        if mode in modes and (not dtypes or case.dtype in dtypes)
        and not (case.training_only if mode == FORWARD else case.forward_only)
    ]  # fmt: skip
    return sorted(found, key=lambda case: case.rank)


SHAPE_KEYS = ("T", "B", "H", "I", "L", "D", "P", "lengths", "resets", "variant", "name")


def parse_shape(text: str) -> Case:
    """Return the case of a shape of one's own, `T=512,B=32,H=320,...`; its type and mode are set by `own_cases`.

    T, B and H are needed; I is H, L and D are 1, P is 0, variant is standard if not given. `lengths` (or `lengths=1`),
    resets (a probability) and name are as in Case. Raises ValueError with the reason for another text.
    """
    given: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = (word.strip() for word in part.partition("="))
        if key not in SHAPE_KEYS:
            raise ValueError(f"unknown {key!r} in {text!r}: there are {', '.join(SHAPE_KEYS)}")
        if key in given or (not value and (equals or key != "lengths")):
            raise ValueError(f"{key} {'is there twice' if key in given else 'needs a value'} in {text!r}")
        given[key] = value
    if lacking := [size for size in "TBH" if size not in given]:
        raise ValueError(f"{text!r} has no {' and no '.join(lacking)}: T, B and H are needed, as T=512,B=32,H=320")
    for size in SHAPE_KEYS[:6]:
        value = given.setdefault(size, given["H"] if size == "I" else "1")
        if not re.fullmatch(r"[1-9][0-9]*", value) or (size == "D" and int(value) > 2):
            raise ValueError(f"{size}={value} in {text!r}: {'1 or 2' if size == 'D' else 'a whole number from 1'}")
    P = given.get("P", "0")
    if not re.fullmatch(r"0|[1-9][0-9]*", P) or int(P) >= int(given["H"]):
        raise ValueError(f"P={P} in {text!r}: a whole number below H, 0 for no projection")
    lengths, resets = given.get("lengths", "0") or "1", given.get("resets", "0")
    if lengths not in ("0", "1"):
        raise ValueError(f"lengths={lengths} in {text!r}: 0 or 1")
    if not re.fullmatch(r"0|0?\.[0-9]+", resets):
        raise ValueError(f"resets={resets} in {text!r}: a probability below 1, as 0.03")
    T, B, H, I, L, D = (int(given[size]) for size in SHAPE_KEYS[:6])
    variant = given.get("variant", "standard")
    if variant not in REGULARIZED:
        variant = LSTMSpec.parse(variant).name
    case = Case(OWN, T, B, I, H, "", L=L, D=D, P=int(P), variant=variant, ragged=lengths == "1", resets=float(resets))
    # The name tells the rows of a results file apart whose sizes are equal.
    words = given.get("name", ""), "lengths" * case.ragged, f"resets={resets}" if case.resets else ""
    return replace(case, name=" ".join(filter(None, words)))


def own_cases(shapes: Iterable[Case], dtypes: tuple[str, ...], modes: tuple[str, ...]) -> list[Case]:
    """Return the cases of shapes of one's own in all these types and modes."""
    chosen = dict.fromkeys(product(shapes, dtypes, modes))
    return [replace(shape, dtype=dtype, mode=mode) for shape, dtype, mode in chosen]


@cache
def _names() -> dict[tuple[object, ...], str]:
    """Return the workloads' names by suite and shape, of the cases whose rows all have T steps, without projection."""
    plain = [case for case in cases(SUITES) if case.name and not (case.ragged or case.resets or case.P)]
    return {(one.suite, one.T, one.B, one.I, one.H, one.L, one.D, one.variant): one.name for one in plain}


def name_of_shape(suite: str, sizes: Iterable[int], variant: str) -> str:
    """Return the name of the workload of a shape, T B I H L D; "" if none has it. For rows that lack the column."""
    return _names().get((suite, *sizes, variant), "")
