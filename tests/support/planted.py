"""Providers with planted faults, to test the benchmark suite with; importable, so that a worker can build them."""

from __future__ import annotations

import os
import time

import torch

from benchmarks.providers import ModuleModel, TorchLSTM


class Planted(TorchLSTM):
    """`torch.nn.LSTM` with a fault."""

    def __init__(self, name: str, fault) -> None:
        super().__init__("aten")
        self.name, self.fault = name, fault

    def build(self, problem):
        model = super().build(problem)
        run = model.run
        model.run = lambda x: self.fault(run, x)
        return model


def _wrong_output(run, x):
    output, h_n, c_n = run(x)
    return output * 1.01, h_n, c_n


def _wrong_last_step(run, x):
    output, h_n, c_n = run(x)
    return torch.cat([output[:-1], output[-1:] * 1.5]), h_n, c_n


def _nan(run, x):
    output, h_n, c_n = run(x)
    return output * float("nan"), h_n, c_n


def _raises(run, x):
    raise ValueError("a planted\n  failure")


def _memory(run, x):
    raise torch.OutOfMemoryError("planted: 1 TiB wanted")


def _crashes(run, x):
    os._exit(9)


def _hangs(run, x):
    time.sleep(600)


class NoGradient(ModuleModel):
    """Forgets the gradients of the weights."""

    def gradients(self):
        return {name: None for name in super().gradients()}


WRONG_OUTPUT = Planted("wrong output", _wrong_output)
WRONG_LAST_STEP = Planted("wrong last step", _wrong_last_step)
NAN = Planted("nan", _nan)
RAISES = Planted("raises", _raises)
MEMORY = Planted("memory", _memory)
CRASHES = Planted("crashes", _crashes)
HANGS = Planted("hangs", _hangs)
