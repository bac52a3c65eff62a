"""What a ranker's layers are sized by, as it is stored beside the weights."""

from typing import Literal

from pydantic import Field

from tasks.data.contract import Section


class RankerShape(Section):
    """What the network's layers are sized by; stored beside the weights."""

    request_vocabularies: tuple[int, ...]
    """Rows of each request embedding table, the unknown row 0 included."""
    candidate_vocabularies: tuple[int, ...]
    """Rows of each candidate embedding table (the item's first), the unknown row 0 included."""
    request_numbers: int
    """Numeric request columns."""
    candidate_numbers: int
    """Numeric candidate columns."""
    request_statistics: tuple[int, ...]
    """Positions in the statistics vector that describe the request (its user)."""
    candidate_statistics: tuple[int, ...]
    """Positions that describe the candidate (its item)."""
    joint_statistics: tuple[int, ...]
    """Positions that describe both (the cohort's view of the item)."""
    offsets: tuple[int, ...]
    """Position of the statistic that each objective's output starts from (its smoothed item rate)."""
    kinds: tuple[Literal["binary", "rating"], ...]
    """Kind of each objective."""
    names: tuple[str, ...] = ()
    """Columns, statistics and objectives in the order of the inputs: weights fit no others, whatever their number."""

    request_value_vocabularies: tuple[int, ...] = Field((), exclude_if=lambda of_columns: not of_columns)
    """Rows of each `multi` request column's embedding table, the unknown row 0 included. A dump leaves out what a
    network has none of, as for the rest."""
    candidate_value_vocabularies: tuple[int, ...] = Field((), exclude_if=lambda of_columns: not of_columns)
    """Rows of each `multi` candidate column's embedding table."""
    request_values: tuple[int, ...] = Field((), exclude_if=lambda of_columns: not of_columns)
    """Places of each `multi` request column."""
    candidate_values: tuple[int, ...] = Field((), exclude_if=lambda of_columns: not of_columns)
    """Places of each `multi` candidate column."""
    request_vectors: tuple[int, ...] = Field((), exclude_if=lambda of_columns: not of_columns)
    """Length of each `dense` request column."""
    candidate_vectors: tuple[int, ...] = Field((), exclude_if=lambda of_columns: not of_columns)
    """Length of each `dense` candidate column."""

    @property
    def lists(self) -> tuple[tuple[int, ...], ...]:
        """Places of every list column by side and kind: what rows must be laid out by."""
        return self.request_values, self.candidate_values, self.request_vectors, self.candidate_vectors

    @property
    def statistics(self) -> int:
        """Length of the statistics vector."""
        return len(self.request_statistics) + len(self.candidate_statistics) + len(self.joint_statistics)
