"""Run compiled PTX on the CPU: every thread block (CTA) of a grid, all resident at once, with checks no GPU makes.

The PTX is translated, segment by segment, to numpy on registers of [threads of a gang]. A *gang* is the threads that
run in lockstep: a whole CTA (fast), or one warp (every warp at its own pace). A seeded scheduler picks which gang
runs its next segment. Divergent branches: of the lanes of a gang that are at different segments those at the lowest
run, and lanes that meet run together again.

| module | what is inside; each imports only those above it |
|---|---|
| `parse` | PTX text to instructions, registers, segments |
| `values`, `tensor_cores` | arithmetic of registers; products, and their layouts in registers and in shared memory |
| `findings` | what the checks found |
| `memory`, `shared` | global memory of a launch, strong or weak; shared memory of a CTA |
| `gangs` | CTAs and gangs: their state, which lanes are where, addresses |
| `counts` | wavefronts and sectors |
| `shared_accesses`, `global_accesses`, `asynchronous`, `warps` | what instructions do beyond one thread's registers |
| `writer`, `opcodes_of_values`, `opcodes_of_effects`, `translate` | instructions to Python |
| `machine` | a launch: the scheduler and the barriers |
| `far`, `launches` | the library's own launches of its kernels, on rows of a batch larger than any memory, too |

What is modelled
- Integer and float arithmetic; float32 is rounded once an instruction (fma through float64; ex2, rcp, div.full, ...
  computed exactly and rounded; their .ftz is obeyed); cvt rounds to nearest even, NaN becomes the canonical one.
- Inline PTX: labels and registers declared in braces are of those braces.
- mma.sync m16n8k16 (f16, bf16) and m16n8k8 (tf32), wgmma (K-major operands by descriptor, all swizzles), ldmatrix,
  stmatrix; see `tensor_cores` for their rounding.
- cp.async: the copy takes place when its group is waited for; bytes in flight may not be touched.
- wgmma: bytes that an uncommitted or unwaited product reads may not be written; reading what generic stores wrote
  needs a fence.proxy.async after them.

Memory, strong: one memory, every access takes effect at once.

Memory, weak: as weak as the PTX memory model lets it be, for gangs ("threads" of the model):
- A store, whatever its qualifier, waits in the gang's buffer. Single elements (never parts of one; torn: 16 bits
  each, but those of float32 whole) leave it at random times in random order; one address keeps its order. The gang
  sees its own stores; the other gangs of the CTA see them after a bar.sync, and nobody else until they left.
- A release (atom/red/fence .release, .acq_rel, .sc at gpu or sys scope) first makes visible: all stores of its gang,
  and those of other gangs of the CTA that a bar.sync ordered before it (cumulativity).
- An atomic acts on the L2 at once. A relaxed or volatile load reads the L2 as it is now.
- A weak load reads the past: any state since the gang's *horizon*, its last acquire, or a CTA mate's that a bar.sync
  ordered before it. Without .cg/.cs/.cv it goes through the CTA's L1, which keeps a sector (32 bytes) for ever unless
  an acquire came later. One state of the past is kept per element: the one before its last store.
- A weak load of what another CTA stored is reported as a race unless a release after the store and an acquire after
  that release ordered them (so luck does not hide it).

Checks, always: memcheck (global bytes inside a tensor of the launch, vector accesses aligned; shared bytes inside
what the launch asks for), initcheck of global memory (an element never stored, and GARBAGE before the launch), race
(two CTAs that store to one element), lanes of one store that disagree, synccheck (a bar.sync that a part of a gang
reaches, or warps that meet at different ones; mma, ldmatrix, shfl by a part of a warp). Of some CTAs, `checked`:
racecheck (shared bytes touched by two warps between barriers, one of them writing another value) and initcheck of
shared memory.

Not modelled: ptxas (what runs is PTX, not SASS), time, the order of accumulation inside of a tensor core, denormal
flushing (but of the functions .ftz), an L1 that is larger than one launch, clusters, TMA, sm_100's tensor memory. An
opcode that is not modelled raises.
"""


class Fault(Exception):
    """The program cannot go on: an opcode that is not modelled, a deadlock, a limit."""
