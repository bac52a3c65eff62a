"""Several members as one teacher, and how a student is told what they say.

Shapes: M members, T rows, K objectives.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tasks.learning.solvers import ObjectiveKind


def _binary(kinds: Sequence[ObjectiveKind], device: torch.device) -> Tensor:
    return torch.tensor([kind == "binary" for kind in kinds], device=device)


def combined(scores: Sequence[Tensor], kinds: Sequence[ObjectiveKind]) -> Tensor:
    """Scores of the ensemble: the members' mean probability of a binary objective, their mean value of a rating.

    Args:
        scores: of each member ``[T, K]``, before the sigmoid.
        kinds: kind of each objective.

    Returns:
        ``[T, K]``, before the sigmoid. The log-odds of a mean probability are taken from the logarithms of both sums,
        so that members who are all but certain give no infinite score.

    Probabilities of 0.2 and 0.6 have the mean 0.4.

    >>> said = [torch.logit(torch.tensor([[0.2]])), torch.logit(torch.tensor([[0.6]]))]
    >>> round(combined(said, ["binary"]).sigmoid().item(), 6)
    0.4
    >>> combined([torch.tensor([[3.0]]), torch.tensor([[4.0]])], ["rating"]).item()
    3.5
    """
    stacked = torch.stack(list(scores))
    odds = logsigmoid(stacked).logsumexp(dim=0) - logsigmoid(-stacked).logsumexp(dim=0)
    return torch.where(_binary(kinds, stacked.device), odds, stacked.mean(dim=0))


def soft_labels(scores: Tensor, labels: Tensor, kinds: Sequence[ObjectiveKind]) -> Tensor:
    """What a student is to say instead of the labels: probabilities or values.

    The cross-entropy with probabilities in place of labels is the loss of Hinton, Vinyals and Dean, Distilling the
    Knowledge in a Neural Network, 2015, at temperature 1: probabilities of clicks are far from 0 and 1 as they are.

    Args:
        scores: of the teacher ``[T, K]``, before the sigmoid.
        labels: ``[T, K]``; where one is missing the teacher's word is too, so that both losses are of the same rows.
        kinds: kind of each objective.
    """
    told = torch.where(_binary(kinds, scores.device), scores.sigmoid(), scores)
    return torch.where(torch.isnan(labels), labels, told)
