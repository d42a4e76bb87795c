"""Export LSTMs to ONNX, run them in onnxruntime with other numbers of steps and rows, and compare.

A layer of the standard variant, or with the textbook's peepholes, is ONNX's own LSTM node; one whose output gate reads
c_{t-1}, or with full peepholes and layer normalisation, is a Scan of standard nodes. Prints what each model is made of,
and the largest difference of output and final states from what the module computes.

    pip install onnxscript onnxruntime
    python examples/export_onnx.py
"""

import io
import logging
import sys
import warnings
from importlib.util import find_spec

import numpy as np
import torch
from torch.export import Dim

import lstm_triton

MISSING = [name for name in ("onnxscript", "onnxruntime") if find_spec(name) is None]

MODELS = {
    "standard": dict(num_layers=2),
    "textbook peepholes": dict(peephole="diagonal", output_peephole="current", bidirectional=True),
    "peepholes on c_{t-1}": dict(peephole="diagonal"),
    "full peepholes, normalised": dict(peephole="full", layer_norm=True),
}


def exported(lstm):
    """The ONNX model of an LSTM, for any number of steps T and of rows B."""
    sizes = {0: Dim("T", min=1), 1: Dim("B", min=1)}
    example = torch.randn(10, 4, lstm.input_size)
    return torch.onnx.export(lstm, (example,), dynamo=True, dynamic_shapes=(sizes,), verbose=False)


def largest_difference(lstm, session, T, B):
    """The largest difference of onnxruntime's output, h_n and c_n from the module's, for a random input (T, B, I)."""
    x = torch.randn(T, B, lstm.input_size)
    with torch.no_grad():
        output, (h_n, c_n) = lstm(x)
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return max(float(np.abs(a - b.numpy()).max()) for a, b in zip(found, (output, h_n, c_n), strict=True))


def main():
    """Export and compare each model."""
    import onnxruntime

    # The exporter tells what else is not installed, and that PyTorch uses what it will no longer have.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)
    torch.manual_seed(0)
    for name, options in MODELS.items():
        lstm = lstm_triton.LSTM(8, 16, **options).eval().requires_grad_(False)
        model, file = exported(lstm), io.BytesIO()
        model.save(file)
        session = onnxruntime.InferenceSession(file.getvalue())
        operators = [node.op_type for node in model.model_proto.graph.node]
        made_of = ", ".join(f"{operators.count(kind)} {kind}" for kind in ("LSTM", "Scan") if kind in operators)
        print(f"{name}: {made_of}, {len(file.getvalue()):,} bytes")
        for T, B in ((10, 4), (25, 1), (3, 7)):
            difference = largest_difference(lstm, session, T, B)
            print(f"  T={T:2}, B={B}: largest difference {difference:.1e}")
            assert difference < 1e-5
    print("Every output and state agrees to 1e-5.")


if __name__ == "__main__":
    if MISSING:
        sys.exit(f"this example needs {' and '.join(MISSING)}: pip install {' '.join(MISSING)}")
    main()
