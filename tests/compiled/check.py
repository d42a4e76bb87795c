"""The cases of `tests/compiled` with another seed, another kind of memory, and with counts: by hand.

    export PYTHONPATH=.:kernels
    check="python -m tests.compiled.check"
    $check --group together many --weak --seed 7    # every warp at its own pace, weak memory
    $check --group together --weak --gang cta       # thread blocks in lockstep, weak memory
    $check --group suite --every 8 --stats          # also the bank conflicts of every kernel
    $check --group large                            # layers of 1,536 to 4,096 units at their full size: some minutes
    $check --group stepwise --match fp16 --first 1 --every 3    # every third of the group from its second on
    $check --list                                   # the cases, without running them
    $check --barriers                               # every bar.sync taken out in turn; some are needed by no two warps
    $check --anchor                                 # B=16, H=768, bf16: what a step executes, by kind

Another release of Triton: `pip install --no-deps --target FOLDER triton==3.6.0`, then FOLDER first on PYTHONPATH.

For each case a line says `ok` or `FAIL`, the seconds, the case, and the largest error; the lines below it what the
emulator's checks found: the PTX instruction and its source line. The last line counts, and the exit status is 1 if a
case failed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import torch
import triton

from tests.compiled import cases, faults
from tests.compiled.layers import Case, run


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.compiled.check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--group", nargs="*", choices=list(cases.GROUPS), help="groups of cases; all but `suite`, `large`"
    )
    parser.add_argument("--match", default="", help="only cases with this text")
    parser.add_argument("--first", type=int, default=0, help="begin with this one of a group")
    parser.add_argument("--every", type=int, default=1, help="then every so many")
    parser.add_argument("--weak", action="store_true", help="memory as weak as the PTX memory model lets it be")
    parser.add_argument("--gang", choices=("cta", "warp"), help="what runs in lockstep; in weak memory the warp")
    parser.add_argument("--seed", type=int, default=0, help="of the scheduler and of the memory")
    parser.add_argument("--list", action="store_true", help="print the cases only")
    parser.add_argument("--stats", action="store_true", help="bank conflicts of each kernel")
    parser.add_argument("--barriers", action="store_true", help="every barrier taken out in turn")
    parser.add_argument("--anchor", action="store_true", help="counts of a step")
    return parser.parse_args(arguments)


def chosen(options: argparse.Namespace) -> Iterator[tuple[str, Case]]:
    """Yield group and case, as the options want them."""
    for group in options.group or [group for group in cases.GROUPS if group not in cases.BY_HAND]:
        for case in itertools.islice(cases.GROUPS[group](), options.first, None, options.every):
            if options.match in str(case):
                yield group, replace(case, weak=case.weak or options.weak)


def conflicts(kernel: str, counts: dict[int, Counter[str]]) -> str:
    """Return how many wavefronts accesses to shared memory take for each that they would without bank conflicts."""
    sums = sum(counts.values(), Counter[str]())
    accesses = [name for name in ("ldmatrix", "ld.shared", "st.shared") if sums[f"{name} phases"]]
    ways = [f"{name} {sums[f'{name} wavefronts'] / sums[f'{name} phases']:.1f}" for name in accesses]
    return f"{kernel}: wavefronts for each that would do without bank conflicts: {', '.join(ways)}"


def check(options: argparse.Namespace) -> int:
    """Run the cases; how many were wrong."""
    right = total = 0
    for group, case in chosen(options):
        if options.list:
            print(f"{group}: {case}")
            continue
        emulation = case.emulation()
        emulation.seed, emulation.stats, emulation.gang = options.seed, options.stats, options.gang or emulation.gang
        try:
            outcome = run(case, emulation)
        except LookupError as error:
            print(f"no plan   {group}: {case}: {error}", flush=True)
            continue
        total, right = total + 1, right + (not outcome.wrong)
        name, error = outcome.worst
        head = f"{'FAIL' if outcome.wrong else 'ok  '} {outcome.seconds:5.1f} s  {group}: {case}"
        print(f"{head}: {error:.1e} {name}", flush=True)
        for line in [*outcome.wrong.splitlines(), *itertools.starmap(conflicts, emulation.statistics)]:
            print(f"       {line}", flush=True)
    if not options.list:
        print(f"{right} of {total} right")
    return total - right


def barriers(options: argparse.Namespace) -> None:
    """Take every barrier out in turn, and print whether that is seen."""
    found = total = 0
    for fault in itertools.islice(faults.barrier_faults(), options.first, None, options.every):
        words = f"wrong without it: {control}" if (control := faults.control(fault.case)) else ""
        words = words or faults.seen(fault.case, fault.change)
        print(f"{'seen    ' if words else 'NOT SEEN'}  {fault.name}: {words[:300]}", flush=True)
        found, total = found + bool(words), total + 1
    print(f"{found} of {total} seen")


def per_step(case: Case) -> int:
    """Print the counts of a step, the difference of two lengths, of the thread blocks that are measured."""
    counts, wrong = {}, 0
    for T in (3, 5):
        emulation = replace(case, T=T).emulation()
        emulation.stats = True
        outcome = run(replace(case, T=T), emulation)
        print(f"T={T}: {outcome.wrong or 'right'}", flush=True)
        wrong += bool(outcome.wrong)
        counts[T] = emulation.statistics
    for (name, short), (_, long) in zip(counts[3], counts[5], strict=True):
        print(f"\n{name}, {case}, a CTA and step (warp instructions; retries of waits apart):")
        for number in sorted(short.keys() & long.keys()):
            rows = {key: (long[number][key] - short[number][key]) / 2 for key in sorted(long[number])}
            print(f"  CTA {number}: " + ", ".join(f"{key} {value:g}" for key, value in rows.items()))
    return wrong


def main(arguments: list[str] | None = None) -> int:
    """Run the command; its exit status."""
    options = options_of(arguments)
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, triton {triton.__version__}", flush=True)
    if options.barriers:
        barriers(options)
        return 0
    if options.anchor:
        return int(per_step(Case("standard", "bf16", 3, 16, 768)) > 0)
    return int(check(options) > 0)


if __name__ == "__main__":
    sys.exit(main())
