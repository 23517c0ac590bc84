"""Which drafted tokens stand, and how many to draft next. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence


def accept(window: Sequence[int], predicted: Sequence[int], forced: bool) -> int:
    """How many of a verified window's rows stand.

    `window[i]` is the token that row i was computed for, `predicted[i]` the argmax of row i. Row 0 always stands; row
    i stands when its token is the one that row i - 1 predicts (greedy), or, `forced`, whatever it is: the caller has
    shown that it feeds this token without looking.
    """
    if forced:
        return len(window)
    for i in range(1, len(window)):
        if window[i] != predicted[i - 1]:
            return i
    return len(window)


def next_horizon(served: int, horizon: int, longest: int) -> int:
    """Tokens to draft in the next round, given how many rows of the last one the caller took.

    A caller that takes all rows gets up to `longest`; one that leaves early (sampling) gets twice what it took, so that
    drafting never costs much more than it brings, and one that takes nothing of what was drafted a single token. The
    shape of verify does not depend on it.
    """
    if served > horizon:
        return min(longest, max(2 * horizon, 1))
    return min(longest, 2 * served if served > 1 else 1)
