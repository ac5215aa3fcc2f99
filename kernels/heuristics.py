"""The one table of launch choices: how the update and a run of updates are cut into programs.

Nothing is tuned at run time. The entries are estimates, from the bytes that a multiprocessor reads
per microsecond and from what a launch costs; no GPU has confirmed them. `benchmarks/op_latency.py`
measures every alternative beside the choice made here, and is what the table is to be set from.
"""

from __future__ import annotations

from dataclasses import dataclass

FEW_ROWS = 4  # up to here a row has programs of its own; tl.dot would pad it to DOT_ROWS
DOT_ROWS = 16  # the smallest block of rows that tensor cores multiply
ONE_LAUNCH_BYTES = 192 * 1024  # of A; one SM reads as much while a second launch starts
PROGRAMS = 32  # that read all of A at the same time before the L2 slows them down
TILE_BYTES = 128 * 1024  # of A in the registers of a program
PARTS_TILE = 16384  # partial sums of A x in the registers of a program
CHAIN_SIZE = 98304  # d * r up to which one SM needs about as long for a layer as a launch does
CHAIN_ROWS = 64  # that many SMs read A and B at the same time before the L2 slows them down
CHAIN_BYTES = 64 * 1024  # of A, and of B, in the registers of a program
STATE_BLOCK = 1024  # columns of a state that a program fills
SLOTS_BLOCK = 1024  # KV slots that a program writes at a time


@dataclass(frozen=True, slots=True)
class Launch:
    """How one update is cut up.

    Attributes:
        split: a shrink launch (A x) and an expand launch (the rest) instead of one for both
        block_rows: rows of a program; from DOT_ROWS on tl.dot multiplies, below a plain sum
        block_d: columns of a program's output, and of its part of the sum A x in a shrink launch
        block_k: columns of A at a time where one launch does both and a program sums over all d
        warps: of a program
    """

    split: bool
    block_rows: int
    block_d: int
    block_k: int
    warps: int


@dataclass(frozen=True, slots=True)
class Chain:
    """A whole run of updates in one launch, one program per row.

    Attributes:
        block_rank: ranks of A and B at a time
        warps: of a program
    """

    block_rank: int
    warps: int


def update_launch(rows: int, d: int, r: int, itemsize: int) -> Launch:
    """The launch of one update: `rows` rows, A [r, d] and B [d, r] of `itemsize` bytes a number."""
    if rows <= FEW_ROWS and d * r * itemsize <= ONE_LAUNCH_BYTES:
        return one_launch(rows, d, r, itemsize)
    return split_launch(rows, d, r, itemsize)


def one_launch(rows: int, d: int, r: int, itemsize: int) -> Launch:
    """An update of few rows in one launch."""
    block_d = power_of_2(-(-d * rows // PROGRAMS))
    block_k = min(power_of_2(d), TILE_BYTES // (power_of_2(r) * itemsize))
    return Launch(False, 1, min(max(block_d, 64), 512), block_k, 8)


def split_launch(rows: int, d: int, r: int, itemsize: int) -> Launch:
    """An update in two launches; in a run every further layer costs one, see `triton_run`."""
    block_d = min(power_of_2(d), (512 if r <= 64 else 256) // itemsize)
    if rows <= FEW_ROWS:
        return Launch(True, 1, block_d, block_d, 4)
    return Launch(True, DOT_ROWS, block_d, block_d, 8)


def parts_at_a_time(parts: int, block_rows: int, r: int) -> int:
    """How many partial sums of A x an expand launch adds up at a time."""
    return min(power_of_2(parts), max(1, PARTS_TILE // (block_rows * power_of_2(r))))


def run_launch(layers: int, rows: int, d: int, r: int, itemsize: int) -> Chain | Launch:
    """The launch of a run of updates: one for all, or one per layer and one more."""
    if layers == 1:
        return update_launch(rows, d, r, itemsize)
    if d * r <= CHAIN_SIZE and rows <= CHAIN_ROWS:
        return chain_launch(d, r, itemsize)
    return split_launch(rows, d, r, itemsize)


def chain_launch(d: int, r: int, itemsize: int) -> Chain:
    """A run in one launch."""
    return Chain(min(power_of_2(r), max(1, CHAIN_BYTES // itemsize // power_of_2(d))), 16)


def power_of_2(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()
