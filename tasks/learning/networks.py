"""The ranker: one shared network that scores rows and says which features adapters may bend.

Shapes: ``...`` any leading axes, Cr/Cc ids per request/candidate, Fr/Fc numbers, S statistics, K objectives,
D adapter features, E embedding width, H hidden width, X inputs of the joint perceptron, P numbers of an adapter per
objective.
"""

from collections.abc import Mapping
from itertools import accumulate
from typing import Literal, Self

import torch
from torch import Tensor, nn

from tasks.learning.attention import Attention
from tasks.learning.bending import Bent, Perceptron, mirror
from tasks.learning.layers import Cross, Matching, Normaliser, WarmUp, at_positions, normalised
from tasks.learning.lists import ListInputs, pooled
from tasks.learning.ranker_config import RankerConfig
from tasks.learning.ranker_shape import RankerShape


class Ranker(nn.Module):
    """Scores rows before adaptation, and gives the features that adapters work on.

    An adapted row's logit is ``logits[..., k] + features[..., :] @ bank[slot, k, :]``; for adapters that bend the dense
    layers, features are the joint perceptron's inputs, and `Bent.change` replaces the product; matching reads shares.
    """

    unread: Tensor
    """What scales of statistics are multiplied with ``[S]``: 1, or infinity where the layers do not read them."""
    request_rows: Tensor
    """Rows of each request embedding table, int64 ``[Cr]``: a tensor, so that a traced graph does not say it."""
    candidate_rows: Tensor
    """Rows of each candidate embedding table, int64 ``[Cc]``."""

    def __init__(self, shape: RankerShape, config: RankerConfig, bent: Bent | None = None, prototypes: int = 0) -> None:
        """Build the network.

        Args:
            shape: what the layers are sized by.
            config: the ranker's.
            bent: what adapters bend of the joint perceptron; None for linear adapters on features of their own.
            prototypes: how many rows have shares in, for adapters that match; 0 for others.
        """
        super().__init__()
        self.shape, self.config, self.bent, self.prototypes = shape, config, bent, prototypes
        width, hidden = config.embedding, config.hidden
        self.request_tables = nn.ModuleList(nn.Embedding(rows, width) for rows in shape.request_vocabularies)
        self.candidate_tables = nn.ModuleList(nn.Embedding(rows, width) for rows in shape.candidate_vocabularies)
        self.request_normaliser = Normaliser(shape.request_numbers)
        self.candidate_normaliser = Normaliser(shape.candidate_numbers)
        self.statistics_normaliser = Normaliser(shape.statistics)
        requests = len(shape.request_vocabularies) * width + 2 * shape.request_numbers + len(shape.request_statistics)
        candidates = (
            len(shape.candidate_vocabularies) * width + 2 * shape.candidate_numbers + len(shape.candidate_statistics)
        )
        self.request_lists = self._lists_of("request")
        self.candidate_lists = self._lists_of("candidate")
        requests += 0 if self.request_lists is None else self.request_lists.width
        candidates += 0 if self.candidate_lists is None else self.candidate_lists.width
        self.request_tower = nn.Sequential(nn.Linear(requests, hidden), nn.ReLU(), nn.Linear(hidden, hidden))
        self.candidate_tower = nn.Sequential(nn.Linear(candidates, hidden), nn.ReLU(), nn.Linear(hidden, hidden))
        transformer = config.kind == "transformer"
        both = (3 if transformer else 2) * hidden + len(shape.joint_statistics)
        self.cross = Cross(both, config.cross_layers) if config.kind == "dcn" else None
        self.joint = nn.Sequential(
            nn.Linear(both if self.cross is not None else both + hidden, hidden),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(hidden, len(shape.kinds)),
        )
        self.wide = nn.Linear(shape.statistics, len(shape.kinds))
        self.head = nn.Linear(hidden, config.features) if config.features and bent is None else None
        sizes = (config.factors, *(config.category_factors for _ in shape.candidate_vocabularies[1:]))
        if bent is not None:
            sizes = (0,) * len(sizes)
        self.factored = tuple(at for at, size in enumerate(sizes) if size)
        self.factor_tables = nn.ModuleList(
            nn.Embedding(shape.candidate_vocabularies[at], sizes[at]) for at in self.factored
        )
        if config.category_factors and bent is None:
            of_values = (nn.Embedding(rows, config.category_factors) for rows in shape.candidate_value_vocabularies)
            self.factor_tables.extend(of_values)
        for table in self.factor_tables:
            assert isinstance(table, nn.Embedding)
            nn.init.zeros_(table.weight)
        told = bool(shape.candidate_numbers or len(shape.candidate_vocabularies) > 1)
        self.warm_up = (
            WarmUp(2 * shape.candidate_numbers, shape.candidate_vocabularies[1:], config.factors)
            if config.warm_up and config.factors and told and bent is None
            else None
        )
        self.matching = Matching(next(reversed(self._linear.values())).stop, prototypes) if prototypes else None
        self.dropout = nn.Dropout(config.dropout)
        unread = torch.ones(shape.statistics)
        unread[list(() if config.user_statistics else shape.request_statistics)] = torch.inf
        self.register_buffer("unread", unread, persistent=False)
        for name, rows in (("request", shape.request_vocabularies), ("candidate", shape.candidate_vocabularies)):
            self.register_buffer(f"{name}_rows", torch.tensor(rows, dtype=torch.int64), persistent=False)
        for table in (*self.request_tables, *self.candidate_tables):
            nn.init.normal_(table.weight, std=0.05)
        first, last = self.joint[0], self.joint[-1]
        assert isinstance(first, nn.Linear)
        assert isinstance(last, nn.Linear)
        self.joint_inputs = first.in_features
        for layer in (last, self.wide):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        # Zeros, which draw nothing: a network with it starts where one without it does.
        predicted = self.width - self._solved if config.prior and bent is None and not prototypes else 0
        self.prior = nn.Parameter(torch.zeros(len(shape.kinds), predicted, hidden)) if predicted else None
        self.attention = (
            Attention(
                *(len(shape.candidate_vocabularies) * width, hidden, config.history),
                *(config.heads, config.blocks, config.dropout),
            )
            if transformer
            else None
        )
        if bent is not None:
            mirror(first, last)
        if bent is not None and bent.kind == "lora":
            self.low_rank = nn.Parameter(torch.randn(bent.rank, self.joint_inputs) * self.joint_inputs**-0.5)

    def _lists_of(self, side: Literal["request", "candidate"]) -> ListInputs | None:
        """The list columns of one side, if there are any."""
        vocabularies, values, vectors = (
            getattr(self.shape, f"{side}_{what}") for what in ("value_vocabularies", "values", "vectors")
        )
        return ListInputs(vocabularies, values, vectors, self.config.embedding) if values or vectors else None

    @property
    def _solved(self) -> int:
        """How many features, the first, have weights that are not predicted.

        The constant, which the layers have as well, and the factors, which every night solves anew.
        """
        before = [name for name in self.parts if name == "constant" or "factors" in name]
        return int(self.parts[before[-1]].stop)

    @property
    def width(self) -> int:
        """Numbers of an adapter per objective: D, one for each feature; P where the dense layers are bent."""
        return next(reversed(self.parts.values())).stop  # type: ignore[no-any-return]

    @property
    def fan_in(self) -> Tensor:
        """How many of an adapter's numbers share a precision where precisions start ``[width]``, see `Bent.fan_in`."""
        if self.bent is None:
            return torch.full((self.width,), 1.0 / max(1, self.prototypes))  # together they are held as a constant is
        return self.bent.fan_in(self.joint_inputs, self.config.hidden)

    @property
    def parts(self) -> dict[str, slice]:
        """What an adapter's numbers are about, in their order: name to positions. None is empty."""
        if self.bent is not None:
            return self.bent.parts(self.joint_inputs, self.config.hidden)
        if self.prototypes:
            return {"prototypes": slice(0, self.prototypes)}
        return self._linear

    @property
    def _linear(self) -> dict[str, slice]:
        """What the features of a row are, in their order: name to positions."""
        sizes = {
            "constant": 1,
            "item factors": self.config.factors,
            "category factors": self.config.category_factors
            * (len(self.shape.candidate_vocabularies) - 1 + len(self.shape.candidate_values)),
            "numbers": self.shape.candidate_numbers if self.config.direct else 0,
            "tower features": self.config.features,
        }
        ends = accumulate(sizes.values())
        return {name: slice(end - sizes[name], end) for name, end in zip(sizes, ends, strict=True) if sizes[name]}

    def _known(self, ids: Tensor, rows: Tensor) -> Tensor:
        """Ids that the table has; newer ones, and in training a random share, become the unknown row 0."""
        known = ids * (ids < rows)
        if self.training and self.config.id_dropout > 0:
            known = known * (torch.rand(ids.shape, device=ids.device) >= self.config.id_dropout)
        return known

    def _categories(self, candidate_ids: Tensor) -> list[Tensor]:
        """Ids of the candidate's categories, the item left out."""
        rows = self.candidate_rows
        return [self._known(candidate_ids[..., at], rows[at]) for at in range(1, len(self.candidate_tables))]

    def _embed(self, tables: nn.ModuleList, rows: Tensor, ids: Tensor) -> list[Tensor]:
        return [table(self._known(ids[..., at], rows[at])) for at, table in enumerate(tables)]

    def _listed(self, lists: ListInputs | None, values: Tensor | None, vectors: Tensor | None) -> list[Tensor]:
        return [] if lists is None else [lists(values, vectors, self._known)]

    def normal_statistics(self, statistics: Tensor, positions: tuple[int, ...] | None = None) -> Tensor:
        """Statistics as the layers read them: normalised, and 0 where the config leaves them out.

        Args:
            statistics: in model units ``[..., S]``, or ``[..., P]`` of some positions.
            positions: which; None for all.
        """
        own = self.statistics_normaliser
        mean, scale = own.mean, own.scale if self.config.user_statistics else own.scale * self.unread
        if positions is not None:
            mean, scale = at_positions(mean, positions), at_positions(scale, positions)
        return normalised(statistics, mean, scale)

    def forward(
        self,
        request_ids: Tensor,
        candidate_ids: Tensor,
        request_numbers: Tensor,
        candidate_numbers: Tensor,
        statistics: Tensor,
        request_values: Tensor | None = None,
        candidate_values: Tensor | None = None,
        request_vectors: Tensor | None = None,
        candidate_vectors: Tensor | None = None,
        history_ids: Tensor | None = None,
        history_labels: Tensor | None = None,
        history_gaps: Tensor | None = None,
        history_row: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Score rows without an adapter.

        Args:
            request_ids: vocabulary ids, int64 ``[..., Cr]``; 0, and ids beyond the table, are unknown.
            candidate_ids: vocabulary ids, int64 ``[..., Cc]``, the item's first.
            request_numbers: raw numbers, float32 ``[..., Fr]``, NaN where missing.
            candidate_numbers: raw numbers, float32 ``[..., Fc]``.
            statistics: as-of statistics, float32 ``[..., S]``, in model units.
            request_values: ids of the `multi` columns side by side, int64, -1 behind a list's end; read only where
                the shape has such columns, as the rest.
            candidate_values: of the candidate's.
            request_vectors: the `dense` columns side by side, float32, NaN where a vector is missing.
            candidate_vectors: of the candidate's.
            history_ids: the user's recent rows, newest first: ids as the candidate's, int64 ``[G, H, Cc]``, -1 behind
                the oldest; read by a `transformer` only, as the rest.
            history_labels: labels of their first objective, float32 ``[G, H]``, NaN where missing.
            history_gaps: seconds between them and the request, int64 ``[G, H]``.
            history_row: which of the G each row has, int64 ``[N]``, where the rows are ``[N]``. None where equally many
                rows that follow one another, the candidates of a request, have one in common.

        Returns:
            Logits ``[..., K]`` (for ratings: values) and adapter features ``[..., D]``; shares in D prototypes, where
            adapters match; ``[..., X]``, the inputs of the joint perceptron, where that is what they bend.
        """
        of_request = at_positions(statistics, self.shape.request_statistics)
        asking = self.ask(request_ids, request_numbers, of_request, request_values, request_vectors)
        of_candidates = (candidate_ids, candidate_numbers, statistics, candidate_values, candidate_vectors)
        return self.answer(asking, *of_candidates, history_ids, history_labels, history_gaps, history_row)

    def ask(
        self,
        request_ids: Tensor,
        request_numbers: Tensor,
        statistics: Tensor,
        request_values: Tensor | None = None,
        request_vectors: Tensor | None = None,
    ) -> Tensor:
        """What the layers make of a request, whatever its candidates: ``[..., H]``.

        Args:
            request_ids: as for `forward`, like the rest.
            request_numbers: likewise.
            statistics: those of the request alone, in model units.
            request_values: likewise.
            request_vectors: likewise.
        """
        positions = self.shape.request_statistics
        request = torch.cat(
            [
                *self._embed(self.request_tables, self.request_rows, request_ids),
                self.request_normaliser(request_numbers),
                self.normal_statistics(statistics, positions),
                *self._listed(self.request_lists, request_values, request_vectors),
            ],
            dim=-1,
        )
        asking: Tensor = self.request_tower(request)
        return asking

    def answer(
        self,
        left: Tensor,
        candidate_ids: Tensor,
        candidate_numbers: Tensor,
        statistics: Tensor,
        candidate_values: Tensor | None = None,
        candidate_vectors: Tensor | None = None,
        history_ids: Tensor | None = None,
        history_labels: Tensor | None = None,
        history_gaps: Tensor | None = None,
        history_row: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Score rows whose requests the layers have seen.

        Args:
            left: what `ask` gives of each row's request ``[..., H]``.
            candidate_ids: as for `forward`, like the rest.
            candidate_numbers: likewise.
            statistics: likewise.
            candidate_values: likewise.
            candidate_vectors: likewise.
            history_ids: likewise.
            history_labels: likewise.
            history_gaps: likewise.
            history_row: likewise.

        Returns:
            As `forward`.
        """
        shape, normal = self.shape, self.normal_statistics(statistics)
        numbers = self.candidate_normaliser(candidate_numbers)
        embedded = self._embed(self.candidate_tables, self.candidate_rows, candidate_ids)
        candidate = torch.cat(
            [
                *embedded,
                numbers,
                at_positions(normal, shape.candidate_statistics),
                *self._listed(self.candidate_lists, candidate_values, candidate_vectors),
            ],
            dim=-1,
        )
        right = self.candidate_tower(self.dropout(candidate))
        if self.training and self.config.request_dropout > 0:
            left = left * (torch.rand(left.shape[:-1], device=left.device) >= self.config.request_dropout)[..., None]
        seen = at_positions(normal, shape.joint_statistics)
        if self.cross is None:
            parts = [left, right, left * right]
            if self.attention is not None:
                assert history_ids is not None
                assert history_labels is not None
                assert history_gaps is not None
                items = self._embed(self.candidate_tables, self.candidate_rows, history_ids.clamp_min(0))
                entries = (torch.cat(items, dim=-1), history_ids[..., 0] >= 0, history_labels, history_gaps)
                read = self.attention.encode(*entries)
                parts.append(self.attention(torch.cat(embedded, dim=-1), read, history_row))
            joint = torch.cat([*parts, seen], dim=-1)
        else:
            joint = self.cross(torch.cat([left, right, seen], dim=-1))
        logits = at_positions(statistics, shape.offsets) + self.wide(normal) + self.joint(joint)
        if self.bent is not None:
            return logits, joint
        features = [torch.ones_like(logits[..., :1])]
        for at, table in zip(self.factored, self.factor_tables[: len(self.factored)], strict=True):
            factors = table(self._known(candidate_ids[..., at], self.candidate_rows[at]))
            if at == 0 and self.warm_up is not None:
                # Without rows they are 0 to the bit: closed forms leave them so, and no gradient moves them.
                learned = (factors != 0).any(dim=-1, keepdim=True)
                factors = torch.where(learned, factors, self.warm_up(numbers, self._categories(candidate_ids)))
            features.append(factors)
        if self.candidate_lists is not None and self.config.category_factors:
            values = self.candidate_lists.read(candidate_values, self._known)
            tables = self.factor_tables[len(self.factored) :]
            features += [pooled(table, *one) for table, one in zip(tables, values, strict=True)]
        if self.config.direct and shape.candidate_numbers:
            features.append(numbers[..., : shape.candidate_numbers])
        if self.head is not None:
            features.append(self.head(right))
        keys = torch.cat(features, dim=-1)
        if self.prior is not None:
            told = keys[..., self._solved :]
            # A product with ones: onnxruntime's sum forgets to reduce what is empty.
            one = torch.ones(told.shape[-1], 1, dtype=told.dtype, device=told.device)
            sums = [torch.matmul(left @ prior.mT * told, one) for prior in self.prior]
            logits = logits + torch.cat(sums, dim=-1)
        return logits, keys if self.matching is None else self.matching(keys)

    def perceptron(self, parameters: Mapping[str, Tensor] | None = None) -> Perceptron | None:
        """The layers that adapters bend; None where adapters are linear.

        Args:
            parameters: by name, in place of the network's own.
        """
        if self.bent is None:
            return None
        given = dict(self.named_parameters()) if parameters is None else parameters
        first, shift, last = (given[f"joint.{name}"] for name in ("0.weight", "0.bias", "3.weight"))
        return Perceptron(first, shift, last, given.get("low_rank"))

    def change(self, features: Tensor, weights: Tensor) -> Tensor:
        """What adapters add to scores ``[R, S, K]``, of features ``[R, S, D or X]`` and weights ``[R, K, D or P]``."""
        layers = self.perceptron()
        if self.bent is None or layers is None:
            return torch.matmul(features, weights.transpose(1, 2))
        return self.bent.change(layers, features, weights)

    @classmethod
    def restore(
        cls, shape: RankerShape, config: RankerConfig, state: dict[str, Tensor], bent: Bent | None, prototypes: int
    ) -> Self:
        """A network with the given weights, in evaluation mode.

        Raises:
            RuntimeError: if names or shapes of the weights do not fit.
        """
        network = cls(shape, config, bent, prototypes)
        network.load_state_dict(state)
        return network.eval()
