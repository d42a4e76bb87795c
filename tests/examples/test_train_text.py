"""`examples/train_text.py`: its curves, its checkpoints, several processes, and what it says about errors."""

import math
import os
import pydoc_data.topics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples import train_text
from lstm_triton import VARIANTS

NAMES = [spec.name for spec in VARIANTS]
TEXT = "".join(pydoc_data.topics.topics.values())[:400]
OPTIONS = ["--text=text.txt", "--device=cpu", "--embedding=5", "--hidden=7", "--batch=4", "--window=9"]
SMALL = [*OPTIONS, "--dtype=float64", "--layers=2", "--sample-length=3", "--variant=coupled", "--variant=diagonal"]
STEPS = 12
TOLERANCE = 1e-11  # bits per character, of losses near 6, in float64: a sum in another order
CLIPPED_AT = 0.5  # a norm that some steps exceed and others do not: a wrong norm over shards would show
LAUNCHED = f"from examples import train_text\ntrain_text.MAX_GRADIENT_NORM = {CLIPPED_AT}\ntrain_text.main()\n"


@pytest.fixture(scope="module", autouse=True)
def directory(tmp_path_factory):
    """A directory with a text so short that its end, after which the state is reset, comes within the runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("train_text"))
        patch.setattr(train_text, "MAX_GRADIENT_NORM", CLIPPED_AT)
        Path("text.txt").write_text(TEXT, encoding="utf-8")
        Path("launched.py").write_text(LAUNCHED, encoding="utf-8")
        switches = (torch.backends.cuda.matmul, torch.backends.cudnn.rnn)  # which the example sets
        before = [switch.fp32_precision for switch in switches]
        alone("saved", 1)
        yield
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


@pytest.fixture(scope="module")
def one(directory):
    """The learners of an uninterrupted run of one process."""
    return train_text.main([*SMALL, f"--steps={STEPS}"])


def alone(folder, steps, *options):
    return train_text.main([*SMALL, f"--checkpoint={folder}", f"--steps={steps}", *options])


def program(*command):
    """Exit code, stdout and stderr of a Python process."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def together(*options):
    return program("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "launched.py", *SMALL, *options)


def assert_same_run(learners, others, tolerance=0.0):
    for learner, other in zip(learners, others, strict=True):
        assert (learner.name, len(learner.losses), learner.validation[-1][0]) == (other.name, STEPS, STEPS)
        actual, expected = ([one.losses, one.validation[-1], one.state_dict()] for one in (learner, other))
        for saved in (actual[2], expected[2]):
            saved["optimizer"], saved["curves"] = saved["optimizer"]["state"], 0
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_program_end_to_end():
    path = train_text.__file__
    _, output, _ = program(path, "--help")
    assert all(words in output for words in ("curves.png", "torchrun", "--resume", "diagonal+current", "bfloat16"))
    code, output, errors = program(path, *OPTIONS, "--steps=30", "--learning-rate=0.03", "--plot=new/curves.png")
    assert (code, errors) == (0, "")
    rows = {row[0]: row[1:] for row in map(str.split, output.splitlines()) if len(row) == 6 and row[4].endswith("x")}
    assert list(rows) == ["torch.nn.LSTM", "standard", "coupled", "diagonal", "full"]
    baseline, standard, coupled, diagonal, full = (int(row[0].replace(",", "")) for row in rows.values())
    assert coupled < baseline == standard < diagonal < full
    assert [rows[name][4] for name in ("torch.nn.LSTM", "standard")] == ["-", "0.0e+00"]
    assert output.count("step ") == 10
    assert "after 30 steps of 36 characters" in output and ", temperature 0.7:\n" in output
    assert Path("new/curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("dtype", ["float32", "float64", "bf16"])
def test_every_variant_trains_and_standard_is_the_baseline(dtype):
    options = [f"--dtype={dtype}", *(f"--variant={name}" for name in NAMES), "--steps=40", "--learning-rate=0.03"]
    learners = train_text.main([*OPTIONS, *options])
    assert [learner.name for learner in learners] == [train_text.BASELINE, *NAMES]
    for learner in learners:
        assert learner.losses[0] == pytest.approx(math.log2(len(set(TEXT))), abs=0.5)
        assert learner.losses[-1] < learner.losses[0] - 1, learner.name
    if dtype != "bf16":
        assert (learners[0].losses, learners[0].validation) == (learners[1].losses, learners[1].validation)


REGULARIZED = ["recurrent_dropout", "candidate_dropout", "zoneout", "weight_dropout", "layer_norm"]


def test_regularized_models_train_beside_the_baseline_and_resume(directory):
    """Each draws masks in training alone: the first validation of a model that drew none would be the baseline's."""
    options = [*OPTIONS, "--dtype=float64", *(f"--variant={name}" for name in REGULARIZED), "--learning-rate=0.03"]
    learners = train_text.main([*options, "--steps=30"])
    assert [learner.name for learner in learners] == [train_text.BASELINE, *REGULARIZED]
    for learner in learners[1:]:
        assert learner.losses[-1] < learner.losses[0] - 1, learner.name
        assert learner.losses[0] != learners[0].losses[0]
        assert learner.model.lstm.weight_hh_l0.shape == learners[0].model.lstm.weight_hh_l0.shape
    train_text.main([*options, "--steps=13", "--checkpoint=masks"])
    resumed = train_text.main([*options, "--steps=30", "--checkpoint=masks", "--resume"])
    for learner, other in zip(learners, resumed, strict=True):
        assert learner.losses == other.losses


def test_models_start_from_the_same_weights():
    args = train_text.parse_arguments([*OPTIONS, *(f"--variant={name}" for name in NAMES), "--layers=2"])
    models = train_text.build_models(args, 30)
    expected = models[train_text.BASELINE].state_dict()
    for spec in VARIANTS:
        actual = models[spec.name].state_dict()
        for name, weight in expected.items():
            rows_left_out = args.hidden if spec.coupled and name.startswith("lstm.") else 0
            assert torch.equal(weight[rows_left_out:], actual[name])
        assert len(actual) - len(expected) == (args.layers if spec.peephole else 0)


def test_state_is_carried_to_the_end_of_the_text_and_reset_there(monkeypatch):
    genuine, zero = train_text.Learner.training_step, []

    def training_step(learner, characters):
        zero.append(not learner.state.any())
        genuine(learner, characters)

    monkeypatch.setattr(train_text.Learner, "training_step", training_step)
    train_text.main([*OPTIONS, "--variant=full", "--steps=11"])
    assert zero[::2] == zero[1::2] == [True, *[False] * 8, True, False]


def test_validation_carries_the_state(one):
    streams = torch.randint(10, (4, 50))
    assert one[0].evaluate(streams, window=7) == pytest.approx(one[0].evaluate(streams, window=50), rel=1e-12)


def test_sample_follows_seed_and_temperature(one):
    def write(*options):
        args = train_text.parse_arguments([*SMALL, "--sample-length=50", *options])
        return one[1].sample("".join(sorted(set(TEXT))), torch.zeros(1, 5, dtype=torch.int64), args)

    assert write() == write() != write("--seed=1")
    assert write("--temperature=1e-6") == write("--temperature=1e-6", "--seed=1")


def test_resumed_is_uninterrupted_bit_for_bit(one):
    alone("parts", 7)
    assert_same_run(alone("parts", STEPS, "--resume"), one)
    assert sorted(path.name for path in Path("parts").iterdir()) == ["latest.json", f"step-{STEPS}"]


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("owner, name", [("dcp", "save"), ("Path", "replace"), ("shutil", "rmtree")])
def test_interrupted_save_leaves_a_whole_checkpoint(one, monkeypatch, owner, name, moment):
    folder, owner = Path(f"interrupted-{moment}-{name}"), getattr(train_text, owner)
    genuine = getattr(owner, name)

    def interrupted(*arguments, **options):
        if moment == "after":
            genuine(*arguments, **options)
        raise KeyboardInterrupt

    alone(folder, 3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, interrupted)
        alone(folder, 5, "--resume")
    assert_same_run(alone(folder, STEPS, "--resume"), one)
    assert len(list(folder.iterdir())) == 2


def test_gradients_are_clipped_in_some_steps_of_these_runs(one, monkeypatch):
    norms, genuine = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *arguments: norms.append(genuine(*arguments)))
    train_text.main([*SMALL, f"--steps={STEPS}"])
    assert min(norms) < CLIPPED_AT < max(norms)


@pytest.mark.xdist_group("torchrun")
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_are_one_and_one_continues_what_they_began(one, mode):
    code, output, errors = together(f"--checkpoint={mode}", "--steps=11", f"--parallel={mode}")
    assert (code, errors) == (0, "")
    assert [output.count(words) for words in ("on 2 x cpu", "step 11/11", "after 11 steps", "written by")] == [1] * 4
    assert_same_run(alone(mode, STEPS, "--resume"), one, TOLERANCE)


@pytest.mark.xdist_group("torchrun")
def test_two_processes_continue_what_one_began(one):
    alone("passed-on", 3)
    for mode, steps in (("ddp", 7), ("fsdp", 11)):
        code, _, errors = together("--checkpoint=passed-on", f"--steps={steps}", f"--parallel={mode}", "--resume")
        assert (code, errors) == (0, "")
    assert_same_run(alone("passed-on", STEPS, "--resume"), one, TOLERANCE)


@pytest.mark.xdist_group("torchrun")
def test_what_all_processes_refuse_is_said_once():
    code, output, errors = together("--batch=5")
    assert (code, output, errors.count("error: --batch 5 cannot be shared by 2 processes\n")) == (1, "", 1)


ERRORS = """--resume | --resume needs --checkpoint DIRECTORY
--resume --checkpoint=nothing | nothing holds no run
--checkpoint=saved | saved holds a run: add --resume
--checkpoint=saved --resume --hidden=9 | saved has other settings: {'variant': ['coupled', 'diagonal'], 'embedding': 5
--checkpoint=saved --resume --text=launched.py --batch=2 | saved has other settings
--checkpoint=saved --resume --steps=1 | saved has 1 steps: give more --steps
--variant=peephole | invalid choice: 'peephole'
--text=missing.txt | missing.txt
--window=90 | --text is too short
--learning-rate=1e300 | a loss is not finite
--plot=curves.bmp | --plot must end in one of
--dtype=float8 | unknown dtype 'float8': choose from
--device=abacus | abacus
--steps=0 | steps must be positive
--temperature=nan | temperature must be positive
--nonsense | --nonsense"""


@pytest.mark.parametrize("options, message", [line.split(" | ") for line in ERRORS.splitlines()])
def test_error_is_one_line(options, message):
    with pytest.raises(SystemExit) as exit_info:
        train_text.main([*SMALL, "--steps=2", *options.split()])
    said = exit_info.value.code
    assert said.startswith("error: ") and message in said and "\n" not in said


def test_missing_package_is_one_line():
    code, _, errors = program("-c", "import sys; sys.modules['rich'] = None; import examples.train_text")
    assert (code, errors.count("\n")) == (1, 1)
    assert errors.endswith(' is not installed: pip install "lstm-triton[examples]"\n')
