"""The model of one multiprocessor: an issue simulation of the warps of one thread block.

Each of four sub-partitions issues at most one instruction a cycle, in order within a warp. Stall counts, scoreboards
and barriers are those of the code; latencies and rates are those of `Machine`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from benchmarks.simulator.conflicts import needed_wavefronts
from benchmarks.simulator.sass import NONE, Instruction
from benchmarks.simulator.step import ARRIVES, LOADS, ONCE, ONE_THREAD, POLLS, STREAMS, Step, names, polls


@dataclass(frozen=True)
class Machine:
    """The constants of an H100 SXM, in cycles unless named. But for the rates of L2 none was measured for this project.

    - clock_ghz: the boost clock; at 1.98 GHz all simulated times are 11 % shorter
    - l2: from a load that hits L2 to its first byte (near 263, far 414: arXiv 2402.13499, 2501.12084); a store or an
      atomic takes half of it to get there, an assumption that agrees with published handoffs by compare-and-swap
    - port, l2_bytes: bytes a cycle from L2 of one multiprocessor, and of all together: fitted to 38 steps of the
      kernels in Gluon that an H100 measured, whose programs all read at the same time (3942 of all were measured on an
      H800 with 114 multiprocessors, 2402.13499)
    - stream_bytes: bytes a cycle of one multiprocessor, of streamed weights that L2 holds: nobody else reads the same
      (`gpus.L2_BYTES_PER_CLOCK`); memory_bytes: of all together from device memory, 3352 GB/s
    - dram: a load that misses L2; fence: a release beyond the round trip of the stores it covers; atomic_gap: from one
      atomic operation at an address to the next; skew: how much later than this thread block the last of the others
      publishes. All assumptions
    - shared: a load from shared memory (A100, 2206.02874); shuffle, mufu, redux: latencies (A100; assumptions)
    - barrier: fixed part, and for every warp (A100: 21 and 2, its issue included)
    - hmma_gap: from one HMMA of 16 x 8 x 16 half-precision values to the next (2402.13499: 6.6); TF32 takes twice as
      long for as many products, an assumption
    - constant, branch, operand_read: reading constants and special registers, a branch taken, reading the operands of
      a memory instruction. Assumptions
    """

    clock_ghz: float = 1.755
    l2: int = 340
    port: float = 32.0
    l2_bytes: float = 2560.0
    stream_bytes: float = 40.0
    memory_bytes: float = 1910.0
    dram: int = 600
    fence: int = 100
    atomic_gap: float = 2.0
    shared: int = 23
    shuffle: int = 24
    mufu: int = 22
    redux: int = 30
    barrier: tuple[int, int] = (14, 2)
    hmma_gap: int = 7
    constant: int = 30
    branch: int = 8
    operand_read: int = 12
    skew: int = 0


H100 = Machine()

MACHINES = {"h100": H100}
"""By the name of the GPU in `lstm_triton_kernels.gpus`."""

PIPES = {
    "alu": {
        "ISETP", "LOP3", "PRMT", "SEL", "IADD3", "VIMNMX", "SHF", "LEA", "FSETP", "FSEL", "PLOP3", "F2FP", "P2R", "R2P",
        "FMNMX", "IABS", "VIADD", "MOV", "HFMA2", "HADD2", "VOTE", "POPC", "FLO", "SGXT", "BMSK", "CS2R",
    },
    "imad": {"IMAD"},
    "mufu": {"MUFU", "I2F", "F2I", "F2F", "I2FP", "REDUX"},
    "tensor": {"HMMA"},
}  # fmt: skip
"""Instructions that occupy a pipe of a sub-partition for more than a cycle."""

PIPE_OF = {name: pipe for pipe, members in PIPES.items() for name in members}
GAP = {"alu": 2, "imad": 2, "mufu": 8}
MEMORY = {"LDS", "STS", "LDSM", "SHFL", "LDG", "STG", "ATOMG", "ATOM", "RED", "REDG", "ATOMS", "STSM"}
UNKNOWN = {"HGMMA", "LDGSTS", "UBLKCP", "UTMALDG", "UTMASTG", "SYNCS"}
"""Instructions that run beside the warp's own or wait for such: the model has none of them."""
PUBLISHES = {"STG", "ATOMG", "ATOM", "RED", "REDG"}
"""Those by which others see something; what else a function that publishes is made of may stand before another wait."""
QUEUE = 16
"""Cycles that memory instructions may be issued ahead of their common path."""

ISSUE = 20
"""Latency of an instruction that signals a scoreboard and has no constant of its own."""

NEVER = 1 << 40
LONGEST = 1 << 22
"""Cycles after which a simulation that has not ended is given up."""


class Issue(NamedTuple):
    """One issued instruction: cycle, iteration of the time loop, phase; in the step: not of a repeated poll."""

    cycle: int
    iteration: int
    phase: str
    in_step: bool


@dataclass
class Warp:
    """Where a warp is: place in its code, iteration, when it may issue; origin: of the detour it is in, else None."""

    number: int
    code: list[Instruction]
    phases: list[str]
    place: int = 0
    iteration: int = 0
    ready: int = 0
    scoreboards: list[list[int]] = field(default_factory=lambda: [[] for _ in range(6)])
    origin: int | None = None
    at_barrier: bool = False
    barriers: int = 0
    stores: list[int] = field(default_factory=list)
    log: list[Issue] = field(default_factory=list)
    polled: int = 0


class ThreadBlock:
    """The simulation of one thread block of `readers`, which read what each other publishes.

    - counter: whether they wait by a counter, else by the data
    - row_blocks: that it works through in a time step, one an iteration
    - fill: the share of a tile's rows that exist
    - together: such thread blocks, each with rows of its own, that share the multiprocessor
    - by_warp: whether a warp has rows of its own, and waits only for the warps of other thread blocks that have them
    - streams: thread blocks that stream weights of their own, which share the rate of device memory

    Raises NotImplementedError for an instruction that the model does not have.
    """

    def __init__(
        self, step: Step, warps: int, machine: Machine, readers: int, counter: bool, row_blocks: int, fill: float,
        together: int = 1, by_warp: bool = False, streams: int = 1,
    ) -> None:  # fmt: skip
        if unknown := {one.name for one in step.code} & UNKNOWN:
            raise NotImplementedError(f"the model of the machine has no {', '.join(sorted(unknown))}")
        self.step, self.machine, self.row_blocks, self.fill = step, machine, row_blocks, fill
        self.port = min(machine.port, machine.l2_bytes / readers)
        self.memory_port = machine.memory_bytes / streams
        self.readers, self.counter = readers, counter
        self.size, self.publishers = warps, 1 if by_warp else warps
        self.warps = [Warp(n, step.code, step.phases) for n in range(warps * together)]
        self.pipe_free: dict[tuple[str, int], float] = {}
        self.memory_free = 0.0
        self.port_free = 0.0
        self.memory_port_free = 0.0
        self.waiting: dict[tuple[int, int], list[tuple[Warp, int]]] = {}  # at a barrier, by thread block and number
        self.published: dict[tuple[int, int, int], int] = {}  # when, by thread block (or warp), iteration, exchange
        self.waits = sorted(step.detours)  # their places
        places = [n for n, phase in enumerate(step.phases) if phase == "store" and step.code[n].name in PUBLISHES]
        stores = {self.exchange_of(n) for n in places}
        self.exchanges = sorted(stores) or [len(self.waits)]
        self.samples: dict[tuple[int, int, int], int] = {}  # when a poll first read what others publish
        self.failed_polls: Counter[int] = Counter()  # by iteration

    def run(self, iterations: int) -> None:
        """Simulate until every warp has done so many iterations."""
        now = 0
        last: dict[int, int] = {}
        while any(warp.iteration < iterations for warp in self.warps):
            moved, soonest = False, NEVER
            for part in range(4):
                own = [warp for warp in self.warps if warp.number % 4 == part and warp.iteration < iterations]
                own.sort(key=lambda warp: (warp.number != last.get(part), warp.number))
                for warp in own:
                    when = self.earliest(warp, part)
                    if when <= now:
                        self.issue(warp, part, now)
                        last[part] = warp.number
                        moved = True
                        break
                    soonest = min(soonest, when)
            now = now + 1 if moved or soonest >= NEVER else max(now + 1, soonest)
            if now > LONGEST:
                raise RuntimeError(f"the simulation has not ended after {LONGEST} cycles")

    def earliest(self, warp: Warp, part: int) -> int:
        """Return when the warp's next instruction could issue."""
        if warp.at_barrier:
            return NEVER
        one, when = warp.code[warp.place], warp.ready
        for n in range(6):
            if one.wait >> n & 1 and warp.scoreboards[n]:
                when = max(when, max(warp.scoreboards[n]))
        pipe = PIPE_OF.get(one.name)
        if pipe:
            when = max(when, int(self.pipe_free.get((pipe, part), 0)))
        if one.name in MEMORY:
            when = max(when, int(self.memory_free) - QUEUE)
        return when

    def issue(self, warp: Warp, part: int, now: int) -> None:
        """Issue the warp's next instruction."""
        one, phase = warp.code[warp.place], warp.phases[warp.place]
        warp.log.append(Issue(now, warp.iteration, phase, warp.origin is None))
        warp.ready = now + max(1, one.stall)
        pipe = PIPE_OF.get(one.name)
        if pipe:
            gap = self.tensor_gap(one) if pipe == "tensor" else GAP[pipe]
            self.pipe_free[pipe, part] = max(now, self.pipe_free.get((pipe, part), 0)) + gap
        done = now + self.latency(one, warp, now)
        if one.write < NONE:
            hold(warp, one.write, done)
        if one.read < NONE:
            hold(warp, one.read, now + self.machine.operand_read)
        if one.name == "BAR":
            self.meet(warp, now)
        else:
            self.advance(warp, now)

    def latency(self, one: Instruction, warp: Warp, now: int) -> int:
        """Return the cycles until a result is there, its time in the queues included."""
        machine, name = self.machine, one.name
        if one.predicate and warp.number % self.size and ONE_THREAD & set(names(one)):
            return 1  # one thread of the block does it
        if name in ("LDS", "STS", "LDSM", "ATOMS", "STSM"):
            needed = needed_wavefronts(one)
            waves = self.step.wavefronts.get(warp.place, needed) if warp.origin is None else needed
            start = self.occupy_memory(now, waves)
            return int(start - now + machine.shared + 2 * (needed - 1) + max(0.0, waves - needed))
        if name == "SHFL":
            return int(self.occupy_memory(now, 2) - now + machine.shuffle)
        if name == "LDG":
            return self.load(one, warp, now)
        if name == "STG":
            self.occupy_memory(now, max(1, one.width // 4))
            if warp.phases[warp.place] == "store":
                warp.stores.append(now)
                if not self.counter:
                    self.publish(warp, now + machine.l2 // 2)
            return machine.operand_read
        if name in ("ATOMG", "ATOM", "RED", "REDG"):
            return self.count(one, warp, now)
        if name == "MEMBAR":
            stored = [cycle + machine.l2 for other in self.beside(warp) for cycle in other.stores[-8:]]
            until = max(stored, default=now) + machine.fence
            warp.ready = max(warp.ready, until)
            return max(0, until - now)
        if name in ("MUFU", "F2F", "I2F", "F2I"):
            return machine.mufu
        if name == "REDUX":
            return machine.redux
        if name in ("LDC", "S2R", "S2UR", "R2UR", "ULDC"):
            return machine.constant
        return ISSUE

    def tensor_gap(self, one: Instruction) -> float:
        """Return the cycles that an HMMA, such as `HMMA.1688.F32.TF32`, keeps the tensor core of its sub-partition."""
        depth = int(one.opcode.split(".")[1][3:])  # 16816: products of 16 x 8 outputs, 16 deep
        return self.machine.hmma_gap * depth / 16 * (2 if "TF32" in one.opcode else 1)

    def occupy_memory(self, now: int, cycles: float) -> float:
        """Hold the common path of the memory instructions for so many cycles; return from when on."""
        start = max(now, self.memory_free)
        self.memory_free = start + cycles
        return start

    def load(self, one: Instruction, warp: Warp, now: int) -> int:
        """Return the latency of a load from global memory: from L2 what others publish, from device memory the rest."""
        start = self.occupy_memory(now, max(1, one.width // 4))
        if ONCE & set(names(one)):
            return ISSUE
        if STREAMS & set(names(one)):
            return int(self.stream(one, start) - now)
        if not (POLLS | LOADS) & set(names(one)) and "STRONG" not in one.opcode:
            return self.machine.dram
        if polls(one):
            self.sample(warp, now)
        again = 0.25 if self.step.apart and warp.origin is not None else 1.0  # a part of them, an assumption
        moved = 32 * one.width * self.fill * again
        self.port_free = max(self.port_free, start + self.machine.l2) + moved / self.port
        return int(self.port_free - now)

    def stream(self, one: Instruction, start: float) -> float:
        """Return when streamed weights are there: from device memory those that leave L2 first, from L2 the others."""
        if ".EF" in one.opcode:
            from_memory = max(self.memory_port_free, start + self.machine.dram)
            self.memory_port_free = from_memory + 32 * one.width / self.memory_port
            return self.memory_port_free
        self.port_free = max(self.port_free, start + self.machine.l2) + 32 * one.width / self.machine.stream_bytes
        return self.port_free

    def count(self, one: Instruction, warp: Warp, now: int) -> int:
        """Return the latency of an atomic operation on the counter: the arrival of this thread block, or a poll."""
        machine = self.machine
        if ARRIVES & set(names(one)):
            self.publish(warp, int(now + machine.l2 // 2 + machine.atomic_gap * self.readers))
            return machine.l2
        if warp.number % self.size == 0:
            self.sample(warp, now)
        return machine.l2 + int(machine.atomic_gap * self.readers / 2)

    def sample(self, warp: Warp, now: int) -> None:
        """Note when a load or an atomic operation of a poll reads in L2 what others publish; the first one counts."""
        key, when = self.poll_of(warp), now + self.machine.l2 // 2
        self.samples[key] = min(self.samples.get(key, when), when)

    def poll_of(self, warp: Warp) -> tuple[int, int, int]:
        """Return which poll a warp is at: of all warps of its thread block together, or its own."""
        return warp.iteration, warp.polled, warp.number if self.step.apart else warp.number // self.size

    def beside(self, warp: Warp) -> list[Warp]:
        """Return the warps of a warp's thread block."""
        return [other for other in self.warps if other.number // self.size == warp.number // self.size]

    def publish(self, warp: Warp, when: int) -> None:
        """Note from when on what is stored in this iteration is visible; the last store counts."""
        key = warp.number // self.publishers, warp.iteration, self.exchange_of(warp.place)
        self.published[key] = max(self.published.get(key, 0), when)

    def exchange_of(self, place: int) -> int:
        """Return the number of the exchange that a store at a place belongs to: of the waits before it in a step."""
        return bisect_left(self.waits, place)

    def meet(self, warp: Warp, now: int) -> None:
        """Wait at a barrier of all warps; the last one releases them."""
        key = warp.number // self.size, warp.barriers
        group = self.waiting.setdefault(key, [])
        group.append((warp, now))
        warp.at_barrier = True
        if len(group) < self.size:
            return
        del self.waiting[key]
        release = now + self.machine.barrier[0] + self.machine.barrier[1] * self.size
        for member, came in group:
            member.at_barrier = False
            member.barriers += 1
            stall = member.code[member.place].stall
            self.advance(member, release - 1)
            member.ready = max(member.ready, release, came + stall)

    def advance(self, warp: Warp, now: int) -> None:
        """Go to the next instruction: into a detour while a poll fails, to the next iteration at the end."""
        if warp.origin is not None:
            warp.place += 1
            if warp.place < len(warp.code):
                return
            warp.ready += self.machine.branch
            if self.failed(warp):
                warp.place = 0
                warp.polled += 1
                return
            place = warp.origin
            warp.code, warp.phases, warp.origin = self.step.code, self.step.phases, None
            warp.polled = self.first_poll_after(place)
            warp.place = place + 1
        elif warp.place in self.step.detours and self.failed(warp):
            warp.origin = warp.place
            warp.code = self.step.detours[warp.place]
            warp.phases = ["again"] * len(warp.code)
            warp.place = 0
            warp.polled += 1
            if warp.number == 0:
                self.failed_polls[warp.iteration] += 1
        else:
            if warp.place in self.step.detours:
                warp.polled = self.first_poll_after(warp.place)
            warp.place += 1
        if warp.origin is None and warp.place >= len(warp.code):
            warp.place, warp.iteration, warp.polled = 0, warp.iteration + 1, 0
            warp.ready += self.machine.branch

    def first_poll_after(self, place: int) -> int:
        """Return the number of the first poll after a detour of the step: each wait has numbers of its own."""
        return 100_000 * (list(self.step.detours).index(place) + 1)

    def failed(self, warp: Warp) -> bool:
        """Whether the poll before was too early for what the other thread blocks published.

        That is the last exchange before the wait: of the step itself, or of the iteration before.
        """
        sample = self.samples.get(self.poll_of(warp))
        wait = self.waits.index(warp.place if warp.origin is None else warp.origin)
        within = [exchange for exchange in self.exchanges if exchange <= wait]
        iteration = warp.iteration if within else warp.iteration - self.row_blocks
        awaited = (warp.number // self.publishers, iteration, (within or self.exchanges)[-1])
        return sample is not None and sample < self.published.get(awaited, NEVER if within else 0) + self.machine.skew

    def critical(self, iteration: int) -> tuple[int, Counter[str]]:
        """Return the cycles from the publication of the iteration before to that of this one, in all and by phase.

        Along the warp that publishes last: each gap between two instructions is of the phase of the second.
        """

        def publication(warp: Warp, n: int) -> int:
            stored = [one.cycle for one in warp.log if one.iteration == n and one.phase == "store" and one.in_step]
            return max(stored or [one.cycle for one in warp.log if one.iteration == n])

        own = self.warps[: self.size]
        last = max(own, key=lambda warp: publication(warp, iteration))
        start = max(publication(warp, iteration - 1) for warp in own)
        end = publication(last, iteration)
        spent: Counter[str] = Counter()
        previous = start
        for one in last.log:
            if start < one.cycle <= end:
                spent[one.phase] += one.cycle - previous
                previous = one.cycle
        return end - start, spent


def hold(warp: Warp, scoreboard: int, until: int) -> None:
    """Keep a scoreboard of a warp set until then."""
    warp.scoreboards[scoreboard] = [cycle for cycle in warp.scoreboards[scoreboard] if cycle > until - 4000]
    warp.scoreboards[scoreboard].append(until)
