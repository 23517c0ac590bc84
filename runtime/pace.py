"""What a sequence's own rounds tell: whether drafting pays, which is turned off while it does not and tried again
later, and how much of full KV comes while a round drafts.

Rows do not depend on how many tokens were drafted: a round without drafts is one verified token. It may take less than
one that verifies a window, so where it is close a few are tried.
"""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import NamedTuple

ROUNDS = 8
"""Rounds of drafting that are looked at, and that must have been seen before it is turned off."""
REST = 64
"""Rounds without drafts before drafting is tried again."""
ENOUGH = 5
"""Rounds that say how long drafting takes: the first two also compile and record kernels."""
MARGIN = 1.05
"""How much faster verifying alone must be."""
CLOSE = 0.5
"""What drafting takes, as a share of what verifying alone seems to, from which on that is tried."""
TRIES = 3
"""Rounds without drafts that say what one takes."""


class Seen(NamedTuple):
    """One round with drafts."""

    drafted: int
    kept: float
    """Rows kept, averaged over the batch."""
    draft_seconds: float
    verify_seconds: float
    transfer_seconds: float = 0.0
    """Of the link bringing full KV in. Under drafting some of it is hidden; verifying alone, none."""
    transfer_bytes: int = 0

    @property
    def alone_seconds(self) -> float:
        """What verify would have taken without drafts, if a token takes it as long as a window."""
        return max(self.verify_seconds, self.transfer_seconds)


class Pace:
    """The latest rounds of one sequence."""

    def __init__(self) -> None:
        self.seen: deque[Seen] = deque(maxlen=ROUNDS)
        self.alone: deque[float] = deque(maxlen=ROUNDS)
        """Seconds of rounds without drafts."""
        self.resting = 0
        """Rounds still to come without drafts."""

    def note(self, seen: Seen) -> None:
        """Count one round."""
        if self.resting:
            self.resting -= 1
            self.alone.append(seen.verify_seconds)
        elif seen.drafted:
            self.seen.append(seen)
            if len(self.seen) == ROUNDS and not self.pays():
                self.resting = REST
                self.seen.clear()
            elif len(self.seen) == ROUNDS and not self.alone and not self.pays(CLOSE):
                self.resting = TRIES

    def bytes_while_drafting(self) -> int:
        """What comes over the link while a round drafts; 0 while too little is known."""
        moved = [each for each in self.seen if each.transfer_seconds]
        if len(moved) < ENOUGH:
            return 0
        return int(median(each.draft_seconds * each.transfer_bytes / each.transfer_seconds for each in moved))

    def pays(self, margin: float = MARGIN) -> bool:
        """Whether rounds with drafts gave rows as fast as verifying them one by one would have, within a margin.

        By the median round: some also compile kernels, or record what later ones replay.
        """
        drafting = len(self.seen) * median(each.draft_seconds + each.verify_seconds for each in self.seen)
        alone = median(self.alone) if self.alone else min(each.alone_seconds for each in self.seen)
        return drafting <= margin * alone * sum(each.kept for each in self.seen)
