"""What a sequence's own rounds tell: whether drafting pays, which is turned off while it does not and tried again
later, and how much of full KV comes while a round drafts.

Verify's shape does not depend on what was drafted, so neither do rows: a round without drafts is one verified token.
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
        """What verify would at least have taken without drafts."""
        return max(self.verify_seconds, self.transfer_seconds)


class Pace:
    """The latest rounds of one sequence."""

    def __init__(self) -> None:
        self.seen: deque[Seen] = deque(maxlen=ROUNDS)
        self.resting = 0
        """Rounds still to come without drafts."""

    def note(self, seen: Seen) -> None:
        """Count one round."""
        if self.resting:
            self.resting -= 1
        elif seen.drafted:
            self.seen.append(seen)
            if len(self.seen) == ROUNDS and not self.pays():
                self.resting = REST
                self.seen.clear()

    def bytes_while_drafting(self) -> int:
        """What comes over the link while a round drafts; 0 while too little is known."""
        moved = [each for each in self.seen if each.transfer_seconds]
        if len(moved) < ENOUGH:
            return 0
        return int(median(each.draft_seconds * each.transfer_bytes / each.transfer_seconds for each in moved))

    def pays(self) -> bool:
        """Whether rounds with drafts gave rows as fast as verifying them one by one would have, within MARGIN.

        By the median round: some also compile kernels, or record what later ones replay.
        """
        drafting = len(self.seen) * median(each.draft_seconds + each.verify_seconds for each in self.seen)
        alone = min(each.alone_seconds for each in self.seen) * sum(each.kept for each in self.seen)
        return drafting <= MARGIN * alone
