"""Launch choices, all in one table: how an update, or a run of updates, is cut into programs.

Nothing is tuned at run time. The entries are estimates: they follow from the bytes that a
multiprocessor reads per microsecond and from the cost of a launch, and no GPU has confirmed them.
`benchmarks/op_latency.py` times every alternative beside the choice made here; set the table from
its results.
"""

from __future__ import annotations

from dataclasses import dataclass

FEW_ROWS = 4  # up to here each row has its own programs; tl.dot would pad to DOT_ROWS
DOT_ROWS = 16  # the smallest block of rows that tensor cores can multiply
ONE_LAUNCH_BYTES = 192 * 1024  # of A; one SM reads that much while a second launch starts
PROGRAMS = 32  # so many can read all of A at once before the L2 slows them down
TILE_BYTES = 128 * 1024  # of A, in the registers of one program
PARTS_TILE = 16384  # partial sums of A x, in the registers of one program
CHAIN_SIZE = 98304  # d * r up to which one SM runs a layer in about the time of a launch
CHAIN_ROWS = 64  # so many SMs can read A and B at once before the L2 slows them down
CHAIN_BYTES = 64 * 1024  # of A, and of B, in the registers of one program
STATE_BLOCK = 1024  # columns of a state that a program fills
SLOTS_BLOCK = 1024  # KV slots that a program writes at a time


@dataclass(frozen=True, slots=True)
class Launch:
    """Launch of one update.

    Attributes:
        split: whether a shrink launch (A x) and an expand launch (the rest) replace a single one
        block_rows: rows per program; from DOT_ROWS on tl.dot multiplies, below it a plain sum does
        block_d: columns per program of the output, and in a shrink launch of the sum A x
        block_k: columns of A that a program reads at a time when it computes all of A x itself
        warps: per program
    """

    split: bool
    block_rows: int
    block_d: int
    block_k: int
    warps: int


@dataclass(frozen=True, slots=True)
class Chain:
    """Launch of a whole run of updates, with one program per row.

    Attributes:
        block_rank: ranks of A and B that a program reads at a time
        warps: per program
    """

    block_rank: int
    warps: int


def update_launch(rows: int, d: int, r: int, itemsize: int) -> Launch:
    """The launch of one update of `rows` rows; `itemsize` is the bytes of a number of A and B."""
    if rows <= FEW_ROWS and d * r * itemsize <= ONE_LAUNCH_BYTES:
        return one_launch(rows, d, r, itemsize)
    return split_launch(rows, d, r, itemsize)


def one_launch(rows: int, d: int, r: int, itemsize: int) -> Launch:
    """The launch that computes an update of few rows at once."""
    block_d = power_of_2(-(-d * rows // PROGRAMS))
    block_k = min(power_of_2(d), TILE_BYTES // (power_of_2(r) * itemsize))
    return Launch(False, 1, min(max(block_d, 64), 512), block_k, 8)


def split_launch(rows: int, d: int, r: int, itemsize: int) -> Launch:
    """The pair of launches of an update; in a run each further layer adds one, see `triton_run`."""
    block_d = min(power_of_2(d), (512 if r <= 64 else 256) // itemsize)
    if rows <= FEW_ROWS:
        return Launch(True, 1, block_d, block_d, 4)
    return Launch(True, DOT_ROWS, block_d, block_d, 8)


def parts_at_a_time(parts: int, block_rows: int, r: int) -> int:
    """Number of partial sums of A x that an expand launch adds up at a time."""
    return min(power_of_2(parts), max(1, PARTS_TILE // (block_rows * power_of_2(r))))


def run_launch(layers: int, rows: int, d: int, r: int, itemsize: int) -> Chain | Launch:
    """The launch of a run of updates: one for all layers, or one per layer plus one."""
    if layers == 1:
        return update_launch(rows, d, r, itemsize)
    if d * r <= CHAIN_SIZE and rows <= CHAIN_ROWS:
        return chain_launch(d, r, itemsize)
    return split_launch(rows, d, r, itemsize)


def row_classes(layers: int, max_rows: int, d: int, r: int, itemsize: int) -> list[int]:
    """The least number of rows of each launch that a run of up to `max_rows` rows is given."""
    first: dict[Chain | Launch, int] = {}
    for rows in range(1, max_rows + 1):
        first.setdefault(run_launch(layers, rows, d, r, itemsize), rows)
    return list(first.values())


def chain_launch(d: int, r: int, itemsize: int) -> Chain:
    """The launch that computes a whole run at once."""
    return Chain(min(power_of_2(r), max(1, CHAIN_BYTES // itemsize // power_of_2(d))), 16)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
