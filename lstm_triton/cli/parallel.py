"""Several processes that train as one, started by `torchrun`: what each knows of the others, and what they agree on.

One process is a world of size 1, in which every function here leaves everything as it is.

Shapes: N processes, B streams in all, L layers, H hidden units.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lstm_triton.cli.errors import UserError
from lstm_triton.cli.model import CharacterModel

Parallel = Literal["ddp", "fsdp"]
"""Every process holds the whole model (DistributedDataParallel), or an N-th of each parameter (`fully_shard`)."""

T = TypeVar("T")

_SECONDS_TO_REACH_THE_STORE = 5


@dataclass(frozen=True)
class Place:
    """Where a process stands: its number among all of them, how many there are, its number on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0


def place_in(environment: Mapping[str, str]) -> Place:
    """The place that `torchrun` gave this process; without `torchrun` it is the only one.

    Raises UserError if the variables are there in part, or say what cannot be.
    """
    if "WORLD_SIZE" not in environment:
        return Place()
    try:
        rank, size, local_rank = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    except KeyError as error:
        raise UserError(f"WORLD_SIZE is set, {error.args[0]} is not: start several processes with torchrun") from error
    except ValueError as error:
        raise UserError(f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers: {error}") from error
    if not (0 <= rank < size and 0 <= local_rank < size):
        raise UserError(f"RANK {rank} and LOCAL_RANK {local_rank} must be below WORLD_SIZE {size}")
    return Place(rank, size, local_rank)


def device_name(asked: str, place: Place) -> str:
    """The name of the device of a process, from what the user asked for: of several GPUs each takes its own.

    Raises UserError if all processes of a machine would use the same GPU.
    """
    if place.size == 1 or asked == "cpu":
        return asked
    if asked in ("auto", "cuda"):
        return f"cuda:{place.local_rank}" if asked == "cuda" or torch.cuda.is_available() else "cpu"
    if asked.startswith("cuda:"):
        raise UserError(f"--device {asked} is one GPU for {place.size} processes: cuda gives each its own")
    return asked


def check_shares(batch: int, size: int) -> None:
    """Raise UserError if B streams cannot be shared out equally among N processes."""
    if batch % size:
        raise UserError(f"--batch {batch} cannot be shared out among {size} processes: give a multiple of {size}")


@dataclass(frozen=True)
class World:
    """All processes, as one of them sees them.

    - device: that of this process
    - rank, size: its number and N
    - parallel: what is spread over the processes beside the streams
    - mesh: all processes in a row; None if there is one
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    parallel: Parallel = "ddp"
    mesh: DeviceMesh | None = None

    @property
    def leads(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0

    @property
    def description(self) -> str:
        """What computes, in words."""
        if self.size == 1:
            return str(self.device)
        return f"{self.size} {self.device.type} processes with {self.parallel}"

    def share(self, streams: Tensor) -> Tensor:
        """The streams of this process: (B, ...) -> (B / N, ...)."""
        return streams.chunk(self.size)[self.rank]

    def mean(self, number: float) -> float:
        """The mean of a number that each process has, in float64; the same in all of them."""
        if self.size == 1:
            return number
        total = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(total)
        return total.item() / self.size

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process; the same answer in all of them."""
        return self.mean(float(flag)) > 0

    def of_leader(self, value: T) -> T:
        """The value that the leader gives; what the others give does not matter."""
        if self.size == 1:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, src=0)
        return holder[0]

    def wrap(self, model: CharacterModel) -> nn.Module:
        """What a training step calls instead of the model, so that its gradients are the mean over all processes.

        The model is changed in place with `fully_shard`: its parameters become DTensors, to be given to an optimizer
        only afterwards.
        """
        if self.size == 1:
            return model
        if self.parallel == "ddp":
            return nn.parallel.DistributedDataParallel(model)
        from torch.distributed.fsdp import fully_shard

        for module in (model.lstm, model.decoder, model):
            fully_shard(module, mesh=self.mesh, reshard_after_forward=True)
        return model

    def whole_state(self, part: Tensor) -> Tensor:
        """A hidden or cell state of this process, (L, B / N, H), as its part of that of all streams, (L, B, H)."""
        if self.mesh is None:
            return part
        from torch.distributed.tensor import DTensor, Shard

        return DTensor.from_local(part, self.mesh, [Shard(1)], run_check=False)


@contextmanager
def joined(place: Place, device: torch.device, parallel: Parallel) -> Iterator[World]:
    """Inside, the processes work together: NCCL moves what is on GPUs, Gloo the rest and what they agree on."""
    if place.size == 1:
        yield World(device, parallel=parallel)
        return
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        # PyTorch's LSTM returns a view; nothing is done to it in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        yield World(device, place.rank, place.size, parallel, init_device_mesh(device.type, (place.size,)))
    except BaseException:
        # NCCL takes its communicators down together, and the others are elsewhere: then they end with the process.
        if not on_gpu:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


@contextmanager
def leader_prints(environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Inside, what any process but the leader prints goes nowhere."""
    if environment.get("RANK", "0") == "0":
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def speaks_first(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether no other process has failed before this one; true for one of them only.

    When a process fails, the others fail for want of it, and only its message says why. The store that `torchrun`
    keeps for the processes outlives each of them. If it cannot be reached, everyone speaks.
    """
    if environment.get("WORLD_SIZE", "1") == "1":
        return True
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=_SECONDS_TO_REACH_THE_STORE)))
        return dist.PrefixStore(f"lstm-triton/{attempt}", store).add("failures", 1) == 1
    except (RuntimeError, ValueError):
        return True
