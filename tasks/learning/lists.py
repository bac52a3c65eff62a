"""How the ranker reads list columns: the mean of a list's embeddings, and vectors normalised number by number.

Shapes: ``...`` any leading axes, W places of a list, E embedding width, L numbers of a vector.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from tasks.data.lists import spans
from tasks.learning.layers import Normaliser

Known = Callable[[Tensor, Tensor], Tensor]
"""Ids and rows of their table to the ids that the table has: the rest, and a random share in training, become 0."""


def pooled(table: nn.Module, ids: Tensor, given: Tensor) -> Tensor:
    """Mean of the rows ``[..., E]`` that a list names; zeros where it names none.

    Args:
        table: an embedding.
        ids: its rows, int64 ``[..., W]``, 0 and more.
        given: which places hold a value ``[..., W]``.

    >>> table = nn.Embedding.from_pretrained(torch.tensor([[9.0], [1.0], [3.0]]))
    >>> ids, given = torch.tensor([[1, 2, 0], [0, 0, 0]]), torch.tensor([[True, True, False], [False] * 3])
    >>> pooled(table, ids, given).tolist()
    [[2.0], [0.0]]
    """
    share = given.to(torch.float32)
    total: Tensor = (table(ids) * share[..., None]).sum(dim=-2)
    return total / share.sum(dim=-1, keepdim=True).clamp_min(1.0)


class VectorNormaliser(Normaliser):
    """Centres and scales a vector's numbers; a vector that misses any is missing, becomes zeros and raises one flag."""

    def forward(self, vector: Tensor) -> Tensor:
        """A vector ``[..., L]`` (NaN = missing) to ``[..., L + 1]``: normalised, clipped to ±5, then the flag."""
        missing = torch.isnan(vector).any(dim=-1, keepdim=True)
        values = ((torch.where(missing, self.mean, vector) - self.mean) / self.scale).clamp(-5.0, 5.0)
        return torch.cat([values, missing.to(values.dtype)], dim=-1)


class ListInputs(nn.Module):
    """The list columns of one side, request or candidate.

    Args:
        vocabularies: rows of each `multi` column's embedding table, the unknown row 0 included.
        values: places of each.
        vectors: length of each `dense` column.
        embedding: E.
    """

    rows: Tensor
    """Rows of each embedding table, int64: a tensor, so that a traced graph does not say it."""

    def __init__(
        self, vocabularies: Sequence[int], values: Sequence[int], vectors: Sequence[int], embedding: int
    ) -> None:
        super().__init__()
        self.value_tables = nn.ModuleList(nn.Embedding(rows, embedding) for rows in vocabularies)
        self.normalisers = nn.ModuleList(VectorNormaliser(length) for length in vectors)
        self.register_buffer("rows", torch.tensor(vocabularies, dtype=torch.int64), persistent=False)
        self.value_places, self.vector_places = tuple(spans(values)), tuple(spans(vectors))
        self.width = len(vocabularies) * embedding + sum(vectors) + len(vectors)
        """Numbers that `forward` gives."""
        for table in self.value_tables:
            assert isinstance(table, nn.Embedding)
            nn.init.normal_(table.weight, std=0.05)

    def forward(self, values: Tensor | None, vectors: Tensor | None, known: Known) -> Tensor:
        """What a tower reads of the lists, ``[..., width]``.

        Args:
            values: ids of all `multi` columns side by side, int64 ``[..., sum of W]``, -1 behind a list's end.
            vectors: all `dense` columns side by side, float32 ``[..., sum of L]``, NaN where missing.
            known: says which ids the tables have.
        """
        parts = [pooled(table, *read) for table, read in zip(self.value_tables, self.read(values, known), strict=True)]
        if vectors is not None:
            places = zip(self.normalisers, self.vector_places, strict=True)
            parts += [normaliser(vectors[..., place]) for normaliser, place in places]
        return torch.cat(parts, dim=-1)

    def read(self, values: Tensor | None, known: Known) -> Iterator[tuple[Tensor, Tensor]]:
        """Known ids ``[..., W]`` of each `multi` column, and which places hold one."""
        for at, place in enumerate(self.value_places):
            assert values is not None
            ids = values[..., place]
            yield known(ids.clamp_min(0), self.rows[at]), ids >= 0
