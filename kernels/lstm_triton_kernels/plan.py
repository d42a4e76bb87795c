"""Plans of a persistent launch, how it is cut into thread blocks, and what may be wanted of one.

A plan is a value. Which there are for a layer is `planner.py`; which of them runs is settled by compiling (settle.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from lstm_triton_kernels.sizes import ceil_div


class Second(NamedTuple):
    """How the columns of a product within a step are cut, whose weights are all in shared memory.

    - chunks, group: as in PersistentPlan
    """

    chunks: int
    group: int


@dataclass(frozen=True)
class PersistentPlan:
    """One persistent launch.

    - block_u units and block_b rows in a program's tile, of which `rows` are used; block_k columns in a part of a
      chunk, `parts` parts, `chunks` chunks (resident.py, tiles.py), of which `group` are read at once. In Gluon there
      is a part for each warp, or one part, where the warps divide the rows instead
    - unit_programs, row_programs, directions: the grid; row_blocks: blocks of rows there are, at least row_programs
    - wait: how programs wait for each other (sync.py), None where one holds all units and need not; pause: clocks
      before the first poll of the data
    - exact: float32 products without tensor cores, by the kernels in plain Triton; else by those in Gluon
    - tile_bytes: of the resident weights of a program, padding included
    - register_bytes: of a thread, for accumulators and gate inputs (exact), or weights, operands and accumulators;
      shared_bytes: of a program; both as estimated
    - estimate_us: of one step
    - in Gluon, kept: chunks of weights in shared memory, the others are in registers; together: programs that share a
      multiprocessor; tiled: how the exchange buffer is laid out (polling.py); peephole, projection: the products within
      a step, with V_o of a full peephole on c_t, and with W_hr
    - in Gluon, streamed: chunks of weights that do not stay on the chip, but are loaded in every step (streamed.py);
      beyond_l2: of those, what L2 does not hold either
    """

    block_u: int
    block_b: int
    block_k: int
    parts: int
    chunks: int
    group: int
    rows: int
    unit_programs: int
    row_programs: int
    directions: int
    row_blocks: int
    num_warps: int
    wait: str | None
    pause: int
    exact: bool
    tile_bytes: int
    register_bytes: int
    shared_bytes: int
    estimate_us: float
    kept: int = 0
    together: int = 1
    tiled: bool = False
    peephole: Second | None = None
    projection: Second | None = None
    streamed: int = 0
    beyond_l2: int = 0

    @property
    def alone(self) -> bool:
        """Whether a program holds all units, and waits for nobody."""
        return self.wait is None

    @property
    def columns(self) -> int:
        """Columns of the product, padding included."""
        return self.chunks * self.parts * self.block_k

    @property
    def grid(self) -> tuple[int, int, int]:
        """Programs: parts of the units, groups of row blocks, directions."""
        return self.unit_programs, self.row_programs, self.directions

    @property
    def programs(self) -> int:
        """Programs of the launch."""
        return self.unit_programs * self.row_programs * self.directions

    @property
    def blocks_per_program(self) -> int:
        """Row blocks that the busiest program works through in a step."""
        return ceil_div(self.row_blocks, self.row_programs)

    def describe(self) -> str:
        """Return the plan in a few words: `U8 R16/16 K32x8x3 96x1x1 data`.

        Units of a program, rows used of its tile's, columns of a part x parts x chunks (`by` so many where not all are
        read at once, `kept` so many where not all are in registers, `streamed` so many where not all are on the chip),
        the grid (`of` so many row blocks where a program has several), and the wait, or `alone`; `V_o` or `W_hr` before
        the columns of such a product; `in pairs` where two programs share a multiprocessor.
        """
        columns = f"K{self.block_k}x{self.parts}x{self.chunks}"
        columns += f" by {self.group}" if self.group < self.chunks else ""
        columns += f" kept {self.kept}" if self.kept else ""
        columns += f" streamed {self.streamed}" if self.streamed else ""
        grid = f"{self.unit_programs}x{self.row_programs}x{self.directions}"
        grid += f" of {self.row_blocks}" if self.blocks_per_program > 1 else ""
        wait = f"{self.wait or 'alone'}{' in pairs' * (self.together > 1)}"
        for name, second in (("V_o", self.peephole), ("W_hr", self.projection)):
            columns += f" {name} K{self.block_k}x{self.parts}x{second.chunks}" if second else ""
        return f"U{self.block_u} R{self.rows}/{self.block_b} {columns} {grid} {wait}"


@dataclass(frozen=True)
class Preference:
    """Wishes of a user or a benchmark for a plan; None: whatever is estimated to be fastest."""

    wait: str | None = None
    block_u: int | None = None
    block_b: int | None = None

    def admits(self, plan: PersistentPlan) -> bool:
        """Return whether the plan is as wanted."""
        wanted = ((self.wait, plan.wait), (self.block_u, plan.block_u), (self.block_b, plan.block_b))
        return all(want is None or want == has for want, has in wanted)


ANY = Preference()
