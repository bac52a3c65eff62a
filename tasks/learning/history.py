"""A user's recent rows as an input: those of nights before the row's own, newest first.

Rows are sorted by (user, time), so a history is what stands right before the user's visit: a gather, not a table. It
ends where the user's rows begin, and at the night: rows of the same night are no history, nor are later ones. In first
contact, too: a user's support of the night is read by his adapter alone, and one without earlier nights has no history.

Shapes: T positions, G histories, H entries.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tasks.data.columns import Rows

I64 = npt.NDArray[np.int64]
DAY, SECOND = 86_400_000_000, 1_000_000
"""Microseconds."""


@dataclass(frozen=True)
class Histories:
    """Histories of some rows; rows of one visit share one.

    Attributes:
        at: positions of the entries, newest first, -1 behind the oldest [G, H].
        gaps: seconds between each entry and the midnight (UTC) that the request's day began with; 0 where it is later,
            as in zones west of Greenwich, and where there is no entry [G, H].
        row: which history each position has [T].
    """

    at: I64
    gaps: I64
    row: I64


def histories(rows: Rows, start: I64, first: I64, at: I64, length: int) -> Histories:
    """The histories of rows. An unknown user has none, and what has no item key is no entry.

    Args:
        rows: the table.
        start: first position of every visit, ascending [V].
        first: first position of each visit's user [V].
        at: positions of the rows that are asked about [T].
        length: most entries: H.
    """
    day = np.asarray(rows.time[at]) // DAY
    visit = np.searchsorted(start, at, side="right") - 1
    # A night that is no day in UTC has two; a request of tomorrow's release knows its day, and no night.
    days = int(day.max(initial=0) - day.min(initial=0)) + 1
    _, one, row = np.unique(visit * days + (day - day.min(initial=0)), return_index=True, return_inverse=True)
    visit, day = visit[one], day[one]
    places = start[visit][:, None] - 1 - np.arange(length)
    there = places >= first[visit][:, None]
    places = np.where(there, places, 0)
    tonight = np.asarray(rows.night[start[visit]])[:, None]
    there &= (np.asarray(rows.night[places]) < tonight) & (np.asarray(rows.item[places]) > 0)
    there &= np.asarray(rows.user[start[visit]])[:, None] > 0
    gaps = np.maximum(day[:, None] * DAY - np.asarray(rows.time[places]), 0) // SECOND
    return Histories(np.where(there, places, -1), np.where(there, gaps, 0), row.astype(np.int64))
