"""The ways of adaptation, for many segments at once: closed forms, joint or prototype by prototype, and gradient steps.

Pure functions of the same inputs, with the same answers; everything is differentiable with respect to every input.

Shapes: B segments, S support rows (padded), K objectives, D adapter features.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from tasks.learning.positive import solve_positive

ObjectiveKind = Literal["binary", "rating"]
SMALLEST_CURVATURE = 1e-3
"""Floor of p(1 - p), so that a saturated row cannot make a step explode."""
STEEPEST = {"binary": 0.25, "rating": 1.0}
"""Most that a row's loss can curve along its score, by kind: p(1 - p) at a half, and 1."""
HALVINGS = 4
"""How often a step through layers is halved before it is not taken."""


def solve(
    features: Tensor,
    offsets: Tensor,
    labels: Tensor,
    weights: Tensor,
    precision: Tensor,
    kinds: Sequence[ObjectiveKind],
    steps: int = 1,
) -> Tensor:
    r"""Weights that bend each segment's scores towards its support rows: a ridge on the residuals of the offsets.

    Per segment and objective, Newton steps on the penalised likelihood, from ``w = 0``:

        w <- w + (Phi' S Phi + Lambda)^-1 (Phi' (y - m(o + Phi w)) - Lambda w)

    with ``m`` the sigmoid and ``S = diag(p (1 - p))`` for binary objectives (one step is the ridge on residuals), and
    the identity and ``S = I`` for ratings, where one step is exact. See Bishop, Pattern Recognition and Machine
    Learning, 4.3.3 and 4.4. Everything is differentiable with respect to every input.

    Args:
        features: ``[B, S, D]``.
        offsets: scores before this adaptation, the parent's part included, ``[B, S, K]``.
        labels: ``[B, S, K]``; NaN where missing.
        weights: row weights ``[B, S]``; 0 for padding.
        precision: ``[K, D]``, positive: how strongly each weight is held at 0, in units of row weight.
        kinds: kind of each objective.
        steps: Newton steps.

    Returns:
        Weights ``[B, K, D]``; exactly 0 for a segment without support.

    One segment whose 4 rows say 1 where 0.5 was expected, held by a precision of 1: w = (4 * 0.5) / (4 * 0.25 + 1).

    >>> ones = torch.ones(1, 4, 1)
    >>> solve(ones, torch.zeros(1, 4, 1), ones, torch.ones(1, 4), torch.ones(1, 1), ["binary"])
    tensor([[[1.]]])
    """
    rows = (features, offsets, labels, weights, precision, kinds)
    solution = features.new_zeros(features.shape[0], labels.shape[-1], features.shape[-1])
    bent = torch.zeros_like(offsets)
    for step in range(steps):
        if step > 0:
            bent = bent_by(features, solution)
        if features.shape[1] < features.shape[2]:
            solution = _newton_by_rows(*rows, bent)
        else:
            gradient, hessian = newton(*rows, solution, bent)
            solution = solution + solve_positive(hessian, gradient)
    return solution


def match(
    features: Tensor,
    offsets: Tensor,
    labels: Tensor,
    weights: Tensor,
    precision: Tensor,
    kinds: Sequence[ObjectiveKind],
) -> Tensor:
    r"""What prototypes remember of each segment's support: attention over its rows, as numbers that rows to come read.

    Per segment, objective and prototype j, the mean of what its rows leave unexplained, shrunk by the precision:

        v_j = sum_i w_i phi_ij (y_i - m(o_i)) / (lambda_j + sum_i w_i phi_ij s_i)

    with ``phi`` each row's shares in the prototypes, and ``m`` and ``s`` as for `solve`. A later row q reads
    ``phi_q . v``, which is attention over the support: ``sum_i a_qi (y_i - m(o_i)) / s_i`` with

        a_qi = sum_j phi_qj w_i phi_ij s_i / (lambda_j + sum_l w_l phi_lj s_l)

    not negative, and in all at most 1; exactly 1 without a precision. Shares add up to 1 in every row, so that the
    denominators are the row sums of the ridge's system: for ratings v is a step that never loses, without a system to
    solve and linear in the number of prototypes. With one prototype it is one Newton step of a constant.

    Sources: matching networks (Vinyals et al., 2016), whose labels are here what the inherited scores leave over; a
    softmax over prototypes and then a mean over rows, slot attention (Locatello et al., 2020); as a feature map, which
    makes attention a few sums whatever the support, Katharopoulos et al., Transformers are RNNs, 2020.

    Args:
        features: each row's shares in the prototypes ``[B, S, D]``, not negative, 1 in all.
        offsets: ``[B, S, K]``; this and the others as for `solve`.
        labels: ``[B, S, K]``; NaN where missing.
        weights: ``[B, S]``; 0 for padding.
        precision: ``[K, D]``, positive.
        kinds: of the objectives.

    Returns:
        Weights ``[B, K, D]``; exactly 0 for a segment without support.

    Of two prototypes one has seen three rows that say 2 more than expected, held by a precision of 1: 6 / (3 + 1).

    >>> shares = torch.tensor([[[1.0, 0.0]] * 3])
    >>> match(shares, torch.zeros(1, 3, 1), 2 * torch.ones(1, 3, 1), torch.ones(1, 3), torch.ones(1, 2), ["rating"])
    tensor([[[1.5000, 0.0000]]])
    """
    residual, curvature, mass = likelihood(offsets, labels, weights, kinds)
    said = torch.einsum("bsd,bsk->bkd", features, mass * residual)
    return said / (torch.einsum("bsd,bsk->bkd", features, mass * curvature) + precision)


def descend(
    features: Tensor,
    offsets: Tensor,
    labels: Tensor,
    weights: Tensor,
    precision: Tensor,
    kinds: Sequence[ObjectiveKind],
    steps: int,
    first_order: bool = False,
) -> Tensor:
    r"""Weights after a few gradient steps on each segment's penalised support loss, from what its parent's scores give.

    Per segment and objective, from ``w = 0``, with `m` the sigmoid for binary objectives and the identity for ratings:

        g <- Phi' (y - m(o + Phi w)) - Lambda w,    v <- g / Lambda,    w <- w + v (g'v) / (g'v + c |Phi v|^2)

    The learned rate of a weight is one over its precision, per level, objective and feature: how far a single row moves
    it. The fraction is the length at which a step gains most if the loss curves as strongly as it can, `c` a row: of
    weighed rows a sum, so that neither a thousand rows nor an extreme number overshoot, and a step never loses. The
    pull towards the parent is what keeps many steps from following little support anywhere.

    Sources: learned rates, Meta-SGD (Li et al., 2017); the pull, implicit MAML (Rajeswaran et al., 2019). With features
    learned by the outer loop it is ANIL (Raghu et al., 2020), with rates alone MAML on the head (Finn et al., 2017).
    The fraction: steepest descent on a quadratic bound (Boehning and Lindsay, 1988).

    Args:
        features: ``[B, S, D]``; this and the next five as for `solve`.
        offsets: ``[B, S, K]``.
        labels: ``[B, S, K]``; NaN where missing.
        weights: ``[B, S]``; 0 for padding.
        precision: ``[K, D]``, positive.
        kinds: of the objectives.
        steps: gradient steps.
        first_order: what the support says, ``Phi' (y - m)`` of every step and the rows in the length, is constant to
            whoever differentiates the answer, which then depends on the precision alone: no second derivative of a
            row's loss is ever taken (Finn et al., 2017, 5.2, for rates as well).

    Returns:
        Weights ``[B, K, D]``; exactly 0 for a segment without support. With ever more steps, those of the ridge.

    Four rows say 1 where 0.5 was expected: g = v = 2, and the length is 4 / (4 + 0.25 * 4 * 4).

    >>> ones = torch.ones(1, 4, 1)
    >>> descend(ones, torch.zeros(1, 4, 1), ones, torch.ones(1, 4), torch.ones(1, 1), ["binary"], 1)
    tensor([[[1.]]])
    """
    mass, curving = _curving(offsets, labels, weights, kinds, first_order)
    seen = features.detach() if first_order else features
    solution = features.new_zeros(features.shape[0], labels.shape[-1], features.shape[-1])
    for _ in range(steps):
        residual, _, _ = likelihood(offsets + bent_by(features, solution), labels, weights, kinds)
        said = torch.einsum("bsd,bsk->bkd", features, mass * residual)
        slope = (said.detach() if first_order else said) - precision * solution
        way = slope / precision
        gain = (slope * way).sum(dim=-1, keepdim=True)
        bend = (torch.einsum("bsd,bkd->bsk", seen, way) ** 2 * curving).sum(dim=1)[..., None]
        # Nothing to gain is nowhere to go: the length of that step does not matter, but it has to be a number.
        solution = solution + way * gain / torch.where(gain > 0, gain + bend, torch.ones_like(gain))
    return solution


def descend_through(
    change: Callable[[Tensor], Tensor],
    offsets: Tensor,
    labels: Tensor,
    weights: Tensor,
    precision: Tensor,
    kinds: Sequence[ObjectiveKind],
    steps: int,
    first_order: bool = False,
) -> Tensor:
    r"""`descend` for weights that change scores in any way, not as a product with features.

    The gradient is that of the penalised support loss through `change`, and in the length the scores move along the
    step as their tangent does: with J the derivative of `change` at ``w``,

        g <- J' (y - m(o + change(w))) - Lambda w,    v <- g / Lambda,    w <- w + h v (g'v) / (g'v + c |J v|^2)

    Layers bend, so that the tangent bounds nothing. Each segment and objective whose penalised loss would rise takes
    half the step (h = 1, 1/2, 1/4 ...), and none if `HALVINGS` of them do not help. No step loses, therefore, and
    ``w' Lambda w`` is at most twice the loss that the support had under the parent: little support stays near it. To
    whoever differentiates, h is a constant. All segments take their gradient at once: none depends on another's w.

    Sources: as for `descend`; the tangent, Gauss-Newton (Nocedal and Wright, Numerical Optimization, 2006, 10.3); the
    halving, backtracking (the same, 3.1). With all weights of the layers it is Meta-SGD (Li et al., 2017).

    Args:
        change: own weights ``[B, K, P]`` to what they add to the scores ``[B, S, K]``; 0 to 0.
        offsets: scores before this adaptation ``[B, S, K]``; this and the others as for `descend`.
        labels: ``[B, S, K]``; NaN where missing.
        weights: ``[B, S]``; 0 for padding.
        precision: ``[K, P]``, positive.
        kinds: of the objectives.
        steps: gradient steps.
        first_order: what the support says is constant, as in `descend`; whatever `change` holds must be so as well.

    Returns:
        Weights ``[B, K, P]``; exactly 0 for a segment without support.
    """
    mass, curving = _curving(offsets, labels, weights, kinds, first_order)
    solution = precision.new_zeros(len(offsets), *precision.shape)
    for _ in range(steps):
        here = solution.detach() if first_order else solution
        changed, pulled_back = torch.func.vjp(change, here)[:2]
        residual, _, _ = likelihood(offsets + changed, labels, weights, kinds)
        (said,) = pulled_back(mass * residual)
        slope = (said.detach() if first_order else said) - precision * solution
        way = slope / precision
        gain = (slope * way).sum(dim=-1, keepdim=True)
        # The tangent of a function is the transpose of its gradient's: J v is what v is pulled back to by u -> J' u.
        _, along_of = torch.func.vjp(lambda u, here=here: torch.func.vjp(change, here)[1](u)[0], residual)[:2]
        (along,) = along_of(way)
        bend = (along**2 * curving).sum(dim=1)[..., None]
        step = way * gain / torch.where(gain > 0, gain + bend, torch.ones_like(gain))
        with torch.no_grad():
            share = torch.ones_like(gain)
            least = _penalised(changed, solution, offsets, labels, weights, precision, kinds)
            for tried in range(HALVINGS + 1):
                there = solution + share * step
                worse = ~(_penalised(change(there), there, offsets, labels, weights, precision, kinds) <= least)
                if not worse.any():
                    break
                share = torch.where(worse[..., None], share / 2 if tried < HALVINGS else torch.zeros_like(share), share)
        solution = solution + share * step
    return solution


def variances(
    features: Tensor,
    offsets: Tensor,
    labels: Tensor,
    weights: Tensor,
    precision: Tensor,
    kinds: Sequence[ObjectiveKind],
    solution: Tensor,
) -> Tensor:
    """How unsure each solved weight is: the diagonal of the inverse Hessian at a solution (Laplace's approximation).

    Args:
        features: ``[B, S, D]``; this and the next five as for `solve`.
        offsets: ``[B, S, K]``.
        labels: ``[B, S, K]``.
        weights: ``[B, S]``.
        precision: ``[K, D]``.
        kinds: of the objectives.
        solution: the solved weights ``[B, K, D]``.

    Returns:
        Variances ``[B, K, D]``; ``1 / precision`` for a segment without support.

    >>> ones = torch.ones(1, 4, 1)
    >>> variances(ones, ones, ones, torch.ones(1, 4), torch.ones(1, 1), ["rating"], torch.zeros(1, 1, 1))
    tensor([[[0.2000]]])
    """
    rows = (features, offsets, labels, weights, precision, kinds)
    _, hessian = newton(*rows, solution, bent_by(features, solution))
    return torch.cholesky_inverse(torch.linalg.cholesky(hessian)).diagonal(dim1=-2, dim2=-1)


def bent_by(features: Tensor, solution: Tensor) -> Tensor:
    """What weights ``[B, K, D]`` add to the scores of their segments' rows ``[B, S, K]``."""
    return torch.einsum("bsd,bkd->bsk", features, solution)


def newton(
    features: Tensor,
    offsets: Tensor,
    labels: Tensor,
    weights: Tensor,
    precision: Tensor,
    kinds: Sequence[ObjectiveKind],
    solution: Tensor,
    bent: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradient of the penalised likelihood ``[B, K, D]``, and minus its Hessian ``[B, K, D, D]``."""
    residual, curvature, mass = likelihood(offsets + bent, labels, weights, kinds)
    gradient = torch.einsum("bsd,bsk->bkd", features, mass * residual) - precision * solution
    scaled = features[:, :, None, :] * (mass * curvature)[..., None]
    hessian = torch.einsum("bskd,bse->bkde", scaled, features) + torch.diag_embed(precision)
    return gradient, hessian


def _newton_by_rows(
    features: Tensor,
    offsets: Tensor,
    labels: Tensor,
    weights: Tensor,
    precision: Tensor,
    kinds: Sequence[ObjectiveKind],
    bent: Tensor,
) -> Tensor:
    r"""The same Newton step from the rows' side, cheaper where a segment has fewer rows than features: ``[B, K, D]``.

    With R = (S weights)^(1/2) and z = Phi w + (y - m) / S, by Woodbury's identity:

        w <- Lambda^-1 Phi' R (I + R Phi Lambda^-1 Phi' R)^-1 R z
    """
    root, target, spread, system = by_rows(features, offsets, labels, weights, precision, kinds, bent)
    dual = solve_positive(system, target)
    return torch.einsum("bks,bksd->bkd", root * dual, spread)


def by_rows(
    features: Tensor,
    offsets: Tensor,
    labels: Tensor,
    weights: Tensor,
    precision: Tensor,
    kinds: Sequence[ObjectiveKind],
    bent: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a Newton step from the rows' side: R and R z ``[B, K, S]``, Phi Lambda^-1 ``[B, K, S, D]``, and its system."""
    residual, curvature, mass = likelihood(offsets + bent, labels, weights, kinds)
    # The root of 0 has no finite slope, and padding has no mass.
    root = ((mass * curvature).clamp_min(1e-30).sqrt() * (mass > 0)).mT
    target = root * (bent + residual / curvature).mT
    spread = features[:, None] / precision[:, None, :]
    system = root[..., :, None] * (spread @ features[:, None].mT) * root[..., None, :]
    system = system + torch.eye(features.shape[1], dtype=features.dtype, device=features.device)
    return root, target, spread, system


def _curving(
    offsets: Tensor, labels: Tensor, weights: Tensor, kinds: Sequence[ObjectiveKind], first_order: bool
) -> tuple[Tensor, Tensor]:
    """Mass of every row and objective, and the most that its loss can curve ``[B, S, K]``; constant in first order."""
    mass = weights[..., None] * ~torch.isnan(labels)
    steepest = torch.tensor([STEEPEST[kind] for kind in kinds], device=offsets.device, dtype=offsets.dtype)
    return mass, (mass.detach() if first_order else mass) * steepest


def likelihood(
    scores: Tensor, labels: Tensor, weights: Tensor, kinds: Sequence[ObjectiveKind]
) -> tuple[Tensor, Tensor, Tensor]:
    """Residual, curvature and mass of every row and objective ``[B, S, K]``; no mass where the label is missing."""
    given = ~torch.isnan(labels)
    binary = torch.tensor([kind == "binary" for kind in kinds], device=scores.device)
    chance = torch.sigmoid(scores)
    targets = torch.where(given, labels, torch.zeros_like(labels))
    residual = targets - torch.where(binary, chance, scores)
    curvature = torch.where(binary, (chance * (1 - chance)).clamp_min(SMALLEST_CURVATURE), torch.ones_like(chance))
    return residual, curvature, weights[..., None] * given


def _penalised(
    changed: Tensor,
    solution: Tensor,
    offsets: Tensor,
    labels: Tensor,
    weights: Tensor,
    precision: Tensor,
    kinds: Sequence[ObjectiveKind],
) -> Tensor:
    """The penalised support loss ``[B, K]`` of a solution, and of what it changes about the scores."""
    given = ~torch.isnan(labels)
    targets = torch.where(given, labels, torch.zeros_like(labels))
    scores = offsets + changed
    binary = torch.tensor([kind == "binary" for kind in kinds], device=scores.device)
    entropy = torch.nn.functional.softplus(scores) - targets * scores
    losses = torch.where(binary, entropy, 0.5 * (scores - targets) ** 2) * given * weights[..., None]
    return losses.sum(dim=1) + 0.5 * (precision * solution**2).sum(dim=-1)
