"""What is measured: the cases of every suite, and in which order.

Sizes: T time steps, B batch rows, I input features, H hidden units, L layers, D directions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

from lstm_triton_kernels.sizes import Layer

from lstm_triton import LSTMSpec, estimates
from lstm_triton.dtypes import DTYPES

STORAGE = {name: DTYPES[name][0] for name in ("float16", "bfloat16", "tf32", "float32")}
"""The types that are measured, to what tensors hold. "tf32" and "float32" differ in how matmuls round."""

FORWARD, TRAINING = "forward", "forward+backward"
MODES = (FORWARD, TRAINING)
"""Inference without gradients; a training step's forward and backward with gradients for the input and all weights."""

PERSISTENT, STANDARD, CPU = "cudnn-persistent", "cudnn-standard", "cpu"
REGIMES = (PERSISTENT, STANDARD, CPU)

VARIANTS = ("standard", "coupled", "diagonal", "full")
"""The cells that are measured, as `LSTMSpec.parse` names them."""


@dataclass(frozen=True)
class Case:
    """One shape of one suite in one type and mode.

    - variant: name of an LSTMSpec; dtype: a key of STORAGE; mode: one of MODES
    - ragged: rows have lengths uniform in 1..T; cell: one step by the cell's class (T = 1)
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
    variant: str = "standard"
    ragged: bool = False
    cell: bool = False
    rank: int = 0

    def __str__(self) -> str:
        shape = f"T={self.T} B={self.B} I={self.I} H={self.H} L={self.L} D={self.D}"
        return f"{self.suite} {self.mode} {self.dtype} {self.variant} {shape}"

    @property
    def spec(self) -> LSTMSpec:
        """Return the variant."""
        return LSTMSpec.parse(self.variant)

    @property
    def layer(self) -> Layer:
        """Return the first layer of the case."""
        dtype, precision = DTYPES[self.dtype]
        sizes = (self.T, self.B, self.H, self.D)
        options: dict[str, Any] = dict(training=self.mode == TRAINING, ragged=self.ragged, L=self.L)
        return Layer(self.spec, *sizes, dtype, precision, self.I, **options)

    @property
    def steps(self) -> int:
        """Return the time steps of all layers and directions together."""
        return self.T * self.L * self.D


def regime(case: Case, device_type: str) -> str:
    """Return the algorithm that PyTorch asks cuDNN for at the case's shape (of the standard variant)."""
    if device_type == "cpu":
        return CPU
    return PERSISTENT if estimates.asks_for_persistent(case.layer, case.layer.training) else STANDARD


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
            for (B, H), variant in product(((16, 768), (64, 512), (64, 1024)), VARIANTS[1:]):
                yield new(512, B, H, H, dtype, variant=variant, rank=rank + (H != 768))
    elif suite == "deepbench":  # the LSTM training cases of baidu-research/DeepBench, rnn_problems.h
        sizes = [(25, H, B) for H in (512, 1024, 2048, 4096) for B in (16, 32, 64, 128)]
        sizes += [(50, 1536, B) for B in (8, 16, 32)] + [(150, 256, B) for B in (16, 32, 64)]
        for T, H, B in sizes:
            first = (H, B) in ((512, 64), (1024, 16), (256, 16), (1536, 16))
            yield new(T, B, H, H, "float16", rank=1 if first else 2 if H <= 1536 else 3)
    elif suite == "workloads":
        half, single = (partial(new, dtype=dtype, rank=1) for dtype in ("float16", "tf32"))
        yield half(T=557, B=32, I=240, H=1024, L=2)  # RNN-T, MLPerf: the encoder's first layers
        yield half(T=279, B=32, I=2048, H=1024, L=3)  # and those after its reduction in time
        yield half(T=50, B=128, I=1024, H=1024, L=4)  # GNMT, MLPerf
        yield half(T=1000, B=64, I=1024, H=1024)  # a basecaller's layer (Bonito)
        yield single(T=500, B=16, I=512, H=256, L=4, D=2)  # DeepSpeech, AlgoPerf
        yield single(T=70, B=80, I=400, H=1150)  # AWD-LSTM
        yield single(T=80, B=32, I=257, H=256)  # IMPALA
        yield single(T=80, B=32, I=519, H=519)  # and its shallow model
        yield single(T=120, B=64, I=520, H=512)  # R2D2
        yield single(T=365, B=256, I=32, H=256)  # hydrology (CAMELS)
        yield single(T=100, B=2000, I=192, H=192, D=2)  # source separation
        yield single(T=500, B=32, I=60, H=128, L=4, D=2)  # diarization (pyannote)
        yield single(T=200, B=1, I=640, H=256, D=2)  # prosody of synthetic speech
        yield single(T=8192, B=16, I=1, H=32)  # amplifier models
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


WORDS = {
    "anchor": "one layer of 768 units, 16 rows, 1,024 steps",
    "odd": "500 units, 12 rows: sizes that no tile divides",
    "variants": "coupled and peephole cells, beside the standard cell of `torch.nn.LSTM`",
    "deepbench": "DeepBench's LSTM shapes: 25 to 150 steps",
    "workloads": "layers of published models",
    "cell": "one step by `LSTMCell`",
    "core": "one layer, 64 to 2,048 units, 1 to 256 rows",
    "deep": "several layers, or both directions",
    "ragged": "rows of different lengths, packed",
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
    ]  # fmt: skip
    return sorted(found, key=lambda case: case.rank)
