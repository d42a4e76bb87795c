"""Simulate one time step of a persistent kernel on an H100 from its machine code, on a machine without a GPU.

A kernel is compiled for sm_90 with the plan of a layer. What the compiler made (instructions, control bits, registers)
is exact; every number of cycles or microseconds is simulated, none is measured. Of 38 steps that an H100 measured
(benchmarks/NOTES.md) it is short by 1.33 forward and 1.25 backward in the geometric mean, with `--skew 500` by 1.09 and
1.05; single ones took 0.69 to 1.31 times as long as simulated with that skew.

Assumptions:

- one thread block is simulated, for all are alike: what it waits for is visible when its own last store of the step
  before has reached the L2 cache (half of a load's latency), plus `skew`; a poll that comes too early is repeated.
  Where warps divide the rows this holds for each warp by itself
- the room of an access in a cache line does not count: four rows of 16 bytes cost what 64 adjacent bytes cost
- its warps sit on four sub-partitions, each of which issues one instruction a cycle, in order within a warp; of several
  ready warps the one that issued last, then the lowest number
- stall counts, scoreboards and barriers are read from the code and obeyed
- pipes take ALU 2, IMAD 2, MUFU 8, HMMA 7 cycles a warp instruction; all memory instructions share one path
- an access to shared memory holds that path for a cycle a wavefront; bank conflicts are counted by running the PTX of
  one thread block in the emulator of the tests, the mean over the accesses of a source line
- a load that hits L2 takes 340 cycles, and then its bytes, min(32, 2560 / thread blocks) a cycle; what does not depend
  on other thread blocks comes from device memory
- latencies and rates are published ones of H100, H800 and A100, or assumptions: `machine.Machine`; at 1.755 GHz
- streamed weights that L2 holds (streamed.py) take its latency and then 40 bytes a cycle, in turn with all other reads;
  those that it does not hold take the latency of device memory, and then their thread block's share of its 3352 GB/s,
  beside the others
- instruction fetch, and the slowdown when many thread blocks read the same lines, are not modelled
- float32 and TF32 are simulated like the half types, but no simulated time of exact float32 has been compared with a
  measured one; an HMMA of TF32 is assumed to take twice as long for as many products

`python -m benchmarks simulate --hidden 768 --batch 16` is the command: both passes of a layer on the plans that would
run; with `--all-plans` every plan, with `--code` the instructions of a step, with `--suites` a file of all suites'
shapes. Another release of Triton: its folder first on PYTHONPATH.

| file | what is inside |
|---|---|
| `kernels.py` | a pass of a layer, compiled for sm_90 on its plan |
| `sass.py`, `step.py` | the machine code; its time loop, the phase of each instruction, and the polls |
| `conflicts.py` | the wavefronts of the accesses to shared memory |
| `machine.py`, `step_time.py` | the model of a multiprocessor; a step of a compiled pass on it |
| `passes.py`, `table.py` | what the command shows; its file of all suites' shapes |
"""
