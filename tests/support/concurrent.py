"""Run the programs of one launch at the same time, on the CPU: one forked process a program, tensors in shared memory.

Triton's interpreter runs a grid one program after another, so programs that wait for each other never end. Its loads,
stores and atomics act on real memory, though: with a process for each program the same kernel runs to its end.

Memory here is harsher than the CPU's own, so that a kernel does not get what it may not count on. Every program is held
up at random before it loads, stores or adds; a block is loaded and stored in two random parts with a pause between; and
a program's stores stay invisible to the others until its next barrier or load, in any order, whatever atomics it sends
after them: so may those of the other threads of a program on a GPU. What it cannot show is a load made too early.

Needs TRITON_INTERPRET=1 and the `fork` start method.
"""

from __future__ import annotations

import itertools
import math
import mmap
import multiprocessing
import multiprocessing.connection
import os
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from numpy.random import default_rng
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpretedFunction, TensorHandle, interpreter_builder

Grid = tuple[int, ...]
Index = tuple[int, int, int]

DELAY = 5e-4
"""Seconds: the longest pause before an access to memory."""

DEADLINE = 30.0
"""Seconds: how long the programs of a launch may take together."""


class ProgramsDidNotEnd(AssertionError):
    """Programs of a launch were still running at the deadline."""


class ProgramFailed(AssertionError):
    """A program of a launch raised; the message has its index and its traceback."""


def run_concurrently(
    kernel: InterpretedFunction, grid: Grid, arguments: dict[str, Any], *,
    seed: int = 0, delay: float = DELAY, deadline: float = DEADLINE,
) -> None:  # fmt: skip
    """Launch an interpreted kernel with all its programs at the same time; tensors are updated in place.

    - grid: 1 to 3 numbers; as many processes as their product
    - arguments: by name; tensors that share a storage still share it
    - seed: of the pauses; delay: the longest, seconds; 0 for none, and for memory as it is
    - deadline: seconds until all programs are killed and `ProgramsDidNotEnd` names those that had not ended
    """
    if not isinstance(kernel, InterpretedFunction):
        raise TypeError(f"{kernel} is compiled: set TRITON_INTERPRET=1 before it is imported")
    sizes = tuple(grid) + (1,) * (3 - len(grid))
    with shared_tensors(arguments) as shared, prepared(kernel) as patch_language:
        programs = {}
        fork = multiprocessing.get_context("fork")
        start, started = os.pipe()
        try:
            for index in itertools.product(*map(range, sizes)):
                reader, writer = fork.Pipe(duplex=False)
                run = (kernel, sizes, index, shared, f"{seed} {index}", delay, deadline, patch_language)
                process = fork.Process(target=run_program, args=(*run, (start, started), writer), daemon=True)
                process.start()
                writer.close()
                programs[index] = (process, reader)
            os.close(started)  # end of file: all start
            started = None
            watch(programs, getattr(kernel, "__name__", str(kernel)), deadline)
        finally:
            for descriptor in (start, started):
                if descriptor is not None:
                    os.close(descriptor)
            for process, reader in programs.values():
                process.kill()
                process.join()
                process.close()
                reader.close()


@contextmanager
def concurrent_programs(
    kernels: dict[ModuleType, list[str]], *, seed: int = 0, delay: float = DELAY, deadline: float = DEADLINE
) -> Iterator[list[Grid]]:
    """Replace the named kernels of each module, so that real launchers run their programs at the same time.

    Yields the list that the grid of every launch is added to. Each launch has its own seed, made from `seed`.
    """
    grids: list[Grid] = []

    def stand_in(kernel: InterpretedFunction) -> Any:
        def launch(grid: Grid, *args: Any, **kwargs: Any) -> None:
            arguments = dict(zip(kernel.arg_names, args, strict=False))
            arguments |= {name: value for name, value in kwargs.items() if name in kernel.arg_names}
            grid = grid(arguments) if callable(grid) else grid
            grids.append(grid)
            run_concurrently(kernel, grid, arguments, seed=1000 * seed + len(grids), delay=delay, deadline=deadline)

        return StandIn(kernel, launch)

    with pytest.MonkeyPatch.context() as patch:
        for module, names in kernels.items():
            for name in names:
                patch.setattr(module, name, stand_in(getattr(module, name)))
        yield grids


class StandIn:
    """Launches as a kernel does, `kernel[grid](...)`, by a function of the grid and the arguments."""

    def __init__(self, kernel: InterpretedFunction, launch: Callable[..., None]) -> None:
        self.kernel, self.launch = kernel, launch

    def __getitem__(self, grid: Grid) -> Callable[..., None]:
        return lambda *args, **kwargs: self.launch(grid, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)


@contextmanager
def shared_tensors(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The arguments with every tensor's storage in memory that forked processes share; copied back at the end."""
    copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    shared = {}
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor) or value.untyped_storage().nbytes() == 0:
            shared[name] = value
            continue
        storage = value.untyped_storage()
        if storage.data_ptr() not in copies:
            original = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))
            copy = torch.frombuffer(mmap.mmap(-1, storage.nbytes()), dtype=torch.uint8)
            copy.copy_(original)
            copies[storage.data_ptr()] = (original, copy)
        copy = copies[storage.data_ptr()][1].untyped_storage()
        view = torch.empty(0, dtype=value.dtype)
        shared[name] = view.set_(copy, value.storage_offset(), value.size(), value.stride())
    yield shared
    for original, copy in copies.values():
        original.copy_(copy)


@contextmanager
def prepared(kernel: InterpretedFunction) -> Iterator[Callable[[Any], Any]]:
    """What the interpreter would do anew in each process, and at each call of a device function, done before the fork.

    That is rewriting the functions that the kernel may call, and patching triton.language, milliseconds each, and
    importing what it needs to look at arguments, a tenth of a second. Yields what takes the place of its own patching.
    """
    interpreter._implicit_cvt(0)
    functions, unseen = [], [kernel, *interpreted_in(vars(tl.standard))]
    while unseen:
        functions.append(unseen.pop())
        found = interpreted_in(functions[-1].fn.__globals__)
        unseen += [function for function in found if function not in functions and function not in unseen]
    patched: set[int] = set()
    scopes = []

    def patch_once(function: Any) -> Any:
        languages = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
        new = languages - patched
        patched.update(languages)
        return interpreter_patch(function) if new else interpreter._LangPatchScope()

    interpreter_patch = interpreter._patch_lang
    try:
        for function in functions:
            function.rewrite()
            if function.fn.__module__ != tl.standard.__name__:
                scopes.append(patch_once(function.fn))
        yield patch_once
    finally:
        for scope in reversed(scopes):
            scope.restore()


def interpreted_in(namespace: dict[str, Any]) -> list[InterpretedFunction]:
    """The interpreted functions among a module's names."""
    return [value for value in namespace.values() if isinstance(value, InterpretedFunction)]


def watch(programs: dict[Index, tuple[Any, Any]], name: str, deadline: float) -> None:
    """Wait until all programs have ended; raise when one fails or the time is up."""
    running = {process.sentinel: index for index, (process, _) in programs.items()}
    end = time.monotonic() + deadline
    while running:
        for sentinel in multiprocessing.connection.wait(list(running), max(0.0, end - time.monotonic())):
            index = running.pop(sentinel)
            process, reader = programs[index]
            process.join()
            if process.exitcode != 0:
                why = reader.recv() if reader.poll() else f"exit code {process.exitcode}"
                raise ProgramFailed(f"program {index} of {name} failed:\n{why}")
        if running and time.monotonic() >= end:
            still = ", ".join(map(str, sorted(running.values())))
            raise ProgramsDidNotEnd(f"{name}: not ended after {deadline:g} s: programs {still}")


def run_program(
    kernel: InterpretedFunction, sizes: Index, index: Index, arguments: dict[str, Any], seed: str, delay: float,
    deadline: float, patch_language: Callable[[Any], Any], start: tuple[int, int], writer: Any,
) -> None:  # fmt: skip
    """What a forked process does: one program of the launch. Never returns."""
    code = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, deadline + 10)  # ends this process where the parent was killed
        torch.set_num_threads(1)
        os.close(start[1])
        os.read(start[0], 1)  # returns when the parent has forked all and closes its end
        memory = HarshMemory(random.Random(seed), delay)
        memory.install()
        set_index, set_size = interpreter_builder.set_grid_idx, interpreter_builder.set_grid_dim
        interpreter_builder.set_grid_dim = lambda *_: set_size(*sizes)
        interpreter_builder.set_grid_idx = lambda *_: set_index(*index)
        interpreter._patch_lang = patch_language
        # Writes every storage onto itself at the end: it would undo what others store meanwhile.
        GridExecutor._restore_args_dev = lambda *_: None
        kernel[(1,)](**arguments)
        memory.flush()
        code = 0
    except BaseException:
        writer.send(traceback.format_exc()[-16_000:])  # a pipe holds 64 kB
    finally:
        os._exit(code)  # nothing of the parent's (fixtures, exit handlers, buffers) runs a second time


class HarshMemory:
    """Stands between the interpreter and memory: pauses, blocks in two parts, stores that are seen late."""

    def __init__(self, generator: random.Random, delay: float) -> None:
        self.generator, self.delay = generator, delay
        self.random = default_rng(generator.getrandbits(64))
        self.pending: list[tuple[np.ndarray, Callable[[], None]]] = []
        self.load, self.store = interpreter_builder.create_masked_load, interpreter_builder.create_masked_store
        self.rmw, self.cas = interpreter_builder.create_atomic_rmw, interpreter_builder.create_atomic_cas

    def install(self) -> None:
        interpreter_builder.create_masked_load = self.masked_load
        interpreter_builder.create_masked_store = self.masked_store
        interpreter_builder.create_barrier = self.flush
        interpreter_builder.create_atomic_rmw = self.after_a_pause(self.rmw)
        interpreter_builder.create_atomic_cas = self.after_a_pause(self.cas)

    def pause(self) -> None:
        """Nothing, mostly; else up to `delay` seconds. Lets another process run in any case."""
        if self.delay and self.generator.random() < 0.3:
            time.sleep(self.delay * self.generator.random())
        else:
            os.sched_yield()

    def after_a_pause(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def paused(operation_or_pointers: Any, *args: Any) -> Any:
            pointers = args[0] if function == self.rmw else operation_or_pointers
            self.flush_if_stored(pointers)
            self.pause()
            return function(operation_or_pointers, *args)

        return paused

    def parts(self, mask: TensorHandle) -> list[TensorHandle]:
        """The mask in two random parts; as it is without delays or if a scalar's."""
        if not self.delay or math.prod(mask.data.shape) == 1:
            return [mask]
        first = self.random.random(mask.data.shape) < self.random.random()
        return [TensorHandle(mask.data & first, mask.dtype), TensorHandle(mask.data & ~first, mask.dtype)]

    def masked_load(self, pointers: TensorHandle, mask: TensorHandle, other: Any, *options: Any) -> TensorHandle:
        self.flush()  # a program sees its own stores
        for part in self.parts(mask):
            self.pause()
            other = self.load(pointers, part, other, *options)  # elsewhere: what the part before loaded
        return other

    def masked_store(self, pointers: TensorHandle, value: TensorHandle, mask: TensorHandle, *options: Any) -> None:
        self.flush_if_stored(pointers)
        for part in self.parts(mask):
            self.pending.append((pointers.data, lambda part=part: self.store(pointers, value, part, *options)))
        if not self.delay:
            self.flush()

    def flush_if_stored(self, pointers: TensorHandle) -> None:
        """A program's accesses to one address keep their order."""
        if any(np.intersect1d(pointers.data, stored).size for stored, _ in self.pending):
            self.flush()

    def flush(self) -> None:
        """Make the stores so far visible to all programs, in any order."""
        pending, self.pending = self.pending, []
        self.generator.shuffle(pending)
        for _, store in pending:
            self.pause()
            store()
