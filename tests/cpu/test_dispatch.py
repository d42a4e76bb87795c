"""Which backend is chosen, and what is said where it cannot be."""

import re
import subprocess
import sys

import pytest
import torch

import lstm_triton
from lstm_triton import dispatch

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_auto_is_pytorch_on_the_cpu(monkeypatch):
    monkeypatch.setattr(dispatch, "FROM_ENVIRONMENT", "auto")
    assert dispatch.choose(CPU, torch.float32) == ("torch", "the kernels run on CUDA devices, not on cpu")


@pytest.mark.parametrize(
    "capability, dtype, name, reason",
    [
        ((9, 0), torch.bfloat16, "triton", "can run the kernels"),
        ((8, 0), torch.float32, "triton", "can run the kernels"),
        ((7, 5), torch.float16, "torch", r"compute capability 7\.5, the kernels need 8\.0"),
        ((9, 0), torch.complex64, "torch", "the kernels compute in"),
    ],
)
def test_auto_on_cuda(capability, dtype, name, reason, monkeypatch):
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    chosen = dispatch.choose(CUDA, dtype)
    assert chosen.name == name
    assert re.search(reason, chosen.reason)
    with lstm_triton.backend("torch"):
        assert dispatch.choose(CUDA, dtype) == ("torch", "asked for")
    with lstm_triton.backend("triton"):
        if name == "triton":
            assert dispatch.choose(CUDA, dtype).name == "triton"
        else:
            with pytest.raises(RuntimeError, match=reason):
                dispatch.choose(CUDA, dtype)


def test_triton_where_it_cannot_run_says_why(monkeypatch):
    layer, x = lstm_triton.LSTM(3, 4), torch.zeros(2, 1, 3)
    with (
        lstm_triton.backend("triton"),
        pytest.raises(RuntimeError, match="cannot run here: it needs a CUDA device, move"),
    ):
        layer(x)
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", False)
    with lstm_triton.backend("triton"), pytest.raises(RuntimeError, match="triton is not installed"):
        layer(x)
    assert dispatch.choose(CUDA, torch.float32) == ("torch", "triton is not installed (pip install triton)")


def test_the_innermost_request_wins_and_ends_with_its_block(monkeypatch):
    monkeypatch.setattr(dispatch, "FROM_ENVIRONMENT", "torch")
    assert dispatch.requested() == "torch"
    with lstm_triton.backend("triton"):
        with lstm_triton.backend("auto"):
            assert dispatch.requested() == "auto"
        assert dispatch.requested() == "triton"
        with pytest.raises(ZeroDivisionError), lstm_triton.backend("torch"):
            raise ZeroDivisionError
        assert dispatch.requested() == "triton"
    assert dispatch.requested() == "torch"


def test_unknown_names_list_what_exists(monkeypatch):
    with pytest.raises(ValueError, match=r"backend must be one of 'auto', 'triton', 'torch', got 'cuda'"):
        lstm_triton.backend("cuda").__enter__()
    monkeypatch.setattr(dispatch, "FROM_ENVIRONMENT", "gpu")
    with pytest.raises(ValueError, match=r"LSTM_TRITON_BACKEND must be one of .* got 'gpu'"):
        lstm_triton.LSTM(3, 4)(torch.zeros(2, 1, 3))


WITHOUT_TRITON = """
import importlib.abc, sys

class NoTriton(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else found(name, package)
sys.meta_path.insert(0, NoTriton())
import torch, lstm_triton
layer = lstm_triton.LSTM(3, 4, 2, coupled=True, peephole="full")
x = torch.randn(5, 2, 3, requires_grad=True)
layer(x)[0].sum().backward()
lstm_triton.LSTMCell(3, 4)(x[0])
assert x.grad.abs().sum() > 0 and "triton" not in sys.modules
try:
    with lstm_triton.backend("triton"):
        layer(x)
except RuntimeError as error:
    print(error)
"""


def test_everything_works_without_triton():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "triton is not installed" in done.stdout


def test_importing_touches_no_device_and_no_triton():
    program = "import sys, torch, lstm_triton; assert not torch.cuda.is_initialized(); print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr
