"""What computes a layer, as `lstm-triton info` and `LSTM.explain` say it: data, text, and the program."""

import json
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lstm_triton_kernels.gpus import GPUS, gpu_key, nominal_constants
from lstm_triton_kernels.limit import least_us_per_step
from lstm_triton_kernels.planner import ranked_plans
from lstm_triton_kernels.sizes import Layer
from lstm_triton_kernels.spec import VARIANTS, LSTMSpec

import lstm_triton
from lstm_triton import cli, estimates, explain, plan_words, routing
from lstm_triton.dtypes import DTYPES
from lstm_triton.explain import Target

H100 = Target(GPUS["h100"])
PASSES = {"forward": False, "backward": True}


def layer(H=768, B=16, T=512, dtype="bfloat16", variant="standard", I=None, **fields):  # noqa: E741
    storage, precision = DTYPES[dtype]
    fields = {"D": 1, "training": True, **fields}
    I = H if I is None else I  # noqa: E741
    return Layer(LSTMSpec.parse(variant), T, B, H, dtype=storage, precision=precision, I=I, **fields)


@pytest.fixture(autouse=True)
def nothing_asked_for(monkeypatch):
    monkeypatch.setattr(routing, "FROM_ENVIRONMENT", "auto")


@pytest.fixture
def cuda_device(monkeypatch):
    """As if the current CUDA device were an A100 with fewer multiprocessors, and cuDNN were there."""
    gpu = replace(GPUS["a100"], name="A100 of a test", multiprocessors=100)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(explain, "gpu_of", lambda device: gpu)
    monkeypatch.setattr(routing, "gpu_of", lambda device: gpu)
    return gpu


@pytest.fixture
def program(capsys):
    """Run `lstm-triton` in this process: exit code, stdout, stderr."""

    def run(*arguments):
        try:
            code = cli.main(arguments)
        except SystemExit as exit_:
            code = exit_.code
        return code, *capsys.readouterr()

    return run


def report_of(asked, target=H100, **options):
    (report,) = explain.explain(asked, [target], **options).reports
    return report


def plan_of(asked, backward=False, gpu=GPUS["h100"]):
    plans = ranked_plans(asked, backward, gpu)
    assert not isinstance(plans, str), plans
    return plans[0]


def numbers(text):
    return [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", text)]


# The choice, and why.


def test_the_choice_is_that_of_the_router():
    for H in (1, 500, 768, 4096):
        for target in map(Target, GPUS.values()):
            for variant in ("standard", "coupled", "full+current"):
                asked = layer(H, variant=variant)
                no_operator = routing.why_not_operator(torch.device("cuda"), asked, ())
                choice = routing.decide(routing.Facts(asked, target.gpu, no_operator=no_operator))
                report = report_of(asked, target)
                expected = choice._replace(name="cudnn") if choice.name == "operator" else choice
                assert report.choice == expected
                runs = {found.obstacle is None for found in report.plans.values()}
                assert runs == {choice.name == "persistent"}


@pytest.mark.parametrize("strategy", routing.STRATEGIES)
def test_a_strategy_that_is_asked_for(strategy):
    found = report_of(layer(variant="coupled"), strategy=strategy).choice
    assert found.name == {"auto": "persistent"}.get(strategy, strategy)
    refused = report_of(layer(2048, B=2048, variant="full"), Target(GPUS["l4"]), strategy="persistent").choice
    assert refused.name == "none" and "no tiles of the recurrent weights" in refused.reason


@pytest.mark.parametrize(
    "fields, gpu, reason, instead",
    [
        (dict(H=8192, B=4096), "h100", "no tiles of the recurrent weights, 512.0 MiB, fit", "cudnn"),
        (dict(H=2000, dtype="float32", variant="coupled"), "l4", "no tiles of the recurrent weights", "cudnn"),
        (dict(H=2000, dtype="float32", variant="diagonal"), "l4", "no tiles of the recurrent weights", "stepwise"),
        (dict(H=64, dtype="float64"), "rtx4090", "float64 has no persistent kernel", "cudnn"),
        (dict(H=64, dtype="float64", variant="diagonal"), "a100", "float64 has no persistent kernel", "stepwise"),
        (dict(H=4096, P=4000, B=4096, variant="coupled+diagonal"), "h100", "no tiles of the recurrent", "stepwise"),
    ],
)
def test_why_there_is_no_plan_and_what_is_chosen_instead(fields, gpu, reason, instead):
    report = report_of(layer(**fields), Target(GPUS[gpu]))
    assert report.choice.name == instead
    for found in report.plans.values():
        assert found.plan is None and reason in found.why_none
        assert explain.pass_rows(layer(**fields), "forward", found, report) == [
            ("plan", "none"),
            ("why", found.why_none),
        ]
    assert report.call_us["persistent"] is None
    assert {by_engine["persistent"] for by_engine in report.step_us.values()} == {None}


def test_a_plan_that_is_not_chosen_says_how_to_take_it():
    report = report_of(layer(64, T=1))
    assert report.choice.name == "cudnn" and "a single time step reads the weights once" in report.choice.reason
    assert report.plans["forward"].obstacle == "cudnn is chosen; strategy='persistent' takes this plan"


def test_a_plan_of_one_pass_does_not_run_where_the_other_has_none(monkeypatch):
    def no_backward(layer, backward, *rest):
        return "there is no room" if backward else ranked_plans(layer, backward, *rest)

    monkeypatch.setattr(routing, "ranked_plans", no_backward)
    monkeypatch.setattr(explain, "ranked_plans", no_backward)
    routing._kernels.cache_clear()
    routing.persistent_or_cudnn.cache_clear()
    report = report_of(layer(769))
    assert report.plans["forward"].obstacle == "backward pass: there is no room"
    assert report.plans["backward"].why_none == "there is no room"


# Estimates.


@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("gpu", ["h100", "l4"])
def test_the_estimates_are_those_the_choice_rests_on(gpu, D):
    asked, gpu = layer(384, 24, I=100, T=70, D=D, dtype="tf32", variant="coupled"), GPUS[gpu]
    report = report_of(asked, Target(gpu))
    engines = {"persistent": "persistent", "stepwise": "stepwise", "cudnn": "operator"}
    for key, engine in engines.items():
        for name, backward in PASSES.items():
            assert report.step_us[name][key] == estimates.pass_us(engine, asked, backward, gpu)
        assert report.step_us["both"][key] == pytest.approx(estimates.estimate_us(engine, asked, gpu))
    assert report.call_us == {
        "persistent": estimates.call_us("persistent", asked, gpu),
        "cudnn": estimates.call_us("operator", asked, gpu),
    }
    for name, training in (("forward", False), ("both", True)):
        least = D * least_us_per_step(asked._replace(training=training), nominal_constants(gpu))
        assert report.step_us[name]["limit"] == pytest.approx(least)
    assert "limit" not in report.step_us["backward"]


def test_inference_has_one_pass_and_a_peephole_no_cudnn():
    report = report_of(layer(training=False))
    assert list(report.step_us) == list(report.plans) == list(report.cudnn) == ["forward"]
    peephole = report_of(layer(variant="diagonal"))
    assert peephole.cudnn == {} and peephole.call_us["cudnn"] is None and "cudnn" not in peephole.step_us["forward"]
    assert report_of(layer(64, P=8)).step_us["both"]["limit"] > 0


def test_the_table_of_estimates():
    asked = layer(T=512, dtype="float16")
    report = report_of(asked)
    table = explain.estimates_text(asked, report).splitlines()
    assert table[0].split() == ["estimates", "persistent", "stepwise", "cuDNN", "least", "possible"]
    both = report.step_us["both"]
    assert table[4].startswith("both, 512 steps") and plan_words.time(both["cudnn"] * 512) in table[4]
    assert plan_words.time(report.call_us["persistent"]) in table[5]
    assert "cuDNN's algorithm: persistent forward, persistent backward." in table
    peephole = str(explain.explain(layer(variant="full"), [H100]))
    assert "cuDNN cannot compute this call: it has no peepholes, as 'full' has." in peephole


# Devices.


def test_names_are_taken_in_any_spelling_and_once():
    assert [gpu_key(text) for text in ("H100", "RTX 4090", "rtx-4090", "l40S", "RTX_5090")] == [
        "h100", "rtx4090", "rtx4090", "l40s", "rtx5090",
    ]  # fmt: skip
    assert {"h200", "a10", "l40s", "rtx3090", "rtx5090"} <= GPUS.keys()
    assert explain.targets(["L4", "h100", "l4"]) == ([Target(GPUS["l4"]), H100], None)
    assert [target.gpu for target in explain.targets(["ALL", "h100"])[0]] == list(GPUS.values())
    with pytest.raises(ValueError, match="unknown GPU 'v100': choose from a100, a10, "):
        explain.targets(["h100", "v100"])


def test_without_a_device_one_is_assumed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    chosen, note = explain.targets([])
    assert chosen == [H100]
    assert note == "There is no CUDA device here. The plan is for H100 SXM; --gpu chooses another GPU."


def test_the_device_that_is_here(cuda_device, monkeypatch):
    (target,), note = explain.targets([])
    assert (target.gpu, str(target.device), note) == (cuda_device, "cuda:1", None)
    report = report_of(layer(), target)
    assert (report.device, report.choice.name) == ("A100 of a test", "persistent")
    assert "on 100 multiprocessors" in plan_words.grid(report.plans["forward"].plan, cuda_device)
    assert report_of(layer(4096), target).choice.name == "cudnn"
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert report_of(layer(4096), target).choice.name == "stepwise"


def test_the_backend_that_was_asked_for_decides_on_the_device_that_is_here(cuda_device, monkeypatch):
    (target,), _ = explain.targets([])
    with routing.backend("torch"):
        assert report_of(layer(), target).choice == ("cudnn", "asked for")
        assert report_of(layer(), H100).choice.name == "persistent"
        peephole = report_of(layer(variant="diagonal"), target)
        assert peephole.choice == ("eager", "asked for") and peephole.plans["forward"].obstacle == "asked for"
    with routing.backend("triton"):
        assert report_of(layer(4096), target).choice.name == "stepwise"
    monkeypatch.setattr(routing, "FROM_ENVIRONMENT", "tpu")
    assert report_of(layer(), target).choice.name == "none"


def test_a_device_that_is_too_old(cuda_device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    (target,), _ = explain.targets([])
    choice = report_of(layer(), target).choice
    assert choice.name == "cudnn" and "compute capability 7.5" in choice.reason


# LSTM.explain


def test_a_module_explains_a_call_on_a_gpu_that_is_not_here():
    lstm = lstm_triton.LSTM(30, 64, 2, batch_first=True, bidirectional=True, coupled=True).to(torch.bfloat16)
    x = torch.randn(5, 100, 30, dtype=torch.bfloat16)
    asked = layer(64, B=5, T=100, I=30, D=2, L=2, variant="coupled")
    assert lstm.explain(x, gpu="H 100").to_dict() == explain.explain(asked, [H100]).to_dict()
    with torch.no_grad():
        inference = asked._replace(training=False)
        assert lstm.explain(x, gpu="l4") == explain.explain(inference, [Target(GPUS["l4"])])
    ragged = lstm.explain(x, lengths=[100, 3, 1, 2, 7], gpu="h100")
    assert ragged.layer.ragged and "cuDNN cannot compute this call: torch.nn.LSTM's operator takes no lengths." in str(
        ragged
    )
    assert not lstm.explain(x, lengths=[100] * 5, gpu="h100").layer.ragged
    lstm.strategy = "stepwise"
    assert lstm.explain(x, gpu="h100").reports[0].choice == ("stepwise", "asked for")


def test_a_module_explains_a_call_where_it_is():
    lstm = lstm_triton.LSTM(30, 64, peephole="diagonal")
    found = lstm.explain(torch.randn(7, 2, 30))
    (report,) = found.reports
    assert (report.device, report.gpu, report.choice.name) == ("cpu", None, "eager")
    assert report.choice.reason == routing.ON_CPU and routing.ON_CPU in str(found)
    assert "gpu=" in str(found)
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(4, 30), torch.randn(2, 30)])
    assert lstm.explain(packed).layer == layer(64, B=2, T=4, I=30, dtype="float32", variant="diagonal", ragged=True)
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size. Expected 30, got 31"):
        lstm.explain(torch.randn(7, 2, 31))
    with pytest.raises(ValueError, match="unknown GPU"):
        lstm.explain(torch.randn(7, 2, 30), gpu="tpu")


def test_a_type_without_kernels_has_no_plan_and_no_estimate():
    lstm, x = lstm_triton.LSTM(3, 4, dtype=torch.complex64), torch.randn(5, 2, 3, dtype=torch.complex64)
    (report,) = lstm.explain(x, gpu="h100").reports
    assert report.choice == ("operator", routing.why_not_dtype(torch.complex64))
    assert not (report.step_us or report.plans) and "complex64" in str(lstm.explain(x, gpu="h100"))


def test_explaining_is_routing(monkeypatch):
    """What `explain` says is what the call itself asks the router."""
    seen = []
    genuine = routing.route
    monkeypatch.setattr(routing, "route", lambda *arguments: seen.append(arguments) or genuine(*arguments))
    lstm = lstm_triton.LSTM(3, 4, 2, peephole="full", output_peephole="current", batch_first=True)
    x, lengths, resets = torch.randn(2, 5, 3), torch.tensor([5, 2]), torch.zeros(2, 5, dtype=torch.bool)
    for options in ({}, dict(lengths=lengths), dict(resets=resets), dict(return_cell_states=True)):
        lstm(x, **options)
        lstm.explain(x, **options)
        call, explained = seen[-2:]
        assert call == explained


# A plan in words.

ASKED = {
    "bf16": layer(500),
    "coupled": layer(300, B=1, dtype="tf32", variant="coupled"),
    "full": layer(200, B=200, dtype="float16", variant="full", D=2),
    "many rows": layer(64, B=5000, variant="diagonal+current"),
    "many units": layer(760, dtype="float16"),
    "exact": layer(400, dtype="float32"),
    "full exact": layer(130, B=200, dtype="float32", variant="full", D=2),
    "streamed": layer(1840, B=12, dtype="tf32", variant="coupled"),
    "streamed in turns": layer(1856, B=33, dtype="tf32"),
    "alone": layer(16, B=8192, dtype="float32", variant="diagonal+current"),
}


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name, backward", PASSES.items())
@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED.keys())
def test_the_words_say_what_the_plan_says(asked, name, backward, gpu):
    gpu = GPUS[gpu]
    plan = plan_of(asked, backward, gpu)
    said = dict(plan_words.rows(asked, backward, plan, gpu))

    programs, units, row_groups, directions, multiprocessors = numbers(said["grid"])[:5]
    assert programs == units * row_groups * directions == plan.programs
    assert (units, row_groups, directions) == (plan.unit_programs, plan.row_programs, asked.D)
    assert multiprocessors == gpu.multiprocessors
    assert ("all run at once" in said["grid"]) == (programs <= plan.together * multiprocessors)
    assert plan.alone or "all run at once" in said["grid"]

    assert numbers(said["tile"])[:3] == [plan.block_u, plan.block_b, asked.H]
    if plan.unit_programs > 1:
        assert numbers(said["tile"])[3:5] == [plan.unit_programs, plan.block_u]
    assert numbers(said["batch rows"])[:4] == [asked.B, plan.row_blocks, min(plan.rows, asked.B), plan.block_b]
    assert numbers(said["threads"]) == [plan.num_warps, 32 * plan.num_warps]
    assert f"{plan.columns} columns" in said["product"]
    assert plan.columns >= asked.H * (asked.gates if backward and not plan.alone else 1)
    if not plan.alone:
        assert numbers(said["product"])[:4] == [plan.chunks, plan.parts, plan.block_k, plan.columns]
        partly = f"{plan.group} loaded at a time" if plan.group < plan.chunks else "all chunks loaded at once"
        assert (partly in said["product"]) == (plan.chunks > 1)
        assert ("of h and of c" in said["product"]) == (asked.spec.full and not (backward or plan.exact))
    assert said["product"].endswith("without tensor cores" if plan.exact else "on tensor cores")
    assert said["wait"].startswith(f"{plan.wait or 'none'}: ")
    assert (f" {plan.pause} clocks" in said["wait"]) == (plan.pause > 0)

    used, limit = re.findall(r"([\d.]+) KiB", said["shared memory"])
    assert float(used) == pytest.approx(plan.shared_bytes / 1024, abs=0.06)
    assert float(used) <= float(limit) == gpu.shared_bytes / 1024
    stay = plan.tile_bytes * (plan.chunks - plan.streamed) // plan.chunks
    if stay == 0:
        assert said["weights"].startswith(f"none of {plan_words.size(plan.tile_bytes)} stay in a thread block: ")
        resident = 0.0
    else:
        words = re.match(r"([\d.]+) KiB (?:of \S+ \w+ )?stay in a thread block, ", said["weights"])
        resident = float(words[1]) * 1024
    assert resident == pytest.approx(stay, abs=52)
    in_shared_memory = plan.tile_bytes if plan.exact else plan.tile_bytes * plan.kept / plan.chunks
    assert ("registers" in said["weights"]) == (in_shared_memory < stay)
    assert ("stream" in said) == (plan.streamed > 0)
    if plan.streamed:
        rows = 0.75 if asked.spec.coupled and not backward else 1.0  # the others are zero
        streamed = rows * plan.tile_bytes * plan.streamed // plan.chunks * plan.unit_programs * asked.D
        assert f"the rest, {plan_words.size(int(streamed))} of all thread blocks, streams " in said["stream"]
        assert ("each block of rows" in said["stream"]) == (plan.blocks_per_program > 1)
        assert ("device memory" in said["stream"]) == (plan.beyond_l2 > 0)
        assert ("the L2 cache" in said["stream"]) == (plan.beyond_l2 < plan.streamed)
    assert ("shared memory" in said["weights"]) == (in_shared_memory > 0)
    registers, most = numbers(said["registers"])
    assert registers == plan.register_bytes // (1 if plan.exact else 4) <= most
    assert said["estimate"] == f"{plan_words.time(plan.estimate_us)} a step"


def test_the_plans_of_those_words_are_of_all_kinds():
    """Test of the test."""
    plans = [plan_of(a, backward, gpu) for a in ASKED.values() for gpu in GPUS.values() for backward in PASSES.values()]
    gluon = [plan for plan in plans if not plan.exact]
    assert {plan.wait for plan in plans if plan.exact} == {"counter", "data", None}
    assert {plan.together for plan in gluon} == {1, 2} and {plan.pause > 0 for plan in gluon} == {False, True}
    assert {0 < plan.kept < plan.chunks for plan in gluon} == {plan.kept > 0 for plan in gluon} == {False, True}
    assert {plan.group < plan.chunks for plan in gluon} == {False, True}
    assert any(plan.programs > 132 for plan in plans if plan.alone)


def test_units_and_rows_that_do_not_divide():
    asked = layer(501, B=16 * 200 + 5)
    said = dict(plan_words.rows(asked, False, plan_of(asked), GPUS["h100"]))
    _, _, H, parts, part, last = numbers(said["tile"])
    assert (parts - 1) * part + last == H == 501
    batch, blocks, used, _, last, _ = numbers(said["batch rows"])
    assert (blocks - 1) * used + last == batch == 3205


@pytest.mark.parametrize("count, text", [(1, "1 byte"), (1023, "1,023 bytes"), (1024, "1 KiB"), (3 << 19, "1.5 MiB")])
def test_bytes_with_units(count, text):
    assert plan_words.size(count) == text


@pytest.mark.parametrize(
    "us, text",
    [(None, "-"), (1.234, "1.23 us"), (123.4, "123 us"), (1234.0, "1.23 ms"), (12_345_678.0, "12,346 ms")],
)
def test_times_with_units(us, text):
    assert plan_words.time(us) == text


# Any layer, as data and as text.

SIZES = st.integers(1, 5000)


@settings(max_examples=60, deadline=None)
@given(
    H=SIZES, B=SIZES, T=SIZES, D=st.integers(1, 2), L=st.integers(1, 3), dtype=st.sampled_from(list(DTYPES)),
    variant=st.sampled_from([spec.name for spec in VARIANTS]), projected=st.booleans(), training=st.booleans(),
    ragged=st.booleans(), gpu=st.sampled_from(list(GPUS)),
)  # fmt: skip
def test_any_layer_on_any_gpu_is_explained(projected, gpu, H, **fields):
    asked = layer(H, P=H // 2 if projected else 0, **fields)
    found = explain.explain(asked, [Target(GPUS[gpu])])
    text = found.text(width=70)
    wrapped = [line for line in text.splitlines() if line.startswith("  ")]
    assert max(map(len, wrapped)) <= 70
    words = " ".join(text.split())
    (device,) = json.loads(json.dumps(found.to_dict()))["devices"]
    for name, plan in device["plans"].items():
        assert (plan["plan"] is None) == (plan["why_none"] is not None)
        assert plan["runs"] == (device["engine"] == "persistent")
        assert f"{name} pass" in text
        if plan["plan"]:
            assert plan["plan"]["summary"] in words
    assert device["reason"] in words


@pytest.mark.parametrize("size", [1, cli.LARGEST_SIZE])
def test_the_smallest_and_the_largest_sizes_are_explained(size):
    asked = layer(size, size, size, "float16", D=2)
    assert str(explain.explain(asked, explain.targets(["all"])[0])).count("forward pass") == len(GPUS)


# The program.


def test_info_of_a_layer(program):
    code, output, errors = program("info", "--hidden=768", "--batch=16", "--dtype=BF16", "--gpu=H100")
    assert (code, errors) == (0, "")
    assert output == f"{explain.explain(layer(), [H100])}\n"
    code, output, _ = program("info", "--hidden=768", "--dtype=bfloat16", "--gpu=h100", "--json")
    found = json.loads(output)
    assert found.pop("versions")["torch"] == torch.__version__
    assert found == json.loads(json.dumps(explain.explain(layer(), [H100]).to_dict()))


def test_every_option_reaches_the_layer(program, monkeypatch):
    seen = []
    genuine = explain.explain
    monkeypatch.setattr(explain, "explain", lambda *a, **o: seen.append((*a, o)) or genuine(*a, **o))
    options = ["--batch=3", "--input=5", "--steps=7", "--layers=4", "--bidirectional", "--dtype=tf32"]
    options += ["--variant=Full", "--proj=2", "--inference", "--packed", "--gpu=l4", "--gpu=RTX 3090"]
    assert program("info", "--hidden=9", *options)[0] == 0
    assert program("info", "--hidden=9", "--gpu=l4")[0] == 0
    sizes = dict(I=5, D=2, P=2, L=4, training=False, ragged=True)
    expected = layer(9, 3, 7, "tf32", "full", **sizes)
    assert seen[0][:2] == (expected, [Target(GPUS["l4"]), Target(GPUS["rtx3090"])])
    assert seen[1][:2] == (layer(9, dtype="float32"), [Target(GPUS["l4"])])
    assert (seen[0][2]["packed"], seen[1][2]["packed"]) == (True, False)


def test_lengths_keep_cudnn_out_and_packed_rows_do_not(program):
    for option, engine in (("--packed", "cudnn"), ("--lengths", "stepwise")):
        output = program("info", "--hidden=64", "--dtype=float64", "--gpu=h100", "--json", option)[1]
        assert json.loads(output)["devices"][0]["engine"] == engine


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_plans_are_compiled_for_a_gpu_that_is_not_here(program, dtype):
    options = ["--hidden=136", f"--dtype={dtype}", "--gpu=h100", "--inference", "--compile", "--json"]
    code, output, errors = program("info", *options)
    assert (code, errors) == (0, "")
    rows = json.loads(output)["devices"][0]["plans"]["forward"]["compiled"]
    plans = ranked_plans(layer(136, dtype=dtype, training=False), False, GPUS["h100"])
    assert [row["plan"] for row in rows] == [plan.describe() for plan in plans[:4]]
    assert all(0 < row["registers"] <= 255 for row in rows) and sum(row["used"] for row in rows) == 1


def test_what_does_not_fit_as_compiled_is_not_used(monkeypatch):
    """Two thread blocks that share a multiprocessor, whatever was estimated."""
    from lstm_triton_kernels import sequence_persistent
    from lstm_triton_kernels.settle import Usage

    plans = [replace(plan, together=2) for plan in ranked_plans(layer(), False, GPUS["h100"])[:3]]
    shared = [114 * 1024, 113 * 1024, 1024]
    monkeypatch.setattr(explain, "ranked_plans", lambda *_: plans)
    monkeypatch.setattr(sequence_persistent, "usages", lambda *_: [Usage(128, 0, size) for size in shared])
    report = report_of(layer(training=False), compiling=True)
    assert [row.used for row in report.plans["forward"].compiled] == [False, True, False]
    shown = dict(explain.pass_rows(layer(), "forward", report.plans["forward"], report))
    assert shown["compiled"].endswith("128 registers, 0 spilled, 1 KiB of shared memory")


def test_compiling_needs_triton(program, monkeypatch):
    monkeypatch.setattr(routing, "TRITON_INSTALLED", False)
    code, output, errors = program("info", "--hidden=136", "--gpu=h100", "--compile")
    assert (code, output, errors) == (1, "", "error: compiling needs triton (pip install triton)\n")


def test_info_without_a_layer(program):
    code, output, _ = program("info")
    assert code == 0 and output.startswith("versions\n") and routing.ON_CPU in output and "pass" not in output
    found = json.loads(program("info", "--json")[1])
    assert found["versions"]["lstm_triton"] == lstm_triton.__version__
    assert found["devices"]["cpu"]["backend"] == "torch"


def test_version_and_help(program):
    assert program("--version")[:2] == (0, f"lstm-triton {lstm_triton.__version__}\n")
    for arguments in ((), ("--help",), ("info", "--help")):
        code, output, _ = program(*arguments)
        assert code == 0 and "examples:\n  lstm-triton info " in output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--hidden=8", "--dtype=float8"], "unknown dtype 'float8': choose from bfloat16, float16, "),
        (["--hidden=8", "--variant=peephole"], "unknown variant 'peephole': choose from standard, diagonal, "),
        (["--hidden=8", "--gpu=v100"], "unknown GPU 'v100': choose from a100, "),
        (["--hidden=8", "--proj=8"], "--proj must be smaller than --hidden 8, got 8"),
        (["--batch=8", "--gpu=h100"], "--batch, --gpu: add --hidden N"),
        (["--inference", "--lengths", "--compile"], "--inference, --lengths, --compile: add --hidden N"),
        (["--hidden=0"], "argument --hidden: '0' is not an integer from 1 to 2**31 - 1"),
        (["--hidden=many"], "argument --hidden: "),
        (["--hidden=8", "--batch=-1"], "--batch"),
        ([f"--hidden={10**400}"], "argument --hidden: "),
        (["--hidden=8", "--units=2"], "usage: lstm-triton info"),
        (["--hidden=8", "--units=2"], "unrecognized arguments: --units=2"),
    ],
)
def test_bad_options(program, arguments, message):
    code, output, errors = program("info", *arguments)
    assert (code, output) == (2, "") and message in errors, errors
