"""Nightly exams of own weights beside their parent's, as a table: one binary objective, and a rating without labels."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa


def exam_of(own: "np.ndarray", parent: "np.ndarray", liked: "np.ndarray", **columns: Sequence[object]) -> pa.Table:
    """An exam table with these predictions of `liked` and such columns: level, segment, user, and support if not 9."""
    nothing = np.full(len(own), np.nan)
    return pa.table(
        {
            "support": np.full(len(own), 9),
            **columns,
            "label/liked": liked,
            "label/stars": nothing,
            "nightly/candidate/liked": own,
            "nightly/parent/liked": parent,
            "nightly/candidate/stars": nothing.astype(np.float32),
            "nightly/parent/stars": nothing.astype(np.float32),
        }
    )
