"""What `lstm-triton info --hidden N` says of a layer."""

import re
from dataclasses import replace
from io import StringIO

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lstm_triton_kernels.gpus import GPUS, nominal_constants
from lstm_triton_kernels.limit import least_us_per_step
from lstm_triton_kernels.plan import Preference
from lstm_triton_kernels.planner import ranked_plans
from lstm_triton_kernels.tensor_core_plan import fits
from rich.console import Console

from lstm_triton import VARIANTS, cli, routing
from lstm_triton.cli import app, explain, info
from lstm_triton.cli.errors import UserError

H100 = explain.Target(GPUS["h100"])
BF16 = explain.question(768, dtype="bf16")
PASSES = {"forward": False, "backward": True}


@pytest.fixture(autouse=True)
def nothing_asked_for(monkeypatch):
    monkeypatch.setattr(routing, "FROM_ENVIRONMENT", "auto")


@pytest.fixture
def program(capsys):
    """Run `lstm-triton info` in this process: exit code, stdout, stderr."""

    def run(*arguments):
        with pytest.raises(SystemExit) as exit_info:
            cli.main(["info", *arguments])
        return exit_info.value.code, *capsys.readouterr()

    return run


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


def facts(asked, target=H100, backward=False):
    return dict(explain.pass_facts(asked, target, backward))


def plan_of(asked, target=H100, name="forward"):
    plans = ranked_plans(asked, PASSES[name], target.gpu)
    assert not isinstance(plans, str), plans
    return plans[0]


def numbers(text):
    return [int(number) for number in re.findall(r"\d+", text)]


def cells(output):
    """The rows of all printed tables: name to text, wrapped lines joined; later tables win."""
    found, name = {}, ""
    for line in output.splitlines():
        parts = [part.strip() for part in line.split("│")]
        if len(parts) == 4:
            name = parts[1] or name
            found[name] = f"{found[name]} {parts[2]}" if not parts[1] else parts[2]
    return found


# A plan in words


ASKED = {
    "bf16": explain.question(500, dtype="bf16"),
    "coupled": explain.question(300, batch=1, dtype="tf32", variant="coupled"),
    "full": explain.question(200, batch=200, dtype="fp16", variant="full", bidirectional=True),
    "many rows": explain.question(64, batch=5000, dtype="bf16", variant="diagonal+current"),
    "many units": explain.question(760, dtype="fp16"),
    "exact": explain.question(400, dtype="fp32"),
    "full exact": explain.question(130, batch=200, dtype="fp32", variant="full", bidirectional=True),
    "alone": explain.question(16, batch=8192, dtype="fp32", variant="diagonal+current"),
}


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name, backward", PASSES.items())
@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED.keys())
def test_the_words_say_what_the_plan_says(asked, name, backward, gpu):
    target = explain.Target(GPUS[gpu])
    plan = plan_of(asked, target, name)
    layer, said = asked, facts(asked, target, backward)
    others = ranked_plans(asked, backward, target.gpu)[1:4]
    assert all(other.describe() in said["then"] for other in others) and "without spilling" in said["then"]

    programs, units, rows, directions, multiprocessors = numbers(said["programs"])[:5]
    assert programs == units * rows * directions == plan.programs
    assert (units, rows, directions) == (plan.unit_programs, plan.row_programs, layer.D)
    assert multiprocessors == target.gpu.multiprocessors
    room = plan.together * multiprocessors
    assert ("all run at once" in said["programs"]) == (programs <= room)
    assert (f"room for {plan.together} programs" in said["programs"]) == (plan.together > 1)
    assert plan.alone or programs <= room

    assert numbers(said["tile"]) == [plan.block_u, plan.block_b]
    if plan.unit_programs > 1:
        assert numbers(said["units"])[:3] == [layer.H, plan.unit_programs, plan.block_u]
    else:
        assert said["units"].startswith(f"every program holds all {layer.H}")
    assert numbers(said["rows"])[:4] == [layer.B, plan.row_blocks, min(plan.rows, layer.B), plan.block_b]
    assert numbers(said["warps"]) == [plan.num_warps, 32 * plan.num_warps]
    columns = plan.chunks * plan.parts * plan.block_k
    assert columns >= layer.H * (len(layer.spec.gates) if backward and not plan.alone else 1)
    assert f"{columns} columns" in said["product"]
    if not plan.alone:
        assert numbers(said["product"])[:4] == [plan.chunks, plan.parts, plan.block_k, columns]
        read_at_once = f"{plan.group} read at a time" if plan.group < plan.chunks else "all chunks read at once"
        assert (read_at_once in said["product"]) == (plan.chunks > 1)
    both = layer.spec.full and not (backward or plan.exact)
    assert (f"H = {layer.H} of h and of c" in said["product"]) == both
    assert said["product"].endswith("without tensor cores" if plan.exact else "on tensor cores")
    assert said["wait"].startswith(f"{plan.wait or 'none'}: ")
    assert ("one program holds all units" in said["wait"]) == plan.alone
    assert ("for the first time" in said["wait"]) == (plan.pause > 0)
    assert f" {plan.pause} clocks" in said["wait"] or plan.pause == 0

    used, limit = re.findall(r"([\d.]+) KiB", said["shared memory"])
    assert float(used) == pytest.approx(plan.shared_bytes / 1024, abs=0.06)
    assert float(limit) == target.gpu.shared_bytes / 1024
    assert float(used) <= float(limit)

    resident = float(re.match(r"([\d.]+) KiB stay in a program, ", said["weights"])[1]) * 1024
    weights = layer.H * layer.H * (len(layer.spec.gates) + 3 * layer.spec.full) * layer.dtype.itemsize
    assert weights <= resident * plan.unit_programs * 1.001
    in_shared_memory = plan.tile_bytes if plan.exact else plan.tile_bytes * plan.kept / plan.chunks
    assert in_shared_memory < plan.shared_bytes
    assert ("registers" in said["weights"]) == (in_shared_memory < plan.tile_bytes)
    assert ("shared memory" in said["weights"]) == (in_shared_memory > 0)

    registers, most = numbers(said["registers"])
    assert 0 < registers <= most
    assert registers == plan.register_bytes // (1 if plan.exact else 4)
    assert said["estimate"].startswith(f"{plan.estimate_us:.2f} us a step")


def test_the_plans_of_those_words_are_of_all_kinds():
    """Test of the test."""
    targets = [explain.Target(gpu) for gpu in GPUS.values()]
    plans = [plan_of(asked, target, name) for asked in ASKED.values() for target in targets for name in PASSES]
    gluon = [plan for plan in plans if not plan.exact]
    assert {plan.wait for plan in plans if plan.exact} == {"counter", "data", None}
    assert {plan.together for plan in gluon} == {1, 2} and {plan.pause > 0 for plan in gluon} == {False, True}
    assert {0 < plan.kept < plan.chunks for plan in gluon} == {plan.kept > 0 for plan in gluon} == {False, True}
    assert {plan.group < plan.chunks for plan in gluon} == {False, True}
    assert any(plan.programs > 132 for plan in plans if plan.alone)


@pytest.mark.parametrize(
    "options, backward, per_unit, padded, accumulators",
    [
        (dict(hidden=500), False, 4, 512 * 4, 4),
        (dict(hidden=500), True, 4, 2048, 1),
        (dict(hidden=500, variant="coupled+full"), False, 3 + 2, 512 * 4 * 2, 4),
        (dict(hidden=500, variant="coupled+full"), True, 3 + 2, 1536 * 2, 2),
    ],
)
def test_what_a_program_keeps(options, backward, per_unit, padded, accumulators):
    """A stack of gates is four columns to a unit; backward, the columns of the product are those of all gates."""
    for dtype, element_bytes in (("fp32", 4), ("bf16", 2)):
        asked = explain.question(**options, dtype=dtype)
        plan = plan_of(asked, name="backward" if backward else "forward")
        said = facts(asked, backward=backward)
        assert plan.tile_bytes == padded * plan.block_u * element_bytes
        assert said["weights"].startswith(f"{plan.tile_bytes / 1024:g} KiB stay in a program")
        in_layer = per_unit * 500 * 500 * element_bytes / 2**20
        assert said["weights"].endswith(f"{in_layer:.1f} MiB in the layer")
        if dtype == "fp32":
            elements = (accumulators * plan.parts + len(asked.spec.gates)) * plan.block_b * plan.block_u
            assert numbers(said["registers"])[0] == elements * 4 // (plan.num_warps * 32)
        else:
            held = plan.tile_bytes * (plan.chunks - plan.kept) // plan.chunks // plan.num_warps
            operands = plan.group * plan.block_b * 64
            added = accumulators * plan.block_u * plan.block_b * 4
            twice = 2 if accumulators * plan.block_u * plan.block_b <= 128 else 1  # of a single tile there are two
            assert numbers(said["registers"])[0] == (held + operands + twice * added) // (4 * 32)


@pytest.mark.parametrize(
    "kept, where",
    [
        (0, "in its registers"),
        (2, "64 KiB of them in its shared memory, the rest in its registers"),
        (3, "in its shared memory"),
    ],
)
def test_where_the_weights_of_a_program_are(kept, where):
    plan = next(plan for plan in ranked_plans(BF16, False, GPUS["h100"]) if (plan.block_u, plan.chunks) == (16, 3))
    text = explain.weights_words(BF16, replace(plan, kept=kept))
    assert text == f"96 KiB stay in a program, {where}: its units of 4 gates; 4.5 MiB in the layer"


@pytest.mark.parametrize("together, registers", [(1, 255), (2, 128)])
def test_programs_that_share_a_multiprocessor(together, registers):
    """They are many more than multiprocessors, run at once all the same, and have fewer registers."""
    (plan, *_) = ranked_plans(BF16, False, GPUS["h100"])
    plan = replace(plan, together=together, unit_programs=96, row_programs=together, num_warps=8)
    room = "; the GPU has 132 multiprocessors" + (", each with room for 2 programs" if together == 2 else "")
    assert explain.programs_words(plan, GPUS["h100"]).endswith(f"{room}, so all run at once")
    of_thread = f" of {registers} in a thread, for weights, operands and accumulators"
    assert explain.registers_words(plan).endswith(of_thread)
    shared = 113 * 1024  # with what is reserved for each, 228 KiB for two
    assert fits(together, shared, GPUS["h100"])
    assert fits(together, shared + 1, GPUS["h100"]) == (together == 1)
    assert not fits(together, GPUS["h100"].shared_bytes + 1, GPUS["h100"])


def test_alone_on_more_programs_than_multiprocessors():
    asked = explain.question(32, batch=8192, dtype="fp32")
    plan = plan_of(asked)
    assert plan.alone and plan.programs > 132
    assert "so some share one or run after others" in facts(asked)["programs"]
    assert facts(asked)["wait"] == "none: one program holds all units"


@pytest.mark.parametrize(
    "options, backward, how",
    [
        (dict(hidden=250, batch=4), False, "data: a program reads h until nothing is missing"),
        (dict(hidden=250, batch=4, variant="full"), False, "data: a program reads h and c until"),
        (dict(hidden=250, batch=1), True, "data: a program reads gradients until"),
        (dict(hidden=1000), False, "counter: a program counts up when it has stored its part"),
        (dict(hidden=760), True, "counter: a program counts up"),
    ],
)
def test_how_programs_wait_and_what_the_other_way_would_take(options, backward, how):
    asked = explain.question(**options, dtype="fp32")
    said = facts(asked, backward=backward)["wait"]
    other = "counter" if how.startswith("data") else "data"
    estimate = ranked_plans(asked, backward, GPUS["h100"], Preference(wait=other))[0].estimate_us
    assert said.startswith(how) and said.endswith(f"; by estimate a step with {other} takes {estimate:.2f} us")


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "tf32"])
@pytest.mark.parametrize(
    "options, backward, values, pause",
    [
        (dict(hidden=250, batch=64), False, "h", True),
        (dict(hidden=250, batch=64, variant="full"), False, "h and c", True),
        (dict(hidden=250, batch=64), True, "gradients", True),
        (dict(hidden=250, batch=1), True, "gradients", False),
        (dict(hidden=250, batch=5000), False, "h", False),
        (dict(hidden=12, batch=400), True, "gradients", True),  # one program holds all units
    ],
)
def test_on_tensor_cores_every_warp_waits_by_the_data(options, backward, values, pause, dtype):
    asked = explain.question(**options, dtype=dtype)
    said = facts(asked, backward=backward)["wait"]
    clocks = plan_of(asked, name="backward" if backward else "forward").pause
    first = f", for the first time {clocks} clocks after its program has stored" if pause else ""
    assert said == f"data: a warp reads {values} until nothing is missing{first}"


def test_a_wait_without_an_alternative_says_so(monkeypatch):
    monkeypatch.setattr(explain, "ranked_plans", lambda *_: "none")
    asked = explain.question(768, dtype="fp32")
    plan = plan_of(asked, name="forward")
    assert plan.wait == "data"
    assert explain.wait_words(asked, False, plan, GPUS["h100"]).endswith("; no plan with counter fits")


def test_units_and_rows_that_do_not_divide():
    said = facts(explain.question(501, batch=16 * 200 + 5, dtype="bf16"))
    parts, part, last = numbers(said["units"])[1:]
    assert (parts - 1) * part + last == 501
    batch, blocks, used, _, last, _ = numbers(said["rows"])
    assert (blocks - 1) * used + last == batch == 3205


def test_exact_float32_uses_no_tensor_cores():
    assert facts(explain.question(200, dtype="fp32"))["product"].endswith("without tensor cores")
    assert facts(explain.question(200, dtype="tf32"))["product"].endswith("on tensor cores")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("directions", [1, 2])
def test_the_limit_is_that_of_the_model(training, directions):
    both = directions == 2
    asked = explain.question(384, 24, inputs=100, steps=7, bidirectional=both, dtype="tf32", variant="coupled+full")
    least = directions * least_us_per_step(asked._replace(training=training), nominal_constants(GPUS["l4"]))
    said = facts(asked, explain.Target(GPUS["l4"]), backward=training)["limit"]
    passes = "forward and backward together" if training else "forward alone"
    assert said.startswith(f"{least:.2f} us a step at least, {passes}")
    assert said.endswith("from data sheet and assumptions, nothing measured")


# Which strategy, and why


def test_the_engine_and_its_reason_are_those_of_the_router():
    for hidden in (1, 500, 768, 4096):
        for target in map(explain.Target, GPUS.values()):
            for variant in ("standard", "coupled", "full+current"):
                asked = explain.question(hidden, dtype="bf16", variant=variant)
                no_operator = routing.why_not_operator(torch.device("cuda"), asked, ())
                name, reason = routing.decide(routing.Facts(asked, target.gpu, no_operator=no_operator))
                said = dict(explain.engine_facts(asked, target))
                assert said["auto takes"].startswith(f"{name}: ")
                assert said["why"] == reason
                assert (facts(asked, target).get("runs") == "yes") == (name == "persistent")


@pytest.mark.parametrize(
    "options, gpu, reason, instead",
    [
        (
            dict(hidden=4096, batch=4096, dtype="bf16"),
            "h100",
            "no tiles of the recurrent weights, 128.0 MiB, fit",
            "operator",
        ),
        (dict(hidden=2000, dtype="fp32", variant="coupled"), "l4", "no tiles of the recurrent weights", "operator"),
        (dict(hidden=2000, dtype="fp32", variant="diagonal"), "l4", "no tiles of the recurrent weights", "stepwise"),
        (dict(hidden=64, dtype="float64"), "rtx4090", "float64 has no persistent kernel", "operator"),
        (dict(hidden=64, dtype="fp64", variant="diagonal"), "a100", "float64 has no persistent kernel", "stepwise"),
        (dict(hidden=64, variant="coupled+full+current"), "h100", "a full peephole on c_t needs a product", "stepwise"),
        (dict(hidden=64, proj=8), "b200", "a projection needs a product between two steps", "operator"),
        (dict(hidden=64, proj=8, variant="coupled"), "b200", "a projection needs a product", "operator"),
        (dict(hidden=4096, proj=8, variant="coupled+diagonal"), "h100", "a projection needs a product", "stepwise"),
    ],
)
def test_why_there_is_no_plan_and_what_runs_instead(options, gpu, reason, instead):
    for backward in (False, True):
        said = facts(explain.question(**options), explain.Target(GPUS[gpu]), backward)
        assert list(said) == ["plan", "why", "instead", "limit"]
        assert said["plan"] == "there is no persistent plan"
        assert said["why"].startswith(reason) or reason in said["why"]
        assert said["instead"].startswith(f"{instead}: ")
        assert said["limit"].startswith("none: ") == ("proj" in options)


def test_a_plan_that_auto_does_not_take_is_shown_and_said_to_wait_for_a_wish():
    asked = explain.question(64, steps=1, dtype="bf16")
    assert dict(explain.engine_facts(asked, H100))["why"].endswith(
        "a single step reads the weights once, whatever computes it"
    )
    said = facts(asked)
    assert said["runs"].startswith("not with auto, which takes operator")
    assert "programs" in said


def test_a_plan_of_one_pass_does_not_run_where_the_other_has_none(monkeypatch):
    def no_backward(layer, backward, *rest):
        return "there is no room" if backward else ranked_plans(layer, backward, *rest)

    monkeypatch.setattr(routing, "ranked_plans", no_backward)
    monkeypatch.setattr(explain, "ranked_plans", no_backward)
    assert facts(BF16)["runs"].startswith("no: both passes")
    assert facts(BF16)["runs"].endswith("operator runs")
    assert "why" not in facts(BF16)
    assert facts(BF16, backward=True)["why"] == "there is no room"


def test_sections():
    titles = [section.title for section in explain.sections(BF16, [H100, explain.Target(GPUS["l4"])])]
    of_gpu = ["what runs", "forward pass", "backward pass"]
    assert titles == ["the layer", *(f"{name}: {title}" for name in ("H100 SXM", "L4") for title in of_gpu)]
    alone = explain.question(768, inference=True)
    assert [s.title for s in explain.sections(alone, [H100])] == titles[:3]


def test_layer_facts():
    asked = explain.question(12, 1, 3, 1, bidirectional=True, dtype="tf32", variant="coupled", proj=5, inference=True)
    said = dict(explain.layer_facts(asked))
    assert said["variant"] == "coupled"
    assert said["sizes"] == "12 hidden units, 3 inputs"
    assert said["projection"] == "to 5"
    assert said["sequence"] == "1 batch row of 1 step"
    assert said["directions"] == "two"
    assert "tf32" in said["dtype"]
    assert said["for"].startswith("inference")
    assert "projection" not in dict(explain.layer_facts(BF16))
    ragged = explain.question(12, 2, ragged=True)
    assert dict(explain.layer_facts(ragged))["sequence"] == "2 batch rows of up to 512 steps, with lengths or resets"
    assert ragged.ragged and not asked.ragged


@pytest.mark.parametrize("name, dtype", [("bf16", "bfloat16"), ("fp16", "float16"), ("fp64", "float64")])
def test_both_names_of_a_type_are_one(name, dtype):
    assert explain.question(8, dtype=name) == explain.question(8, dtype=dtype)
    assert explain.question(8, dtype=name).dtype == getattr(torch, dtype)


# The GPU


def test_without_a_device_one_is_assumed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    chosen, note = explain.targets([])
    assert chosen == [H100]
    assert note is not None and "no CUDA device here" in note and "h100" in note


def test_names_are_taken_once_and_all_is_the_table():
    assert explain.targets(["l4", "h100", "l4"]) == ([explain.Target(GPUS["l4"]), H100], None)
    assert [target.gpu for target in explain.targets(["all", "h100"])[0]] == list(GPUS.values())


def test_the_device_that_is_here(cuda_device):
    (target,), note = explain.targets([])
    assert (target.gpu, str(target.device), note) == (cuda_device, "cuda:1", None)
    assert numbers(facts(BF16, target)["programs"])[4] == 100
    assert facts(BF16, target)["runs"] == "yes"
    huge = explain.question(4096)
    assert explain.choice(huge, target).name == "operator"


def test_no_cudnn_on_the_device_that_is_here(cuda_device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    (target,), _ = explain.targets([])
    assert explain.choice(explain.question(4096), target).name == "stepwise"


def test_the_backend_that_was_asked_for_decides_on_the_device_that_is_here(cuda_device, monkeypatch):
    (target,), _ = explain.targets([])
    with routing.backend("torch"):
        assert explain.choice(BF16, target) == ("operator", "asked for")
        assert facts(BF16, target)["runs"].startswith("not with auto, which takes operator")
        assert explain.choice(BF16, H100).name == "persistent"
        peephole = explain.question(768, dtype="bf16", variant="diagonal")
        assert explain.choice(peephole, target) == ("eager", "asked for")
        assert facts(peephole, target)["runs"].startswith("no: no kernel of this library runs here (asked for)")
    with routing.backend("triton"):
        assert explain.choice(explain.question(4096), target).name == "stepwise"
    monkeypatch.setattr(routing, "FROM_ENVIRONMENT", "tpu")
    assert explain.choice(BF16, target).name == "none"


def test_a_device_that_is_too_old(cuda_device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    (target,), _ = explain.targets([])
    said = dict(explain.engine_facts(BF16, target))
    assert said["auto takes"].startswith("operator: ")
    assert "compute capability 7.5" in said["why"]


# The command


def test_info_of_a_layer(program):
    code, output, errors = program("--hidden=768", "--batch=16", "--dtype=bf16", "--gpu=h100")
    assert (code, errors) == (0, "")
    titles = ["the layer", "H100 SXM: what runs", "H100 SXM: forward pass", "H100 SXM: backward pass"]
    assert [line.strip() for line in output.splitlines() if line[:1] == " "] == titles
    assert all(len(line) <= app.PLAIN_WIDTH for line in output.splitlines())
    assert "no CUDA device" not in output
    printed = cells(output)
    for name, text in explain.pass_facts(BF16, H100, backward=True):
        assert printed[name] == text
    assert printed["auto takes"].startswith("persistent: ")


def test_every_option_reaches_the_question(program, monkeypatch):
    seen = []
    genuine = explain.sections
    monkeypatch.setattr(explain, "sections", lambda *arguments: seen.append(arguments) or genuine(*arguments))
    options = ["--batch=3", "--input=5", "--steps=7", "--bidirectional", "--dtype=tf32", "--variant=full", "--proj=2"]
    assert program("--hidden=9", *options, "--inference", "--ragged", "--gpu=l4", "--gpu=a100")[0] == 0
    assert program("--hidden=9", "--gpu=l4")[0] == 0
    expected = explain.question(9, 3, 5, 7, True, "tf32", "full", 2, True, True)
    assert seen[0] == (expected, [explain.Target(GPUS["l4"]), explain.Target(GPUS["a100"])], False)
    assert seen[1] == (
        explain.question(9, 16, 9, 512, False, "float32", "standard", 0, False),
        [explain.Target(GPUS["l4"])],
        False,
    )


def compiled_rows(output):
    return re.findall(r"compiled *│ (U\d+ R[^:]+): (\d+) registers, (\d+) spilled, \S+ (?:KiB|bytes) of shared", output)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_info_compiles_for_a_gpu_that_is_not_here(program, dtype):
    code, output, errors = program("--hidden=136", f"--dtype={dtype}", "--gpu=h100", "--inference", "--compile")
    assert (code, errors) == (0, "")
    joined = re.sub(r" *│\n│ +│ ", " ", output)
    found, plans = compiled_rows(joined), ranked_plans(explain.question(136, dtype=dtype), False, GPUS["h100"])
    assert [plan for plan, _, _ in found] == [plan.describe() for plan in plans[:4]]
    assert all(0 < int(registers) <= 255 for _, registers, _ in found)
    assert joined.count("this one is used") == 1


def test_what_does_not_fit_as_compiled_is_not_used(monkeypatch):
    """Two programs that share a multiprocessor, whatever was estimated."""
    from lstm_triton_kernels import sequence_persistent
    from lstm_triton_kernels.settle import Usage

    plans = [replace(plan, together=2) for plan in ranked_plans(BF16, False, GPUS["h100"])[:3]]
    monkeypatch.setattr(explain, "ranked_plans", lambda *_: plans)
    shared = [114 * 1024, 113 * 1024, 1024]
    monkeypatch.setattr(sequence_persistent, "usages", lambda *_: [Usage(128, 0, size) for size in shared])
    rows = [text for _, text in explain.compiled_facts(BF16, GPUS["h100"], False)]
    assert ["this one is used" in text for text in rows] == [False, True, False]


def test_info_cannot_compile_without_triton(program, monkeypatch):
    monkeypatch.setattr(routing, "TRITON_INSTALLED", False)
    code, _, errors = program("--hidden=136", "--gpu=h100", "--compile")
    assert code == 1 and errors == "error: --compile needs triton (pip install triton)\n"


def test_info_compiles_nothing_where_there_is_no_plan(program):
    code, output, _ = program("--hidden=4096", "--gpu=l4", "--compile")
    assert code == 0 and "compiled" not in output


def test_info_says_which_gpu_is_assumed(program, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, output, _ = program("--hidden=8")
    assert code == 0
    assert output.startswith("There is no CUDA device here. The plan is for h100")
    assert "H100 SXM: forward pass" in output


def test_info_without_hidden_is_as_ever(program):
    code, output, _ = program()
    assert code == 0
    assert "versions" in output and "devices, and the backend for float32" in output
    assert "pass" not in output


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--hidden=8", "--dtype=float8"], 1, "unknown dtype 'float8': there are bf16, bfloat16, "),
        (["--hidden=8", "--variant=peephole"], 1, "unknown variant 'peephole': there are standard, diagonal, "),
        (["--hidden=8", "--gpu=v100"], 1, "unknown GPU 'v100': there are a100, h100, l4, rtx4090, b200, "),
        (["--hidden=8", "--proj=8"], 1, "--proj must be smaller than --hidden 8, got 8"),
        (["--batch=8", "--gpu=h100"], 1, "--batch, --gpu: add --hidden N"),
        (["--inference"], 1, "--inference: add --hidden N"),
        (["--ragged"], 1, "--ragged: add --hidden N"),
        (["--compile"], 1, "--compile: add --hidden N"),
        (["--hidden=0"], 2, "--hidden"),
        (["--hidden=many"], 2, "--hidden"),
        (["--hidden=8", "--batch=0"], 2, "--batch"),
        (["--hidden=8", "--steps=0"], 2, "--steps"),
        (["--hidden=8", "--input=0"], 2, "--input"),
        (["--hidden=8", "--proj=-1"], 2, "--proj"),
        ([f"--hidden={10**400}"], 2, "--hidden"),
        (["--hidden=8", "--layers=2"], 2, "--layers"),
    ],
)
def test_bad_options_are_one_line(program, arguments, code, message):
    actual, output, errors = program(*arguments)
    assert (actual, output, len(errors.splitlines())) == (code, "", 1), errors
    assert errors.startswith("error: ")
    assert message in errors


def test_bad_names_are_user_errors():
    for options in (dict(dtype="int8"), dict(variant="none"), dict(proj=9)):
        with pytest.raises(UserError):
            explain.question(8, **options)
    with pytest.raises(UserError):
        explain.targets(["h100", "h1"])


def render(found, width):
    console = Console(file=StringIO(), width=width)
    for section in found:
        console.print(info.facts_table(section.title, section.rows))
    return console.file.getvalue()


@pytest.mark.parametrize("width", [40, 80, 110])
def test_nothing_is_cut_off_in_a_narrow_terminal(width):
    found = explain.sections(BF16, [H100])
    output = render(found, width)
    assert max(map(len, output.splitlines())) <= width
    assert "…" not in output
    assert cells(output)["wait"].split() == dict(found[-1].rows)["wait"].split()


def test_markup_in_a_text_is_printed_as_it_is():
    assert "a [bold] wish [/]" in render([explain.Section("title", [("name", "a [bold] wish [/]")])], 80)


SIZES = st.integers(1, 5000)


@settings(max_examples=60, deadline=None)
@given(
    hidden=SIZES,
    batch=SIZES,
    steps=SIZES,
    bidirectional=st.booleans(),
    dtype=st.sampled_from(list(explain.DTYPES)),
    variant=st.sampled_from([spec.name for spec in VARIANTS]),
    projected=st.booleans(),
    inference=st.booleans(),
    ragged=st.booleans(),
    gpu=st.sampled_from(list(GPUS)),
)
def test_any_layer_on_any_gpu_is_explained(projected, gpu, hidden, **options):
    asked = explain.question(hidden, proj=hidden // 2 if projected else 0, **options)
    target = explain.Target(GPUS[gpu])
    found = explain.sections(asked, [target])
    assert len(found) == 3 if options["inference"] else 4
    assert all(name and text for section in found for name, text in section.rows)
    assert max(map(len, render(found, 60).splitlines())) <= 60
    name = explain.choice(asked, target).name
    for section in found[2:]:
        said = dict(section.rows)
        assert ("programs" in said) != ("instead" in said)
        assert (said.get("runs") == "yes") == (name == "persistent")
        if "programs" in said:
            programs, _, _, _, multiprocessors, *together = numbers(said["programs"])
            room = multiprocessors * (together[0] if together else 1)
            assert programs <= room or said["wait"].startswith("none: ")
            registers, most = numbers(said["registers"])
            assert registers <= most


@pytest.mark.parametrize("size", [1, explain.LARGEST_SIZE])
def test_the_smallest_and_the_largest_sizes_are_explained(size):
    asked = explain.question(size, size, size, size, bidirectional=True, dtype="fp16")
    assert len(explain.sections(asked, explain.targets(["all"])[0])) == 1 + 3 * len(GPUS)


@pytest.mark.parametrize(
    "count, text",
    [
        (1, "1 byte"),
        (1023, "1023 bytes"),
        (1024, "1 KiB"),
        (227 * 1024, "227 KiB"),
        (3 << 19, "1.5 MiB"),
        (5 << 30, "5 GiB"),
    ],
)
def test_bytes_for_people(count, text):
    assert explain.size(count) == text


@pytest.mark.parametrize("us, text", [(1.234, "1.23 us"), (123.4, "123 us"), (12_345_678.0, "12,346 ms")])
def test_microseconds_for_people(us, text):
    assert explain.time(us) == text
