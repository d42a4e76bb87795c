"""An LSTM for PyTorch whose recurrence runs in Triton kernels: standard, coupled and peephole variants.

`LSTM` and `LSTMCell` are used like `torch.nn.LSTM` and `torch.nn.LSTMCell`; `functional` has the same on explicit
tensors; `convert` swaps the modules of a whole model; `foreign` reads weights of other libraries; `backend` chooses the
implementation; `LSTM.explain` says what computes a call, and why; `check_launches` asks whether a launch timed out.
`LSTM.session` computes a stream of steps, `LSTM.captured` replays whole stacks from CUDA graphs.
"""

from lstm_triton_kernels.spec import VARIANTS, LSTMSpec
from lstm_triton_kernels.watch import check_launches

from lstm_triton import convert, foreign, functional
from lstm_triton.captured import Captured
from lstm_triton.gate_values import Gates
from lstm_triton.modules import LSTM, CoupledLSTM, LSTMCell, PeepholeLSTM
from lstm_triton.routing import backend
from lstm_triton.session import Session

__version__ = "0.1.0"

__all__ = [
    "LSTM",
    "VARIANTS",
    "Captured",
    "CoupledLSTM",
    "Gates",
    "LSTMCell",
    "LSTMSpec",
    "PeepholeLSTM",
    "Session",
    "backend",
    "check_launches",
    "convert",
    "foreign",
    "functional",
]
