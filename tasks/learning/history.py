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
SECOND = 1_000_000
"""Microseconds."""


@dataclass(frozen=True)
class Histories:
    """Histories of some rows; rows of one visit share one.

    Attributes:
        at: positions of the entries, newest first, -1 behind the oldest [G, H].
        gaps: seconds between each entry and the first row of the visit; 0 where there is no entry [G, H].
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
    visit, row = np.unique(np.searchsorted(start, at, side="right") - 1, return_inverse=True)
    places = start[visit][:, None] - 1 - np.arange(length)
    there = places >= first[visit][:, None]
    places = np.where(there, places, 0)
    tonight = np.asarray(rows.night[start[visit]])[:, None]
    there &= (np.asarray(rows.night[places]) < tonight) & (np.asarray(rows.item[places]) > 0)
    there &= np.asarray(rows.user[start[visit]])[:, None] > 0
    gaps = (np.asarray(rows.time[start[visit]])[:, None] - np.asarray(rows.time[places])) // SECOND
    return Histories(np.where(there, places, -1), np.where(there, gaps, 0), row.astype(np.int64))
