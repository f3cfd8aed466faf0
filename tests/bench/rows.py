"""What a benchmark reports: ratios of two things measured in one run, never bare seconds."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        what: the work that both sides do.
        peer: what it is compared with.
        ours_s: our median time for it, in seconds.
        peer_s: the peer's.
        speed: how many times as fast as the peer, the median over the rounds; above 1 we are faster.
        note: how much the rounds differ, or what is special.
    """

    what: str
    peer: str
    ours_s: float
    peer_s: float
    speed: float
    note: str = ""


def compare(
    what: str, peer: str, ours: Callable[[], object], theirs: Callable[[], object], rounds: int = 15
) -> Row:
    """Run two pieces of work in turns, so that a busy machine slows both alike; one round of each warms up.

    Args:
        what: the work that both do.
        peer: name of the second one.
        ours: does the work once.
        theirs: does the same work once.
        rounds: measured turns, 3 or more.
    """
    ours()
    theirs()
    times = [(_timed(ours), _timed(theirs)) for _ in range(rounds)]
    ratios = sorted(theirs_s / ours_s for ours_s, theirs_s in times)
    note = f"{rounds} rounds, ratios {ratios[0]:.2f} to {ratios[-1]:.2f}"
    mine, other = ([pair[side] for pair in times] for side in (0, 1))
    speed = statistics.median(ratios)
    return Row(what, peer, statistics.median(mine), statistics.median(other), speed, note)


def render(rows: Sequence[Row]) -> str:
    """The table as text."""
    lines = [f"{'work':<58} {'peer':<48} {'ours':>9} {'peer':>9} {'speed':>7}  note"]
    lines += [
        f"{row.what:<58} {row.peer:<48} {row.ours_s:>7.3f} s {row.peer_s:>7.3f} s {row.speed:>6.2f}x  {row.note}"
        for row in rows
    ]
    return "\n".join(lines)


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
