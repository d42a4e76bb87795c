"""Long sequences: more steps than cuDNN takes, what `recompute` keeps, and segments that keep less.

Run as a program this file prints as JSON the memory of training steps: for each way and T what is kept between the
forward and the backward pass, and what the backward pass takes beyond that at most. A program of its own, since
whatever else a process does would be measured, too.
"""

import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lstm_triton_kernels.gpus import GPUS
from lstm_triton_kernels.planner import ranked_plans, why_not
from lstm_triton_kernels.sizes import Layer

from lstm_triton import LSTM, LSTMSpec, routing

ROOT = Path(__file__).parents[2]


def documented():
    """The function `in_segments` as docs/how-it-works.md has it."""
    text = (ROOT / "docs" / "how-it-works.md").read_text()
    (block,) = [block for block in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S) if "in_segments" in block]
    namespace = {}
    exec(block, namespace)
    return namespace["in_segments"]


# More steps than cuDNN takes.

LONG = 100_000
SHORT = 1_000


def results_of(module, x, weight, steps):
    """Output, last states, and all gradients, in double precision, of a sequence in chunks of so many steps."""
    x = x.detach().to(module.weight_hh_l0.dtype).clone().requires_grad_()
    module.zero_grad()
    outputs, state = [], None
    for chunk in x.split(steps):
        output, state = module(chunk, state)
        outputs.append(output)
    output = torch.cat(outputs)
    (output.mul(weight).sum() + state[0].sum() + state[1].square().sum()).backward()
    found = dict(output=output, h_n=state[0], c_n=state[1], x=x.grad)
    found |= {name: parameter.grad for name, parameter in module.named_parameters()}
    return {name: value.detach().double() for name, value in found.items()}


def errors(found, expected):
    return {name: float((found[name] - value).norm() / value.norm()) for name, value in expected.items()}


def by_eager_steps(monkeypatch):
    """What PyTorch's operator computes is computed step by step."""
    monkeypatch.setattr(routing, "why_not_operator", lambda *_: "not asked here")


@pytest.mark.parametrize("coupled", [False, True])
def test_pytorchs_operator_computes_a_hundred_thousand_steps(coupled, monkeypatch):
    """In float32 at once, against float64 step by step, a thousand steps at a time."""
    module = LSTM(2, 3, coupled=coupled)
    x, weight = torch.randn(LONG, 1, 2), torch.randn(LONG, 1, 3)
    found = results_of(module, x, weight, LONG)
    by_eager_steps(monkeypatch)
    expected = results_of(module.double(), x, weight, SHORT)
    found = errors(found, expected)
    assert max(found.values()) < 2e-5, found


@pytest.mark.parametrize(
    "options", [dict(peephole="diagonal", output_peephole="current"), dict(peephole="full", coupled=True)], ids=str
)
def test_the_steps_of_a_peephole_variant_may_be_as_many(options):
    """In float64, with the gates of all steps computed again, against a thousand steps at a time with gates kept."""
    T = 66_000
    module = LSTM(2, 3, **options).double()
    x, weight = torch.randn(T, 2, 2), torch.randn(T, 2, 3)
    expected = results_of(module, x, weight, SHORT)
    module.recompute = True
    found = errors(results_of(module, x, weight, T), expected)
    assert max(found.values()) < 1e-11, found


@pytest.mark.parametrize("spec", [LSTMSpec(), LSTMSpec(coupled=True)], ids=lambda spec: spec.name)
@pytest.mark.parametrize("training", [False, True])
def test_auto_sends_no_more_steps_to_cudnn_than_it_takes(spec, training, monkeypatch):
    """Of few units, for which `auto` takes cuDNN else."""
    monkeypatch.setattr(routing, "TRITON_INSTALLED", True)
    monkeypatch.setattr(routing, "FROM_ENVIRONMENT", "auto")
    monkeypatch.setattr(routing, "gpu_of", lambda device: GPUS["h100"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(routing, "persistent_or_cudnn", lambda layer, gpu: routing.Choice("operator", "faster"))

    def routed(T, strategy="auto"):
        layer = Layer(spec, T, 16, 64, 1, torch.float16, training=training)
        return routing.route(layer, torch.device("cuda", 0), strategy).name

    assert routed(65_535) == "operator"
    assert routed(65_536) == routed(10_000_000) == "persistent"
    with pytest.raises(RuntimeError, match="cuDNN fails on more than 65535 steps, got 65536"):
        routed(65_536, "cudnn")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert (routed(65_535), routed(65_536)) == ("operator inside", "kernels")


# The planner's limit of a time step; tests/compiled/test_offsets.py executes the kernels there.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("variant, B, H", [("standard", 2**22, 128), ("standard", 2**19, 1024), ("coupled", 2**26, 11)])
def test_a_step_with_more_elements_than_32_bits_count_has_no_plan(variant, B, H, dtype):
    spec = LSTMSpec.parse(variant)
    layer = Layer(spec, 1, B, H, 1, dtype)
    B = -(-(2**31) // (layer.gates * H))  # the first that is too many
    for D in (1, 2):
        layer = layer._replace(D=D)
        assert why_not(layer._replace(B=B - 1)) is None
        reason = f"a step of {B} rows and {H} units has more elements than 32-bit offsets reach"
        assert why_not(layer._replace(B=B)) == reason
        assert {ranked_plans(layer._replace(B=B), backward, GPUS["h100"]) for backward in (False, True)} == {reason}


# Segments.


@pytest.mark.parametrize("segments", [1, 4, 7, 23])
@pytest.mark.parametrize(
    "options",
    [
        dict(), dict(coupled=True, num_layers=2), dict(peephole="diagonal", output_peephole="current"),
        dict(peephole="full", num_layers=2, recompute=True), dict(proj_size=3, peephole="diagonal", recompute=True),
    ],
    ids=str,
)  # fmt: skip
def test_segments_give_what_one_call_gives(options, segments):
    T, B, I, H = 23, 2, 3, 5  # noqa: E741
    module = LSTM(I, H, **options).double()
    L, P = module.num_layers, module.proj_size or H
    x, h_0, c_0 = torch.randn(T, B, I), torch.randn(L, B, P), torch.randn(L, B, H)
    weights = torch.randn(T, B, P), torch.randn(L, B, P), torch.randn(L, B, H)
    found = []
    for call in (module, lambda x, state: documented()(module, x, state, segments)):
        module.zero_grad()
        leaves = [t.double().requires_grad_() for t in (x, h_0, c_0)]
        output, state = call(leaves[0], tuple(leaves[1:]))
        results = [output, *state]
        sum((result * weight).sum() for result, weight in zip(results, weights, strict=True)).backward()
        found.append([*results, *(leaf.grad for leaf in leaves), *(p.grad for p in module.parameters())])
    for one, several in zip(*found, strict=True):
        assert float((one - several).detach().norm() / one.detach().norm()) < 1e-12


# Memory.

B, I, H = 64, 16, 64  # noqa: E741
G = 4
STEPS = {256: 16, 1024: 32}
"""T, and segments: its square root."""

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def resident():
    """Bytes of memory that the process occupies."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def begin_peak():
    Path("/proc/self/clear_refs").write_text("5")


def peak():
    """The most bytes that it occupied since `begin_peak`."""
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def main():
    """Print by way and T what is kept, the peak beyond that, and what is left, in units of (B, H) in float32."""
    in_segments = documented()
    module, state = LSTM(I, H, peephole="diagonal"), (torch.zeros(1, B, H), torch.zeros(1, B, H))
    found = {}
    for T, segments in STEPS.items():
        x, grad = torch.randn(T, B, I), torch.randn(T, B, H)
        ways = {
            "kept": lambda x=x: module(x, state),
            "recomputed": lambda x=x: module(x, state),
            "in segments": lambda x=x, n=segments: in_segments(module, x, state, n),
        }
        for way, call in ways.items():
            module.recompute = way == "recomputed"
            for _ in range(2):  # the first time what lasts is made: code, gradients of the parameters
                gc.collect()
                before = resident()
                output, _ = call()
                kept = resident()
                begin_peak()
                output.backward(grad)
                most = peak()
                del output
            parts = kept - before, most - kept, resident() - before
            found[f"{way}, T={T}"] = [part / (B * H * 4) for part in parts]
    print(json.dumps(found))


@pytest.fixture(scope="module")
def measured():
    environment = os.environ | dict(
        PYTHONPATH=os.pathsep.join(map(str, (ROOT, ROOT / "kernels"))), OMP_NUM_THREADS="1",
        MALLOC_MMAP_THRESHOLD_="16384", MALLOC_TRIM_THRESHOLD_="16384",
    )  # fmt: skip
    run = [sys.executable, "-m", "tests.cpu.test_long_sequences"]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@LINUX
@pytest.mark.xdist_group("memory")
@pytest.mark.parametrize("T", STEPS)
def test_recompute_keeps_the_output_and_the_cell_states(T, measured):
    """As docs/how-it-works.md states; and the peak is no less, since the gates are there again, with their gradients.

    In units of a state (B, H): the output and the cell states are T each, the gates G · T.
    """
    margin = 0.03 * T + 20
    kept, beyond, left = measured[f"kept, T={T}"]
    assert abs(kept - (G + 2) * T) < margin and left < margin
    assert beyond > G * T - margin
    again, beyond_again, left = measured[f"recomputed, T={T}"]
    assert abs(again - 2 * T) < margin and left < margin
    assert beyond_again > 2 * G * T - margin
    assert abs((again + beyond_again) - (kept + beyond)) < 2 * margin


@LINUX
@pytest.mark.xdist_group("memory")
@pytest.mark.parametrize("T", STEPS)
def test_segments_keep_the_output_and_the_states_between_them(T, measured):
    """And beyond that the memory of one segment: what one call takes in all, divided by the number of segments."""
    n = STEPS[T]
    margin = 0.03 * T + 20
    kept, beyond, left = measured[f"in segments, T={T}"]
    assert T - margin < kept < T + 2 * n + margin and left < margin
    assert beyond < 1.2 * sum(measured[f"recomputed, T={T}"][:2]) / n + margin


@LINUX
@pytest.mark.xdist_group("memory")
def test_what_segments_take_beyond_the_output_grows_as_the_root_of_the_steps(measured):
    """Four times as many steps: twice as much; at once four times as much."""
    few, many = STEPS
    assert 1.4 < measured[f"in segments, T={many}"][1] / measured[f"in segments, T={few}"][1] < 2.8
    assert 3.5 < measured[f"recomputed, T={many}"][1] / measured[f"recomputed, T={few}"][1] < 4.5


if __name__ == "__main__":
    main()
