"""What a sequence's own rounds tell: whether drafting pays, which is turned off while it does not and tried again
later, and how much of full KV comes while a round drafts.

What a round gained is what its caller took, which the next one knows: drafts that verify accepted and the caller threw
away (it samples, or a stopping rule of its own ends the text) gain nothing.

Rows do not depend on how many tokens were drafted: a round without drafts is one verified token. It may take less than
one that verifies a window, so where it is close a few are tried.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import NamedTuple

ROUNDS = 8
"""Rounds of drafting that are looked at."""
REST = 64
"""Rounds without drafts before drafting is tried again: twice as many after each try that failed."""
LONGEST_REST = 1024
WRONG = 5
"""Rounds that gained nothing by their drafts, after which no more are seen."""
WARY = 3
"""The same where drafting has not paid lately."""
AGAIN = 4
"""Rounds that say whether it pays, where it did not for the sequence before."""
ENOUGH = 5
"""Rounds that say how long drafting takes: the first two also compile and record kernels."""
MARGIN = 1.05
"""How much faster verifying alone must be."""
CLOSE = 0.5
"""What drafting takes, as a share of what verifying alone seems to, from which on that is tried."""
TRIES = 3
"""Rounds without drafts that say what one takes."""


class Seen(NamedTuple):
    """One round."""

    drafted: int
    draft_seconds: float
    verify_seconds: float
    compress_seconds: float = 0.0
    """What it took to compress anew, or to compress more in; the first time apart, which is over."""
    transfer_seconds: float = 0.0
    """Of the link bringing full KV in. Under drafting some of it is hidden; verifying alone, none."""
    transfer_bytes: int = 0

    @property
    def alone_seconds(self) -> float:
        """What verify would have taken without drafts, if a token takes it as long as a window."""
        return max(self.verify_seconds, self.transfer_seconds)


class Pace:
    """The latest rounds of one sequence. Each is noted when it ends, and counted when its caller wants the next."""

    def __init__(self, *, wary: bool = False, doubtful: bool = False) -> None:
        """`wary`: drafts were in vain for the sequence before, so it begins as if they had been here once. `doubtful`:
        drafting did not pay for it, so fewer rounds say whether it does here."""
        self.looks = AGAIN if doubtful else ROUNDS
        """Rounds that must have been seen before it is turned off for what it takes."""
        self.seen: deque[Seen] = deque(maxlen=ROUNDS)
        self.took: deque[float] = deque(maxlen=ROUNDS)
        """Rows that the caller took of each, averaged over the batch."""
        self.alone: deque[float] = deque(maxlen=ROUNDS)
        """Seconds of rounds without drafts."""
        self.resting = 0
        """Rounds still to come without drafts."""
        self.failed = int(wary)
        """How often drafting has been turned off since it last paid."""
        self.gain = 1.0 if wary else math.inf
        """Rows that the caller took of a round, over those that were looked at last."""
        self._last: Seen | None = None

    @property
    def is_wary(self) -> bool:
        """Whether drafting failed because it gave little, not because of the time that it took just then."""
        return self.failed > 0 and self.gain < 2

    def following(self) -> Pace:
        """That of a sequence that comes after this one."""
        return Pace(wary=self.is_wary, doubtful=self.failed > 0 or self.looks < ROUNDS)

    def note(self, seen: Seen) -> None:
        """A round has ended."""
        if self.resting:
            self.resting -= 1
            self.alone.append(seen.verify_seconds)
        elif seen.drafted:
            self._last = seen

    def count(self, took: float) -> None:
        """The caller took so many rows since the last round, and wants another."""
        last, self._last = self._last, None
        if last is None:
            return
        self.seen.append(last)
        self.took.append(took)
        self.gain = sum(self.took) / len(self.took)
        wrong = len(self.took) >= (WARY if self.failed else WRONG) and max(self.took) <= 1
        if wrong or (len(self.seen) >= self.looks and not self.pays()):
            self.rest()
        elif len(self.seen) == ROUNDS:
            self.failed, self.looks = 0, ROUNDS
            if not self.alone and not self.pays(CLOSE):
                self.resting = TRIES

    def rest(self) -> None:
        """Go on without drafts: each time that drafting failed since it last paid, for twice as many rounds."""
        self.resting = min(REST << self.failed, LONGEST_REST)
        self.failed += 1
        self.seen.clear()
        self.took.clear()

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
        drafting += sum(each.compress_seconds for each in self.seen)
        alone = median(self.alone) if self.alone else min(each.alone_seconds for each in self.seen)
        return drafting <= margin * alone * sum(self.took)
