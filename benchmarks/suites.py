"""What is measured: the cases of every suite, and which of them tell most.

Sizes: T time steps, B batch rows, I input features, H hidden units, L layers, D directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from lstm_triton_kernels.sizes import Layer

from lstm_triton import LSTMSpec, estimates

STORAGE = {
    "float16": torch.float16, "bfloat16": torch.bfloat16, "tf32": torch.float32, "float32": torch.float32,
}  # fmt: skip
"""Names of types to what tensors hold. "tf32" and "float32" differ in how matmuls round: PyTorch's switches for it."""

FORWARD, TRAINING = "forward", "forward+backward"
MODES = (FORWARD, TRAINING)
"""Inference without gradients; a training step's forward and backward with gradients for the input and all weights."""

PERSISTENT, STANDARD, CPU = "cudnn-persistent", "cudnn-standard", "cpu"
REGIMES = (PERSISTENT, STANDARD, CPU)


@dataclass(frozen=True)
class Case:
    """One shape of one suite in one type and mode.

    - variant: name of an LSTMSpec; dtype: a key of STORAGE; mode: one of MODES
    - ragged: rows have lengths uniform in 1..T; cell: one step by the cell's class (T = 1)
    - rank: how much it tells, 0 the most; a run with a budget takes low ranks first
    """

    suite: str
    T: int
    B: int
    I: int
    H: int
    dtype: str
    mode: str
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
        """The variant."""
        return LSTMSpec.parse(self.variant)

    @property
    def layer(self) -> Layer:
        """The first layer of the case."""
        precision = "tf32" if self.dtype == "tf32" else "ieee"
        training = self.mode == TRAINING
        sizes = (self.T, self.B, self.H, self.D)
        dtype = STORAGE[self.dtype]
        return Layer(self.spec, *sizes, dtype, precision, self.I, training=training, ragged=self.ragged, L=self.L)

    @property
    def work(self) -> int:
        """Multiplications of the matmuls with W, of all steps: what sizes are compared by."""
        passes = 3 if self.mode == TRAINING else 1
        return passes * self.steps * self.B * self.H * len(self.spec.gates) * (self.I + self.H)

    @property
    def steps(self) -> int:
        """Time steps of all layers and directions together."""
        return self.T * self.L * self.D


def regime(case: Case, device_type: str) -> str:
    """The algorithm that PyTorch asks cuDNN for at the case's shape (of the standard variant), see `routing`.

    What a run saw is in its `-kernels.json`.
    """
    if device_type == "cpu":
        return CPU
    return PERSISTENT if estimates.asks_for_persistent(case.layer, case.layer.training) else STANDARD


def _anchor() -> Iterator[Case]:
    for dtype in ("float16", "bfloat16"):
        yield Case("anchor", T=1024, B=16, I=768, H=768, dtype=dtype, mode=FORWARD)


def _deepbench() -> Iterator[Case]:
    """The LSTM training cases of DeepBench (baidu-research/DeepBench, rnn_problems.h): I = H, one layer, float16."""
    sizes = [(25, H, B) for H in (512, 1024, 2048, 4096) for B in (16, 32, 64, 128)]
    sizes += [(50, 1536, B) for B in (8, 16, 32)] + [(150, 256, B) for B in (16, 32, 64)]
    for T, H, B in sizes:
        rank = 1 if (H, B) in ((512, 64), (1024, 16), (256, 16), (1536, 16)) else 2 if H <= 1536 else 3
        yield Case("deepbench", T=T, B=B, I=H, H=H, dtype="float16", mode=FORWARD, rank=rank)


def _workloads() -> Iterator[Case]:
    """Layers of models that people train; in float32 those that do so use PyTorch's default for an LSTM, TF32."""
    half: dict[str, Any] = dict(dtype="float16", mode=FORWARD, rank=1)
    single: dict[str, Any] = dict(dtype="tf32", mode=FORWARD, rank=1)
    name = "workloads"
    yield Case(name, T=557, B=32, I=240, H=1024, L=2, **half)  # RNN-T, MLPerf: the encoder's first layers
    yield Case(name, T=279, B=32, I=2048, H=1024, L=3, **half)  # and those after its reduction in time
    yield Case(name, T=50, B=128, I=1024, H=1024, L=4, **half)  # GNMT, MLPerf
    yield Case(name, T=1000, B=64, I=1024, H=1024, **half)  # a basecaller's layer (Bonito)
    yield Case(name, T=500, B=16, I=512, H=256, L=4, D=2, **single)  # DeepSpeech, AlgoPerf
    yield Case(name, T=70, B=80, I=400, H=1150, **single)  # AWD-LSTM
    yield Case(name, T=80, B=32, I=257, H=256, **single)  # IMPALA
    yield Case(name, T=80, B=32, I=519, H=519, **single)  # and its shallow model
    yield Case(name, T=120, B=64, I=520, H=512, **single)  # R2D2
    yield Case(name, T=365, B=256, I=32, H=256, **single)  # hydrology (CAMELS)
    yield Case(name, T=100, B=2000, I=192, H=192, D=2, **single)  # source separation
    yield Case(name, T=500, B=32, I=60, H=128, L=4, D=2, **single)  # diarization (pyannote)
    yield Case(name, T=200, B=1, I=640, H=256, D=2, **single)  # prosody of synthetic speech
    yield Case(name, T=8192, B=16, I=1, H=32, **single)  # amplifier models


def _core() -> Iterator[Case]:
    """Every combination; its rank counts how far each of its sizes is from the middle."""
    detour_t = {512: 1, 1024: 2, 128: 2}
    detour_b = {16: 0, 64: 0, 1: 1, 128: 1, 256: 1}
    detour_h = {512: 0, 1024: 0, 256: 1, 768: 1, 2048: 1, 64: 1, 128: 2, 1536: 2}
    detour_dtype = {"bfloat16": 0, "float16": 1, "tf32": 1, "float32": 4}
    for T, rank_t in detour_t.items():
        for dtype, rank_dtype in detour_dtype.items():
            for H, rank_h in detour_h.items():
                for B, rank_b in detour_b.items():
                    rank = rank_t + rank_dtype + rank_h + rank_b
                    yield Case("core", T=T, B=B, I=H, H=H, dtype=dtype, mode=FORWARD, rank=rank)


def _deep() -> Iterator[Case]:
    for rank, dtype in ((1, "bfloat16"), (2, "float16"), (3, "tf32")):
        for L, D in ((2, 1), (1, 2), (4, 1), (2, 2), (4, 2)):
            yield Case("deep", T=512, B=64, I=512, H=512, L=L, D=D, dtype=dtype, mode=FORWARD, rank=rank)


def _ragged() -> Iterator[Case]:
    for rank, dtype in ((1, "bfloat16"), (2, "float16"), (3, "tf32")):
        for B, H, D in ((64, 512, 1), (64, 512, 2), (16, 1024, 1)):
            yield Case("ragged", T=512, B=B, I=H, H=H, D=D, dtype=dtype, mode=FORWARD, ragged=True, rank=rank)


def _odd() -> Iterator[Case]:
    for rank, dtype in ((0, "bfloat16"), (1, "float16"), (1, "tf32"), (3, "float32")):
        yield Case("odd", T=512, B=12, I=300, H=500, dtype=dtype, mode=FORWARD, rank=rank)


def _variants() -> Iterator[Case]:
    for rank, dtype in ((0, "bfloat16"), (2, "float16"), (3, "tf32")):
        for more, (B, H) in enumerate(((16, 768), (64, 512), (64, 1024))):
            for variant in ("coupled", "diagonal", "full"):
                rest: dict[str, Any] = dict(dtype=dtype, mode=FORWARD, variant=variant, rank=rank + min(more, 1))
                yield Case("variants", T=512, B=B, I=H, H=H, **rest)


def _cell() -> Iterator[Case]:
    for rank, dtype in ((1, "bfloat16"), (2, "tf32"), (3, "float16")):
        for B, H in ((16, 512), (1, 512), (128, 1024), (1, 2048)):
            yield Case("cell", T=1, B=B, I=H, H=H, dtype=dtype, mode=FORWARD, cell=True, rank=rank)


def _cpu() -> Iterator[Case]:
    rest: dict[str, Any] = dict(dtype="float32", mode=FORWARD)
    for variant in ("standard", "coupled", "diagonal", "full"):
        yield Case("cpu", T=64, B=32, I=256, H=512, L=2, variant=variant, **rest)
    for H in (64, 128, 256, 512):
        yield Case("cpu", T=64, B=16, I=H, H=H, rank=1, **rest)
    for B in (1, 4, 64):
        yield Case("cpu", T=64, B=B, I=256, H=256, rank=2, **rest)
    for T in (16, 256):
        yield Case("cpu", T=T, B=16, I=256, H=256, rank=2, **rest)
    for variant in ("coupled", "diagonal", "full"):
        yield Case("cpu", T=64, B=16, I=256, H=256, variant=variant, rank=3, **rest)


def _overhead() -> Iterator[Case]:
    """Calls that compute next to nothing: their time is what a call costs whatever it computes."""
    for T in (1, 25):
        for variant in ("standard", "coupled", "diagonal", "full"):
            yield Case("overhead", T=T, B=1, I=64, H=64, variant=variant, dtype="float32", mode=FORWARD, rank=2)


def _overhead_cell() -> Iterator[Case]:
    for variant in ("standard", "coupled", "diagonal", "full"):
        rest: dict[str, Any] = dict(dtype="float32", mode=FORWARD, variant=variant, cell=True, rank=2)
        yield Case("overhead-cell", T=1, B=1, I=64, H=64, **rest)


def _compile() -> Iterator[Case]:
    yield Case("compile", T=200, B=1, I=64, H=64, dtype="float32", mode=FORWARD, rank=1)
    yield Case("compile", T=64, B=16, I=256, H=256, dtype="float32", mode=FORWARD, rank=2)


_SUITES: dict[str, Callable[[], Iterator[Case]]] = {
    "anchor": _anchor, "odd": _odd, "variants": _variants, "deepbench": _deepbench, "workloads": _workloads,
    "cell": _cell, "core": _core, "deep": _deep,
    "ragged": _ragged, "overhead-cell": _overhead_cell, "cpu": _cpu, "overhead": _overhead, "compile": _compile,
}  # fmt: skip

SUITES = tuple(_SUITES)
CPU_SUITES = ("cpu", "overhead", "overhead-cell", "compile")
GPU_SUITES = tuple(name for name in SUITES if name not in ("cpu", "overhead", "compile"))
"""What a visit to a GPU measures."""


def cases(suites: tuple[str, ...], dtypes: tuple[str, ...] = (), modes: tuple[str, ...] = MODES) -> list[Case]:
    """All cases of the named suites in the given types (none: all) and modes, the most telling first."""
    found = [
        replace(case, mode=mode) for name in suites for mode in MODES for case in _SUITES[name]()
        if mode in modes and (not dtypes or case.dtype in dtypes)
    ]  # fmt: skip
    return sorted(found, key=lambda case: case.rank)
