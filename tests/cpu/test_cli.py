import errno
import hashlib
import json
import math
import os
import pickle
import pydoc_data.topics
import re
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack
from dataclasses import replace
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from rich.console import Console
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from lstm_triton import VARIANTS, cli, routing
from lstm_triton.cli import app, checkpoints, files, model, output, progress, report, tensors, text, training
from lstm_triton.cli.errors import UserError
from lstm_triton.cli.parallel import World
from tests.support import checkpoints as saved
from tests.support.checkpoints import load

TEXT = "".join(pydoc_data.topics.topics.values())[:6000]
STEPS = 12
SIZES = ["--embedding=5", "--hidden=8", "--batch=4", "--window=9"]
SETTINGS = training.Settings(
    ("standard",), embedding=5, hidden=8, layers=1, batch=4, window=9, learning_rate=4e-3, dtype="float32", seed=0
)


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    """A directory of its own with a small text, and no backend asked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(routing, "FROM_ENVIRONMENT", "auto")
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    Path("text.txt").write_text(TEXT, encoding="utf-8")


@pytest.fixture
def program(capsys):
    """Run `lstm-triton` in this process: exit code, stdout, stderr."""

    def run(*arguments):
        with pytest.raises(SystemExit) as exit_info:
            cli.main(arguments)
        return exit_info.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def train(program):
    """`lstm-triton train` on the small text with small sizes, where the arguments do not say otherwise."""

    def run(*arguments):
        return program("train", "--text=text.txt", "--device=cpu", *SIZES, f"--steps={STEPS}", *arguments)

    return run


@pytest.fixture
def stdout_is(monkeypatch):
    """Let stdout be a file, as that of a program is."""
    with ExitStack() as stack:
        yield lambda path: monkeypatch.setattr(sys, "stdout", stack.enter_context(open(path, "w")))
        monkeypatch.undo()


@pytest.fixture
def largest_file():
    """Let no file be larger than so many bytes: the system then refuses as if a disk were full."""
    resource = pytest.importorskip("resource")
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, former)


@pytest.fixture
def closed(monkeypatch):
    """Make a directory `closed` that not even root may enter or write into, in one that is open to everyone."""
    former = os.geteuid()

    def close(mode):
        Path("closed").mkdir(mode=mode)
        if former == 0:
            os.seteuid(65534)
        return Path("closed")

    with TemporaryDirectory() as directory:
        os.chmod(directory, 0o777)
        monkeypatch.chdir(directory)
        Path("text.txt").write_text(TEXT, encoding="utf-8")
        yield close
        os.seteuid(former)
        Path("closed").chmod(0o777)
        monkeypatch.undo()


@pytest.fixture
def interrupt_in_step(monkeypatch):
    """Make Ctrl-C come once, or `times` times, while the first of two models makes the given step (from 1)."""

    def patch(step, times=1):
        calls = 0
        genuine = training.training_step

        def training_step(*arguments):
            nonlocal calls
            calls += 1
            if calls == 2 * step - 1:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)
            return genuine(*arguments)

        monkeypatch.setattr(training, "training_step", training_step)

    return patch


def small_run(**changes):
    corpus = text.build_corpus(TEXT, SETTINGS.batch, SETTINGS.window)
    return training.Run(replace(SETTINGS, **changes), corpus, World(torch.device("cpu")))


def rows(output):
    """The table of results: variant to its other cells."""
    cells = (line.split() for line in output.splitlines())
    return {row[0]: row[1:] for row in cells if len(row) == 6 and re.fullmatch(r"-|[\d.]+x", row[4])}


def same(one, other):
    """Whether nested containers are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def assert_one_error(result, code, *fragments):
    actual_code, _, stderr = result
    assert (actual_code, len(stderr.splitlines())) == (code, 1), stderr
    assert stderr.startswith("error: ")
    for fragment in fragments:
        assert fragment in stderr


def names_in_directory():
    return sorted(path.name for path in Path().iterdir())


# The main job


def test_train_end_to_end(train):
    code, output, errors = train("--steps=80", "--hidden=24", "--checkpoint=run.pt", "--plot=curves.png")
    assert (code, errors) == (0, "")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    results = rows(output)
    assert list(results) == ["torch.nn.LSTM", "standard"]
    baseline, (parameters, validation, rate, ratio, difference) = results["torch.nn.LSTM"], results["standard"]
    assert baseline[0] == parameters
    assert baseline[3:] == ["1.00x", "-"]
    assert float(baseline[1]) == pytest.approx(float(validation), abs=0.002)
    assert float(difference) < 1e-3
    rates = [float(cell.replace(",", "")) for cell in (rate, baseline[2])]
    assert rates[0] / rates[1] == pytest.approx(float(ratio[:-1]), abs=0.01)

    learner = load("run.pt")["learners"]["standard"]
    assert list(learner["validation"]) == [8, 16, 24, 32, 40, 48, 56, 64, 72, 80]
    assert f"{learner['validation'][80]:.3f}" == validation
    assert learner["losses"][0] == pytest.approx(math.log2(len(set(TEXT))), abs=0.5)
    assert learner["validation"][80] < learner["losses"][0] - 1

    assert "median over 80 training steps" in output
    assert "without the first 5" in output
    assert "sample of standard" in output
    assert "curves: curves.png" in output
    assert Path("curves.png").read_bytes().startswith(b"\x89PNG")
    assert names_in_directory() == ["curves.png", "run.pt", "text.txt"]


def test_all_variants(train):
    code, output, _ = train("--variant=all", "--steps=2", "--layers=2")
    assert code == 0
    results = rows(output)
    assert list(results) == ["torch.nn.LSTM", *(spec.name for spec in VARIANTS)]
    parameters = {name: int(cells[0].replace(",", "")) for name, cells in results.items()}
    assert parameters["coupled"] < parameters["standard"] < parameters["diagonal"] < parameters["full"]
    assert "compared to the standard torch.nn.LSTM" in " ".join(output.split())


@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
def test_every_variant_is_reached_by_its_name_and_by_option(spec):
    previous = replace(spec, output_peephole="previous").name
    assert app.parse_variants([spec.name], output_current=False) == (spec.name,)
    assert app.parse_variants(["standard", previous], spec.output_current)[-1] == spec.name


def test_a_repeated_variant_is_trained_once():
    assert app.parse_variants(["full", "coupled", "full"], output_current=False) == ("full", "coupled")


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_dtypes(train, dtype):
    code, output, _ = train(
        f"--dtype={dtype}",
        "--variant=coupled+full+current",
        "--steps=60",
        "--learning-rate=0.02",
        "--checkpoint=run.pt",
    )
    assert code == 0
    assert f"{dtype} on cpu, backend torch" in output
    learner = load("run.pt")["learners"]["coupled+full+current"]
    assert learner["model"]["lstm.weight_ch_l0"].dtype == getattr(torch, dtype)
    assert learner["losses"][-1] < learner["losses"][0] - 1


def test_default_text_is_long_english(program):
    code, output, _ = program("train", "--device=cpu", *SIZES, "--batch=512", "--window=4", "--steps=1")
    assert code == 0
    characters = re.search(r"([\d,]+) to learn", output)
    assert characters and int(characters[1].replace(",", "")) > 300_000


def test_help_without_arguments(program):
    code, output, _ = program()
    assert code == 0
    assert "train" in output
    assert "info" in output


def test_module_and_ctrl_c_in_a_process():
    command = [sys.executable, "-m", "lstm_triton.cli", "train", "--text=text.txt", "--device=cpu", *SIZES]
    process = subprocess.Popen(
        [*command, "--steps=500000", "--checkpoint=run.pt", "--save-every=1"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and "to learn" in process.stdout.readline()
    while not Path("run.pt/run.json").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "interrupted\n")
    step = load("run.pt")["step"]
    assert f"stopped after step {step} of 500000; saved to run.pt, continue with --resume" in output


def process_of(prelude, *arguments, **options):
    """`lstm-triton` in a process of its own, after some Python."""
    program = f"import signal, sys\n{prelude}\nfrom lstm_triton_start import main\nmain()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    # A shell lets what it starts in the background ignore Ctrl-C.
    listening = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    return subprocess.Popen([sys.executable, "-c", listening + program, *arguments], env=environment, **options)


CTRL_C_DURING_AN_IMPORT = """
class Finder:
    def find_spec(self, name, path, target=None):
        if name == IMPORTED:
            try:
                signal.raise_signal(signal.SIGINT)
            except BaseException:  # as some library might
                pass
sys.meta_path.insert(0, Finder())
"""
CTRL_C_AFTER_THE_END = "import atexit; atexit.register(signal.raise_signal, signal.SIGINT)"


@pytest.mark.parametrize(
    "prelude, expected",
    [
        ('IMPORTED = "torch"' + CTRL_C_DURING_AN_IMPORT, "interrupted\n"),
        ('IMPORTED = "typer"' + CTRL_C_DURING_AN_IMPORT, "interrupted\n"),
        (CTRL_C_AFTER_THE_END, ""),
    ],
    ids=["during the import of torch", "during the import of typer", "after the end"],
)
def test_ctrl_c_before_and_after_the_command_is_quiet(prelude, expected):
    process = process_of(prelude, "info")
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (130, expected)
    assert ("versions" in output) == (expected == "")


def test_a_handler_of_ctrl_c_that_is_not_pythons_stays(program, monkeypatch):
    seen = []
    former = signal.signal(signal.SIGINT, lambda *_: seen.append("ctrl-c"))
    try:
        monkeypatch.setattr(cli, "find_spec", lambda name: signal.raise_signal(signal.SIGINT) or True)
        assert program("info")[0] == 0
    finally:
        signal.signal(signal.SIGINT, former)
    assert len(seen) == len(cli.REQUIREMENTS)


@pytest.mark.parametrize("missing", [["typer"], ["rich", "matplotlib"]])
def test_missing_extra(program, monkeypatch, missing):
    genuine = cli.find_spec
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name in missing else genuine(name))
    assert_one_error(program("info"), 1, ", ".join(missing), 'pip install "lstm-triton[cli]"')


# Where the output goes


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("arguments", [["info"], ["--help"]], ids=" ".join)
def test_a_full_stdout_is_one_line(arguments):
    with open("/dev/full", "w") as full:
        process = process_of("", *arguments, stdout=full)
    _, errors = process.communicate(timeout=120)
    message = "error: cannot write to standard output: No space left on device\n"
    assert (process.returncode, errors) == (1, message)


def test_a_closed_pipe_ends_the_program_quietly():
    process = process_of("", "info")
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == output.CLOSED


def test_stdout_that_was_never_open_is_one_line(program, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert_one_error(program("info"), 1, "standard output is closed")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_stdout_ends_a_training_before_it_begins(train, stdout_is):
    stdout_is("/dev/full")
    assert_one_error(train("--checkpoint=run.pt"), 1, "cannot write to standard output: No space left on device\n")
    assert names_in_directory() == ["text.txt"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EPIPE])
def test_stdout_that_fails_stops_the_training_and_saves_it(train, stdout_is, monkeypatch, number):
    stdout_is("log")
    genuine, calls = training.training_step, []

    def training_step(*arguments):
        calls.append(arguments)
        if len(calls) == 2 * 3:
            sys.stdout.buffer.raw.failure = OSError(number, os.strerror(number))
        return genuine(*arguments)

    monkeypatch.setattr(training, "training_step", training_step)
    code, _, errors = train("--checkpoint=run.pt")
    assert load("run.pt")["step"] == 3
    if number == errno.EPIPE:
        assert (code, errors) == (output.CLOSED, "")
    else:
        outcome = f"stopped after step 3 of {STEPS}; saved to run.pt, continue with --resume"
        assert_one_error((code, "", errors), 1, f"standard output: No space left on device; {outcome}\n")
    assert "step 2/12" in Path("log").read_text()


def test_stdout_that_fails_at_the_end_costs_no_curves(train, stdout_is, monkeypatch):
    stdout_is("log")
    genuine = report.results_table

    def results_table(run):
        sys.stdout.buffer.raw.failure = OSError(errno.ENOSPC, "No space left on device")
        return genuine(run)

    monkeypatch.setattr(report, "results_table", results_table)
    assert_one_error(train("--steps=1", "--plot=curves.png"), 1, "cannot write to standard output: No space left")
    assert Path("curves.png").exists()


@pytest.mark.parametrize("buffering", [-1, 0])
def test_output_that_fails_is_remembered_and_not_tried_again(monkeypatch, buffering):
    reader, writer = os.pipe()
    with open(writer, "wb", buffering) as binary, TextIOWrapper(binary, "utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with output.remembering() as guarded:
            print("heard", flush=True)
            assert os.read(reader, 100) == b"heard\n"
            assert output.failure(guarded) is None
            os.close(reader)
            print("x" * 100_000)
            print("not heard", flush=True)
            assert isinstance(output.failure(guarded), BrokenPipeError)
        assert sys.stdout is stream


def test_output_to_a_pipe_that_does_not_wait_arrives_whole(monkeypatch):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    received = []

    def read():
        with open(reader, "rb") as file:
            received.append(file.read())

    thread = threading.Thread(target=read)
    with open(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with output.remembering() as guarded:
            thread.start()
            print("x" * 1_000_000)
        assert output.failure(guarded) is None
    thread.join()
    assert received == [b"x" * 1_000_000 + b"\n"]


@pytest.mark.parametrize("stream", ["missing", "full"])
def test_without_stderr_the_exit_code_remains(monkeypatch, stream):
    class Full(StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stderr", None if stream == "missing" else Full())
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["info", "--nonsense"])
    assert exit_info.value.code == 2


# lstm-triton info


def test_info(program):
    code, output, _ = program("info")
    assert code == 0
    assert torch.__version__ in output
    assert re.search(r"cpu .* torch .*the kernels run on CUDA devices, not on cpu", output)


@pytest.mark.parametrize("value, reason", [("triton", "the obstacle"), ("tpu", "LSTM_TRITON_BACKEND must be one of")])
def test_info_says_why_no_backend_can_run(program, monkeypatch, value, reason):
    monkeypatch.setattr(routing, "FROM_ENVIRONMENT", value)
    monkeypatch.setattr(routing, "why_not_triton", lambda device, dtype: "the obstacle")
    code, output, _ = program("info")
    assert code == 0
    assert re.search(rf"cpu .* none .*{reason}", output)


# Checkpoints


@pytest.mark.parametrize("variant", ["standard", "coupled+diagonal+current"])
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(train, interrupt_in_step, variant):
    # So short that an epoch, after which the state is reset, ends before and after the interruption.
    Path("text.txt").write_text(TEXT[:200], encoding="utf-8")
    arguments = [f"--variant={variant}", "--batch=4"]
    assert train(*arguments, "--checkpoint=whole.pt")[0] == 0

    interrupt_in_step(6)
    code, output, errors = train(*arguments, "--checkpoint=parts.pt")
    assert (code, errors) == (130, "interrupted\n")
    assert f"stopped after step 6 of {STEPS}; saved to parts.pt" in output
    assert load("parts.pt")["step"] == 6
    assert train(*arguments, "--checkpoint=parts.pt", "--resume")[0] == 0

    whole = load("whole.pt")
    assert whole["step"] == STEPS
    assert len(whole["learners"][variant]["losses"]) == STEPS
    assert same(whole, load("parts.pt"))


def test_resume_can_go_further(train):
    assert train("--checkpoint=run.pt", "--steps=4")[0] == 0
    assert train("--checkpoint=run.pt", "--steps=7", "--resume")[0] == 0
    assert load("run.pt")["step"] == 7
    assert_one_error(train("--checkpoint=run.pt", "--steps=7", "--resume"), 1, "run.pt has 7 steps already")


def test_ctrl_c_without_checkpoint_says_that_nothing_was_saved(train, interrupt_in_step):
    interrupt_in_step(3)
    code, output, _ = train()
    assert code == 130
    assert f"stopped after step 3 of {STEPS}; nothing was saved" in output
    assert names_in_directory() == ["text.txt"]


def test_second_ctrl_c_stops_at_once(train, interrupt_in_step):
    interrupt_in_step(3, times=2)
    assert train("--checkpoint=run.pt")[0] == 130
    assert names_in_directory() == ["text.txt"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_saves_regularly(train, monkeypatch):
    steps = []
    monkeypatch.setattr(app.checkpoints, "save", lambda path, run: steps.append(run.step))
    assert train("--checkpoint=run.pt", "--save-every=5")[0] == 0
    assert steps == [5, 10, 12]


@pytest.mark.parametrize("function", ["fsync", "rename", "replace"])
def test_failed_save_leaves_the_former_checkpoint(train, monkeypatch, function):
    assert train("--checkpoint=run.pt", "--steps=3")[0] == 0
    former = saved.contents("run.pt")
    before = names_in_directory()

    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, function, fail)
    assert_one_error(train("--checkpoint=run.pt", "--resume"), 1, "cannot write", "run.pt", ": No space left on device")
    assert saved.contents("run.pt") == former
    assert names_in_directory() == before
    assert len(list(Path("run.pt").iterdir())) == 2


@pytest.mark.parametrize("hidden, size", [(8, 20), (8, 20_000), (256, 300), (256, 1_000_000)])
@pytest.mark.parametrize("former", ["a former checkpoint", "none"])
def test_a_full_disk_is_one_line_and_leaves_the_former_checkpoint(train, largest_file, hidden, size, former):
    options = [f"--hidden={hidden}", "--checkpoint=run.pt"]
    if former != "none":
        assert train(*options, "--steps=1")[0] == 0
        options.append("--resume")
    before = saved.contents(".")
    largest_file(size)
    result = train(*options, "--steps=2")
    assert_one_error(result, 1, f"cannot write the checkpoint {Path.cwd() / 'run.pt'}: File too large\n")
    assert saved.contents(".") == before
    assert Path("run.pt").exists() == (former != "none")


def test_a_full_disk_costs_no_results_when_the_curves_are_written(train, largest_file, monkeypatch):
    genuine = report.plot_curves

    def plot_curves(*arguments):
        picture = genuine(*arguments)
        largest_file(100)
        return picture

    monkeypatch.setattr(report, "plot_curves", plot_curves)
    result = train("--steps=1", "--plot=curves.png")
    assert_one_error(result, 1, f"cannot write the curves {Path.cwd() / 'curves.png'}: File too large\n")
    assert "standard" in rows(result[1]) and "sample of" in result[1]
    assert names_in_directory() == ["text.txt"]


def test_a_sample_that_fails_costs_no_curves(train, monkeypatch):
    def fail(*arguments):
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(app, "sample", fail)
    assert_one_error(train("--steps=1", "--plot=curves.png"), 1, "out of memory")
    assert Path("curves.png").exists()


def test_any_other_refusal_of_the_system_is_one_line(train, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device", "cache")

    monkeypatch.setattr(report, "plot_curves", fail)
    assert_one_error(train("--steps=1"), 1, "No space left on device: cache\n")


@pytest.mark.parametrize("raised", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_what_a_file_raised_survives_what_was_made_of_it(tmp_path, raised):
    with (
        pytest.raises(type(raised)),
        tensors._FileSystem().create_stream(tmp_path / "file", "wb") as stream,
    ):
        stream.raw.failure = raised
        raise RuntimeError("unexpected pos 704 vs 598")


@pytest.mark.parametrize("option", ["--plot=closed/curves.png", "--checkpoint=closed/run.pt", "--checkpoint=closed"])
@pytest.mark.parametrize("mode", [0o000, 0o555])
def test_a_directory_without_permission_is_one_line(train, closed, option, mode):
    path = Path.cwd() / closed(mode)
    assert_one_error(train(option), 1, "cannot write the c", str(path), ": Permission denied\n")
    assert names_in_directory() == ["closed", "text.txt"]


def test_a_link_to_a_checkpoint_stays_a_link(train):
    Path("elsewhere").mkdir()
    Path("run.pt").symlink_to("elsewhere/run.pt")
    assert train("--checkpoint=run.pt", "--steps=1")[0] == 0
    assert Path("run.pt").is_symlink()
    assert load("elsewhere/run.pt")["step"] == 1


def test_a_first_save_that_fails_leaves_nothing(train, monkeypatch):
    before = names_in_directory()

    def fail(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files.os, "replace", fail)
    assert_one_error(train("--checkpoint=run.pt", "--steps=1"), 1, "cannot write", "Input/output error")
    assert names_in_directory() == before


def test_a_first_save_that_was_cut_off_is_no_checkpoint(train):
    Path("run.pt/tensors-a").mkdir(parents=True)
    Path("run.pt/tensors-a/__0_0.distcp").write_bytes(b"half")
    assert train("--checkpoint=run.pt", "--steps=1")[0] == 0
    assert load("run.pt")["step"] == 1


def test_a_later_save_that_was_cut_off_changes_nothing(train):
    assert train("--checkpoint=run.pt", "--steps=1")[0] == 0
    other = Path("run.pt/tensors-b")
    assert saved.folder("run.pt").name == "tensors-a"
    other.mkdir()
    (other / ".metadata").write_bytes(b"half")
    assert train("--checkpoint=run.pt", "--steps=2", "--resume")[0] == 0
    assert saved.folder("run.pt") == other
    assert load("run.pt")["step"] == 2
    assert sorted(path.name for path in Path("run.pt").iterdir()) == ["run.json", "tensors-b"]


@pytest.mark.parametrize("moment", ["write_whole", "sync_directory"])
def test_a_second_ctrl_c_during_a_save_leaves_a_whole_checkpoint(train, monkeypatch, moment):
    assert train("--checkpoint=run.pt", "--steps=1")[0] == 0
    genuine, calls = getattr(checkpoints, moment), []

    def interrupted(*arguments):
        calls.append(arguments)
        genuine(*arguments)
        # The third directory to be synchronised is that of a record which was replaced already.
        if moment == "write_whole" or len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, moment, interrupted)
    assert train("--checkpoint=run.pt", "--steps=2", "--resume")[0] == 130
    assert load("run.pt")["step"] == 2
    assert len(list(Path("run.pt").iterdir())) == 2


def test_a_checkpoint_is_not_overwritten(train):
    assert train("--checkpoint=run.pt", "--steps=1")[0] == 0
    before = saved.contents("run.pt")
    assert_one_error(train("--checkpoint=run.pt", "--steps=1"), 1, "run.pt exists: add --resume")
    assert saved.contents("run.pt") == before


def flip_a_bit(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def the_record(change):
    """Damage to the record's bytes."""

    def damage(path):
        record = path / "run.json"
        record.write_bytes(change(record.read_bytes()))

    return damage


def the_file(pattern, change):
    """Damage to the bytes of a file of the tensors, which is removed if nothing is left of it."""

    def damage(path):
        (file,) = saved.folder(path).glob(pattern)
        data = change(file.read_bytes())
        file.write_bytes(data) if data is not None else file.unlink()

    return damage


def an_additional_file(path):
    (saved.folder(path) / "more.distcp").write_bytes(b"")


def without(key):
    def damage(path):
        record = saved.read_record(path)
        del record["learners"]["standard"][key]
        saved.seal(path, record)

    return damage


def without_tensors(*keys):
    """Resealed, with an index that has lost the tensors whose path begins so."""

    def damage(path):
        def lose(index):
            lost = [name for name, nested in index.planner_data.items() if nested[: len(keys)] == keys]
            assert lost
            for name in lost:
                del index.state_dict_metadata[name]
            return index

        change_index(path, lose)

    return damage


def change_index(path, change):
    file = saved.folder(path) / ".metadata"
    file.write_bytes(pickle.dumps(change(pickle.loads(file.read_bytes()))))
    saved.seal(path)


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("touched"),)


def malicious_index(path):
    change_index(path, lambda index: Malicious())


def malicious_part_of_the_index(path):
    change_index(path, lambda index: replace(index, storage_meta=Malicious()))


def malicious_entry(path):
    """The format can hold any object beside the tensors; PyTorch unpickles those without any limit."""
    (file,) = saved.folder(path).glob("*.distcp")
    buffer = BytesIO()
    torch.save(Malicious(), buffer)
    begin = file.stat().st_size
    file.write_bytes(file.read_bytes() + buffer.getvalue())

    def enter(index):
        name = "standard.model.decoder.bias"
        index.state_dict_metadata[name] = BytesStorageMetadata()
        (former,) = [key for key in index.storage_data if key.fqn == name]
        del index.storage_data[former]
        index.storage_data[MetadataIndex(name)] = _StorageInfo(file.name, begin, len(buffer.getvalue()))
        return index

    change_index(path, enter)


def malicious_tensors(path):
    (file,) = saved.folder(path).glob("*.distcp")
    torch.save(Malicious(), file)

    def point_to_the_beginning(index):
        for info in index.storage_data.values():
            info.offset, info.length = 0, file.stat().st_size
        return index

    change_index(path, point_to_the_beginning)


def elsewhere(path):
    """Resealed, naming a folder that is not its own."""
    record = saved.read_record(path)
    saved.folder(path).rename("outside")
    text = json.dumps(record | {"folder": "../outside"})
    (path / "run.json").write_text(f'{{"sha256": "{hashlib.sha256(text.encode()).hexdigest()}", "run": {text}}}')


@pytest.mark.parametrize(
    "damage, message",
    [
        (the_record(lambda data: b""), "run.pt is damaged"),
        (the_record(lambda data: data[: len(data) // 2]), "run.pt is damaged"),
        (the_record(lambda data: data[:-1]), "run.pt is damaged"),
        (the_record(flip_a_bit), "run.pt is damaged"),
        (the_record(lambda data: b"not a checkpoint"), "run.pt is damaged"),
        (the_record(lambda data: b"[" * 100_000), "run.pt is damaged"),
        (the_record(lambda data: pickle.dumps({"step": 1})), "run.pt is damaged"),
        (the_record(lambda data: b'{"sha256": "", "run": {"weights": [0, 0]}}'), "run.pt is no checkpoint"),
        (the_file("*.distcp", lambda data: b""), "run.pt is damaged"),
        (the_file("*.distcp", lambda data: data[:-1]), "run.pt is damaged"),
        (the_file("*.distcp", flip_a_bit), "run.pt is damaged"),
        (the_file("*.distcp", lambda data: None), "run.pt is damaged"),
        (the_file(".metadata", flip_a_bit), "run.pt is damaged"),
        (the_file(".metadata", lambda data: None), "run.pt is damaged"),
        (an_additional_file, "run.pt is damaged"),
        (lambda path: shutil.rmtree(saved.folder(path)), "run.pt is damaged"),
        (lambda path: (path / "run.json").unlink(), "run.pt is no checkpoint of lstm-triton train"),
        (without("losses"), "run.pt is damaged"),
        (without_tensors("standard", "optimizer"), "run.pt is damaged"),
        (without_tensors("standard", "state", "h"), "run.pt is damaged"),
        (elsewhere, "run.pt is damaged"),
        (malicious_index, "run.pt is damaged: pathlib"),
        (malicious_part_of_the_index, "run.pt is damaged: pathlib"),
        (malicious_entry, "metadata.BytesStorageMetadata has no place in an index"),
        (malicious_tensors, "run.pt is damaged"),
    ],
)
def test_damaged_checkpoint(train, damage, message):
    assert train("--checkpoint=run.pt", "--steps=1")[0] == 0
    damage(Path("run.pt"))
    assert_one_error(train("--checkpoint=run.pt", "--resume"), 1, message)
    assert not Path("touched").exists()


def test_the_malicious_entry_would_have_been_unpickled(train):
    assert train("--checkpoint=run.pt", "--steps=1")[0] == 0
    malicious_entry(Path("run.pt"))
    load("run.pt")
    assert Path("touched").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ("--hidden=9", "hidden 8 there, 9 here"),
        ("--seed=1", "seed 0 there, 1 here"),
        ("--dtype=float64", "dtype float32 there, float64 here"),
        ("--variant=full", "variants ['standard'] there, ['full'] here"),
        ("--text=other.txt", "another text"),
    ],
)
def test_checkpoint_of_another_run(train, change, message):
    Path("other.txt").write_text(TEXT.swapcase(), encoding="utf-8")
    assert train("--checkpoint=run.pt", "--steps=1")[0] == 0
    assert_one_error(train("--checkpoint=run.pt", "--resume", change), 1, "run.pt", message)


# Everything else that a user can get wrong


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--text=missing.txt"], 1, "cannot read the text missing.txt: No such file"),
        (["--text=."], 1, "cannot read the text .: Is a directory"),
        (["--text=empty.txt"], 1, "the text empty.txt is empty"),
        (["--text=latin-1.txt"], 1, "the text latin-1.txt is not UTF-8: invalid continuation byte at byte 3"),
        (["--batch=1000"], 1, "the text is too short: 6,000 characters, and --batch 1000 with --window 9 needs 20,000"),
        (["--window=1500"], 1, "needs 6,672"),
        (["--variant=peephole"], 1, "unknown variant 'peephole': there are standard, diagonal, "),
        (["--variant=coupled", "--output-peephole=current"], 1, "needs a variant with a peephole, got coupled"),
        (["--device=abacus"], 1, "unknown device 'abacus'"),
        (["--device=meta"], 1, "cannot run on 'meta'"),
        (["--device=cuda:99"], 1, "there is no cuda:99"),
        (["--learning-rate=nan"], 1, "--learning-rate must be positive and finite, got nan"),
        (["--learning-rate=1e30"], 1, "the loss of "),
        (["--temperature=0"], 1, "--temperature must be positive"),
        (["--hidden=10000000000"], 1, "cannot build the models"),
        (["--plot=missing/curves.png"], 1, "missing/curves.png: No such file or directory"),
        (["--plot=text.txt/curves.png"], 1, "text.txt/curves.png: Not a directory"),
        (["--plot=loop"], 1, "loop: Too many levels of symbolic links"),
        ([f"--plot={'long' * 100}.png"], 1, "long.png: File name too long"),
        (["--plot=curves"], 1, "--plot curves: the suffix is the format of the curves, give one of .png, .svg, .pdf"),
        (["--plot=curves.bmp"], 1, "--plot curves.bmp: the suffix is the format of the curves, give one of .png"),
        (["--plot=."], 1, "it is no regular file"),
        (["--plot=text.txt"], 1, "--plot and --text are the same file"),
        (["--plot=new", "--checkpoint=./new"], 1, "--plot and --checkpoint are the same file"),
        (["--checkpoint=missing/run.pt"], 1, "missing/run.pt: No such file or directory"),
        (["--checkpoint=text.txt/run.pt"], 1, "text.txt/run.pt: Not a directory"),
        (["--checkpoint=loop"], 1, "loop: Too many levels of symbolic links"),
        (["--checkpoint=loop", "--resume"], 1, "loop: Too many levels of symbolic links"),
        ([f"--checkpoint={'long' * 100}"], 1, "long: File name too long"),
        (["--checkpoint=text.txt"], 1, "text.txt is a file, a checkpoint is a directory"),
        (["--checkpoint=text.txt", "--resume"], 1, "text.txt is a file, a checkpoint is a directory"),
        (["--checkpoint=."], 1, ". exists and is no checkpoint"),
        (["--checkpoint=.", "--resume"], 1, ". is no checkpoint of lstm-triton train: it has no run.json"),
        (["--checkpoint=missing.pt", "--resume"], 1, "cannot read the checkpoint missing.pt: No such file"),
        (["--resume"], 1, "--resume needs --checkpoint"),
        (["--steps=0"], 2, "--steps"),
        (["--hidden=many"], 2, "--hidden"),
        (["--dtype=float8"], 2, "--dtype"),
        (["--parallel=horovod"], 2, "--parallel"),
        (["--nonsense"], 2, "--nonsense"),
    ],
)
def test_bad_input_is_one_line(train, arguments, code, message):
    Path("empty.txt").touch()
    Path("latin-1.txt").write_bytes(b"caf\xe9 " * 100)
    Path("loop").symlink_to("loop")
    before = names_in_directory()
    assert_one_error(train(*arguments), code, message)
    assert names_in_directory() == before


def test_backend_that_cannot_run_is_one_line(train, monkeypatch):
    monkeypatch.setattr(routing, "FROM_ENVIRONMENT", "triton")
    monkeypatch.setattr(routing, "why_not_triton", lambda device, dtype: "the obstacle")
    assert_one_error(train(), 1, "cannot run here: the obstacle")


def test_unknown_command(program):
    assert_one_error(program("trian"), 2, "trian")


# The parts


def test_windows_follow_each_other_through_the_streams():
    corpus = text.build_corpus(TEXT, batch=4, window=9)
    windows = [corpus.training_window(step) for step in range(corpus.windows_per_epoch + 1)]
    assert [fresh for _, _, fresh in windows] == [True, *[False] * (corpus.windows_per_epoch - 1), True]
    assert same(windows[0], windows[-1])
    inputs, targets, _ = map(list, zip(*windows[:-1], strict=True))
    length = corpus.windows_per_epoch * 9
    assert torch.equal(torch.cat(inputs, 1), corpus.training[:, :length])
    assert torch.equal(torch.cat(targets, 1), corpus.training[:, 1 : length + 1])


def test_tokens_spell_the_text_and_validation_is_its_tail():
    written = "añ😀\n" * 50
    corpus = text.build_corpus(written, batch=1, window=3)
    spelled = ["".join(corpus.vocabulary[token] for token in part[0]) for part in (corpus.training, corpus.validation)]
    assert spelled == [written[:180], written[180:]]


@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
def test_models_start_from_the_same_weights(spec):
    baseline = model.build_baseline(30, embedding=5, hidden=4, layers=2, seed=3)
    variant = model.build_variant(baseline, spec, seed=3)
    expected, actual = baseline.state_dict(), variant.state_dict()
    for name, weight in expected.items():
        rows_left_out = 4 if spec.coupled and name.startswith("lstm.") else 0
        assert torch.equal(weight[rows_left_out:], actual[name])
    assert {name.split("_l")[0] for name in actual.keys() - expected.keys()} == (
        {"lstm.weight_ch"} if spec.peephole else set()
    )


def test_validation_carries_the_state_from_window_to_window():
    run = small_run(hidden=16)
    streams = run.corpus.validation
    with torch.no_grad():
        logits, _ = run.baseline.model(streams[:, :-1])
        expected = training.bits_per_character(logits, streams[:, 1:]).item()
    assert training.evaluate(run.baseline.model, streams, window=7) == pytest.approx(expected, rel=1e-5)


def test_a_step_carries_a_detached_state_and_changes_the_weights():
    run = small_run()
    learner = run.baseline
    inputs, targets, _ = run.corpus.training_window(0)
    before = learner.model.decoder.weight.clone()
    loss, state = training.training_step(learner.model, learner.optimizer, inputs, targets, None)
    assert not loss.requires_grad
    assert [(part.requires_grad, part.shape) for part in state] == [(False, (1, 4, 8))] * 2
    assert not torch.equal(learner.model.decoder.weight, before)


def test_state_is_carried_through_an_epoch_and_reset_after_it(monkeypatch):
    run = training.Run(SETTINGS, text.build_corpus(TEXT[:200], 4, 9), World(torch.device("cpu")))
    genuine, states = training.training_step, {learner.model: [] for learner in run.learners}

    def training_step(model, optimizer, inputs, targets, state):
        states[model].append(state)
        return genuine(model, optimizer, inputs, targets, state)

    monkeypatch.setattr(training, "training_step", training_step)
    assert run.corpus.windows_per_epoch == 4
    list(run.steps(6, evaluate_every=6))
    for seen in states.values():
        assert [state is None for state in seen] == [True, False, False, False, True, False]


def test_models_take_turns_in_going_first(monkeypatch):
    run = small_run()
    genuine, order = training.training_step, []

    def training_step(model, *arguments):
        order.append([learner.model for learner in run.learners].index(model))
        return genuine(model, *arguments)

    monkeypatch.setattr(training, "training_step", training_step)
    list(run.steps(3, evaluate_every=3))
    assert order == [0, 1, 1, 0, 0, 1]


def test_rates_leave_out_the_warm_up():
    learner = small_run().baseline
    learner.seconds = [9.0] * training.WARM_UP_STEPS
    assert learner.seconds_per_step() == 9
    learner.seconds += [1.0, 2.0, 3.0]
    assert learner.seconds_per_step() == 2


def test_sample_is_decided_by_its_seed():
    run = small_run()
    prompt = run.corpus.validation[0, :9]

    def write(seed):
        return model.sample(run.baseline.model, run.corpus.vocabulary, prompt, 50, temperature=1.0, seed=seed)

    assert len(write(0)) == 50
    assert write(0) == write(0) != write(1)


def test_temperature_decides_how_closely_the_sample_follows_the_model():
    run = small_run()
    with torch.no_grad():
        run.baseline.model.decoder.bias[run.corpus.vocabulary.index("e")] += 3
    prompt = run.corpus.validation[0, :9]
    cold, hot = (
        model.sample(run.baseline.model, run.corpus.vocabulary, prompt, 50, temperature, seed=0)
        for temperature in (0.1, 10.0)
    )
    assert cold == "e" * 50
    assert hot.count("e") < 25


def test_sampled_text_cannot_steer_the_terminal():
    assert app.printable("a\x1b[2J\r\tb\n") == "a�[2J�\tb\n"


def test_smoothing_neither_lags_nor_bends_a_line():
    line = [float(number) for number in range(100)]
    assert report.smoothed(line) == pytest.approx(line)
    noise = [float(number % 2) for number in range(100)]
    assert max(abs(average - 0.5) for average in report.smoothed(noise)[2:-2]) < 0.2


def test_live_display_on_a_terminal():
    console = Console(file=StringIO(), force_terminal=True, width=100)
    run = small_run()
    with progress.display_for(console, run, 3) as display:
        assert isinstance(display, progress.LiveDisplay)
        for _ in run.steps(3, evaluate_every=3):
            display.update()
    last = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", console.file.getvalue()).splitlines()[-4:]
    assert "3/3" in last[0]
    assert re.search(
        rf"standard +{run.variants[0].recent_loss():.3f} +{run.variants[0].validation[3]:.3f} +[\d,]+", last[3]
    )


@pytest.mark.parametrize(
    "suffix, begins",
    [
        (".png", b"\x89PNG"),
        (".PNG", b"\x89PNG"),
        (".svg", b"<?xml"),
        (".pdf", b"%PDF"),
        (".jpg", b"\xff\xd8\xff"),
        (".jpeg", b"\xff\xd8\xff"),
    ],
)
def test_the_suffix_is_the_format_of_the_curves(train, suffix, begins):
    assert suffix.lower() in report.PLOT_SUFFIXES
    assert train("--steps=1", f"--plot=curves{suffix}")[0] == 0
    picture = Path(f"curves{suffix}").read_bytes()
    assert picture.startswith(begins)
    assert (b"<svg" in picture) == (suffix == ".svg")


def test_every_suffix_is_a_format_of_matplotlib():
    from matplotlib.figure import Figure

    assert {suffix[1:] for suffix in report.PLOT_SUFFIXES} <= Figure().canvas.get_supported_filetypes().keys()


@pytest.mark.parametrize("steps, ratio, words", [(24, "-", "A ratio needs 25 steps."), (25, "2.00x", "first 5")])
def test_a_ratio_of_speeds_needs_steps(steps, ratio, words):
    run = small_run()
    list(run.steps(1, evaluate_every=1))
    run.baseline.seconds = [2.0] * steps
    run.variants[0].seconds = [1.0] * steps
    console = Console(file=StringIO(), width=200)
    console.print(report.results_table(run))
    printed = console.file.getvalue()
    assert rows(printed)["standard"][3] == ratio
    assert words in " ".join(printed.split())


def test_few_plain_lines_off_a_terminal():
    console = Console(file=StringIO(), width=100)
    run = small_run()
    with progress.display_for(console, run, 25) as display:
        assert isinstance(display, progress.PlainDisplay)
        for _ in run.steps(25, evaluate_every=25):
            display.update()
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 9
    assert re.fullmatch(
        r"step 25/25: torch\.nn\.LSTM [\d.]+ bits/char [\d,]+ chars/s; standard [\d.]+ bits/char [\d,]+ chars/s",
        lines[-1],
    )


def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path, monkeypatch):
    path = tmp_path / "alone" / "report.md"
    path.parent.mkdir()
    files.write_whole(path, b"old")
    files.write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    with pytest.raises(UserError, match=r"cannot write the words .*/report\.md/below: Not a directory"):
        files.write_whole(path / "below", b"", "the words")
    files._temporary(path).touch()
    files.check_writable(path)
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(UserError, match="full"):
        files.write_whole(path, b"half")
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]
