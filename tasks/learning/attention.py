"""Attention over a user's recent rows: what the candidate finds in them.

A user's history is a sequence, newest first. Blocks of causal self-attention encode it, each entry reading itself and
older ones; then the candidate reads what came out. What is not there is masked, and behind the oldest entry stands one
learned token that all may read, so that a user without history has a sequence, too.

Shapes: ``...`` any leading axes, M candidates that share a history, H entries, T = H + 1 tokens, X embedded numbers of
an item, W width, N rows.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, pad

from tasks.learning.layers import Normaliser

SHORTEST_GAP, GAP_CLASSES = 60, 24
"""Classes of time gaps: below a minute, and then each twice as long as the one before; the last has no end."""


class Block(nn.Module):
    """A transformer's block: attention and two dense layers, each beside the way and normalised before.

    Queries and keys may come from different sequences. Torch's own layer is not used because of the bias, which depends
    on gaps and is learned. Source: Vaswani et al., 2017; normalised before as in Xiong et al., On Layer Normalization
    in the Transformer Architecture, 2020.

    Args:
        width: of tokens.
        heads: a divisor of the width.
        dropout: of the dense layers' hidden units.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.dense = nn.Sequential(
            nn.Linear(width, 2 * width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(2 * width, width)
        )

    def _split(self, tokens: Tensor) -> Tensor:
        """``[..., T, W]`` to ``[..., heads, T, W / heads]``."""
        parts = tokens.reshape(*tokens.shape[:-1], self.heads, tokens.shape[-1] // self.heads)
        return parts.transpose(-3, -2)

    def read(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens, ``[..., heads, T, W / heads]``."""
        normal = self.before(tokens)
        return self._split(self.key(normal)), self._split(self.value(normal))

    def forward(self, tokens: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """Tokens ``[..., M, W]`` after they attended; the bias ``[..., heads, M or 1, T]`` is -inf where hidden."""
        queries = self._split(self.query(self.before(tokens)))
        scores = torch.matmul(queries, keys.transpose(-2, -1)) * queries.shape[-1] ** -0.5
        found = torch.matmul(torch.softmax(scores + bias, dim=-1), values)
        tokens = tokens + self.out(found.transpose(-3, -2).flatten(-2))
        after: Tensor = tokens + self.dense(self.between(tokens))
        return after


class Attention(nn.Module):
    """What candidates find in a user's history.

    An entry tells how long ago it was, in classes of the gap's logarithm, as it tells its item and its label: a bias
    alone only moves attention between entries, and gaps would hardly be learned while all entries say the same.

    The bias of an attention score is learned, per head: one number for how many places apart two tokens are, and one
    for how much time lies between them, in classes of its logarithm (Zhai et al., Actions Speak Louder than Words,
    2024, whose bias is of the same two parts).

    Args:
        embedded: X.
        width: W.
        length: H.
        heads: a divisor of the width.
        blocks: of self-attention.
        dropout: of hidden units.
    """

    edges: Tensor
    """Seconds at which the classes of gaps but the first begin, int64."""
    places: Tensor
    """How many places back each entry ``[H]`` is from the candidate, and ``[H, H]`` from each entry; 0 where later."""
    hidden: Tensor
    """Which tokens ``[T]`` each token ``[T]`` may not read: those that are newer."""

    def __init__(self, embedded: int, width: int, length: int, heads: int, blocks: int, dropout: float) -> None:
        super().__init__()
        self.labels = Normaliser(1)
        self.enter = nn.Linear(embedded + 2, width)
        self.beginning = nn.Parameter(torch.randn(width) * 0.05)
        self.gap_table = nn.Parameter(torch.randn(GAP_CLASSES, width) * 0.05)
        self.place_bias = nn.Parameter(torch.zeros(length + 1, heads))
        self.gap_bias = nn.Parameter(torch.zeros(GAP_CLASSES, heads))
        self.encoder = nn.ModuleList(Block(width, heads, dropout) for _ in range(blocks))
        self.target = Block(width, heads, dropout)
        self.leave = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        newest = torch.arange(length)
        apart = (newest[None, :] - newest[:, None]).clamp_min(0)
        self.register_buffer("edges", SHORTEST_GAP * 2 ** torch.arange(GAP_CLASSES - 1), persistent=False)
        self.register_buffer("places", torch.cat([newest[None] + 1, apart]), persistent=False)
        self.register_buffer("hidden", torch.ones(length + 1, length + 1).tril(-1).bool(), persistent=False)

    def encode(self, items: Tensor, given: Tensor, labels: Tensor, gaps: Tensor) -> tuple[Tensor, Tensor]:
        """The history as the candidate reads it, and the bias with which it does.

        Args:
            items: what is embedded of each entry's item, newest first ``[..., H, X]``.
            given: which entries there are ``[..., H]``.
            labels: float32 ``[..., H]``, NaN where missing.
            gaps: seconds between each entry and the request, int64 ``[..., H]``.

        Returns:
            Tokens ``[..., T, W]``, the last is the learned one, and the bias ``[..., heads, 1, T]``.
        """
        entries = self.enter(torch.cat([items, self.labels(labels.unsqueeze(-1))], dim=-1))
        entries = entries + embedding(self._classes(gaps), self.gap_table)
        begin = self.beginning.expand(*entries.shape[:-2], 1, -1)
        tokens = torch.cat([entries, begin], dim=-2)
        towards = self._bias(gaps.unsqueeze(-2), self.places[:1], given)
        among = self._bias(gaps.unsqueeze(-2) - gaps.unsqueeze(-1), self.places[1:], given)
        # The learned token is the oldest: it reads nothing but itself.
        among = pad(among, (0, 0, 0, 1)).masked_fill(self.hidden, float("-inf"))
        for block in self.encoder:
            assert isinstance(block, Block)
            tokens = block(tokens, *block.read(tokens), among)
        return tokens, towards

    def forward(self, candidates: Tensor, history: tuple[Tensor, Tensor], row: Tensor | None = None) -> Tensor:
        """What candidates find, ``[..., W]``.

        Args:
            candidates: what is embedded of them ``[..., X]``.
            history: what `encode` gives.
            row: number of the history that each candidate reads, of ``[G, ...]`` encoded ones, int64 ``[N]``; the
                candidates are ``[N, X]`` then. None where each history's candidates follow one another, equally many.
        """
        tokens, bias = history
        # A candidate has no label yet: it is read as missing.
        one = torch.ones_like(candidates[..., :1])
        asking = self.enter(torch.cat([candidates, torch.zeros_like(one), one], dim=-1))
        keys, values = self.target.read(tokens)
        if row is None:
            together = asking.reshape(*tokens.shape[:-2], -1, tokens.shape[-1])
            found = self.target(together, keys, values, bias).reshape(asking.shape)
        else:
            found = self.target(asking.unsqueeze(-2), keys[row], values[row], bias[row]).squeeze(-2)
        normal: Tensor = self.dropout(self.leave(found))
        return normal

    def _bias(self, gaps: Tensor, places: Tensor, given: Tensor) -> Tensor:
        """Bias ``[..., heads, Q, T]`` by gaps ``[..., Q, H]``, places ``[Q, H]`` and what is there ``[..., H]``."""
        bias = (embedding(self._classes(gaps), self.gap_bias) + embedding(places, self.place_bias)).movedim(-1, -3)
        return pad(bias.masked_fill(~given.unsqueeze(-2).unsqueeze(-3), float("-inf")), (0, 1))

    def _classes(self, gaps: Tensor) -> Tensor:
        """Class of each gap, by integers alone: a logarithm is rounded one way by torch, and another by a server."""
        if torch.compiler.is_exporting():  # three nodes, where a search takes a hundred, for more memory
            return (gaps.unsqueeze(-1) >= self.edges).to(torch.int32).sum(dim=-1).to(torch.int64)
        return torch.bucketize(gaps.contiguous(), self.edges, right=True)
