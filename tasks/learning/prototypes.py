"""Where matching begins: prototypes of rows, from the history and what segments thought of it.

Shapes: N rows, D adapter features, M prototypes.
"""

import numpy as np
import torch
from torch import Tensor

from tasks.learning.layers import SMALLEST_SCALE, Matching
from tasks.learning.networks import Ranker

ROUNDS = 10
"""Of finding centres."""
SHARPNESS = 2.0
"""Standard deviation over the prototypes of how well a row fits them, before the softmax: neither all of a row to one,
which no gradient moves, nor the same shares for all rows."""
JITTER = 0.05
"""How far centres are moved at random, in deviations of the rows: with fewer kinds of rows than prototypes some would
be equal, get equal gradients, and stay equal."""


def unmatched(network: Ranker) -> Ranker:
    """The same ranker with the features by which rows find their prototypes, copied, in evaluation mode."""
    linear = Ranker(network.shape, network.config).to(next(network.parameters()).device)
    linear.load_state_dict({name: v for name, v in network.state_dict().items() if not name.startswith("matching.")})
    return linear.eval()


def place(matching: Matching, features: Tensor, precisions: Tensor, random: np.random.Generator) -> None:
    """Put prototypes at the centres of clusters of rows, as far apart as segments think differently of them.

    Where tastes are lines in the features, drawn with these precisions, likings of two rows differ by

        d(f, f')^2 = sum over features of (f - f')^2 / precision

    on average: features that tell little of tastes count little. A row's shares are those of a mixture of equal
    Gaussians in this distance, ``softmax_j(-d(f, p_j)^2 / (2 t))``, of which what all have in common is left out: for
    each prototype a straight line in the features. How wide they are, t, is up to `SHARPNESS`.

    Source of the centres: k-means, begun as by Arthur and Vassilvitskii, k-means++, 2007.

    Args:
        matching: is changed.
        features: of rows of the history ``[N, D]``, the constant first.
        precisions: of linear tastes, as `priors.estimate` finds them ``[K, D]``.
        random: draws where the centres begin.
    """
    features = features.double().cpu()
    tells = (1 / precisions.double().cpu()).mean(dim=0).sqrt()
    tells[0] = 0.0
    mean = features.mean(dim=0)
    rows = (features - mean) * tells
    centres = _centres(rows, len(matching.prototypes), random)
    centres = centres + JITTER * rows.std(dim=0, correction=0) * torch.from_numpy(random.normal(size=centres.shape))
    fits = rows @ centres.mT - 0.5 * (centres**2).sum(dim=1)
    width = fits.std(dim=1, correction=0).mean().clamp_min(SMALLEST_SCALE) / SHARPNESS
    lines = centres * tells / width
    lines[:, 0] = -(lines @ mean) - 0.5 * (centres**2).sum(dim=1) / width
    with torch.no_grad():
        matching.prototypes.copy_(lines)


def _centres(rows: Tensor, count: int, random: np.random.Generator) -> Tensor:
    """Centres ``[M, D]`` of clusters of rows ``[N, D]``."""
    chosen = [int(random.integers(len(rows)))]
    nearest = torch.full((len(rows),), torch.inf, dtype=rows.dtype)
    for _ in range(1, count):
        nearest = torch.minimum(nearest, ((rows - rows[chosen[-1]]) ** 2).sum(dim=1))
        upto = nearest.cumsum(dim=0)
        drawn = torch.tensor(random.random() * float(upto[-1]), dtype=upto.dtype)
        chosen.append(min(int(torch.searchsorted(upto, drawn, right=True)), len(rows) - 1))
    centres = rows[chosen]
    for _ in range(ROUNDS):
        own = torch.cdist(rows, centres).argmin(dim=1)
        counts = torch.bincount(own, minlength=count)[:, None]
        sums = torch.zeros_like(centres).index_add(0, own, rows)
        centres = torch.where(counts > 0, sums / counts.clamp_min(1), centres)
    return centres
