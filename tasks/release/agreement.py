"""What a variant of the graph costs, held against the fp32 graph on the same rows; and whether rankers may take it.

Answers of both to the same rows are compared, so differences are paired, and intervals are bootstrapped by user. A
night's comparison is kept as sums per user, and the verdict reads those of the last nights together: with ten users a
night a pair of rows that changes places is a thousandth of AUC, whatever the variant.

Shapes: N rows, U users, K objectives, R requests, M candidates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.data.contract import ObjectiveConfig
from tasks.learning.intervals import Interval, UserSums, paired_intervals, pool, sum_by_user
from tasks.learning.metrics import auc_by_user, log_loss, squared_error
from tasks.release.export_config import ExportConfig, VariantName
from tasks.release.manifest_parts import LARGEST_DIFFERENCE, Variant

F32 = npt.NDArray[np.float32]
Outcome = Literal["passed", "failed"]
LIST = 10
"""Length of the lists that are compared."""
NOT_FINITE = "it gives scores that are not finite"


@dataclass(frozen=True)
class Compared:
    """A variant beside fp32 on a night, for one objective.

    Attributes:
        loss: its log-loss minus fp32's, summed by user; of a rating, squared error over the labels' variance.
        auc: fp32's AUC minus its own, of each user with both labels; without users for ratings.
        lists: mean share of fp32's top 10 that is in its own, over requests; None without requests.
        largest: largest difference of a score, of a rating relative to 1 + its value.
    """

    loss: UserSums
    auc: UserSums
    lists: float | None
    largest: float


def compared(
    objective: ObjectiveConfig, users: npt.NDArray[Any], labels: F32, plain: F32, variant: F32, lists: float | None
) -> Compared:
    """Compare answers to the same rows.

    Args:
        objective: which.
        users: whose row it is, by raw key [N].
        labels: [N], NaN where missing.
        plain: fp32's answers [N].
        variant: the variant's [N]; one that is not finite makes the largest difference infinite, and counts nowhere.
        lists: what their lists have in common.

    A variant that says 0.6 for 0.5 of a row that is liked gains log(0.6 / 0.5).

    >>> binary = ObjectiveConfig(name="liked", column="liked", kind="binary")
    >>> half, more = np.float32([0.5]), np.float32([0.6])
    >>> compared(binary, np.array(["u"]), np.float32([1]), half, more, None).loss.sums.round(4).tolist()
    [[-0.1823]]
    """
    sound = np.isfinite(variant)
    scale = 1.0 + np.abs(plain) if objective.kind == "rating" else 1.0
    apart = np.where(sound, np.abs(np.where(sound, variant, 0) - plain) / scale, np.inf)
    known = np.where(sound, labels, np.nan)
    said = np.where(sound, variant, plain)
    if objective.kind == "binary":
        rise = log_loss(known, said) - log_loss(known, plain)
        own, other = (auc_by_user(known, scores, users) for scores in (said, plain))
        auc = sum_by_user(own.users, (other.values - own.values)[:, None])
    else:
        variance = float(np.nanvar(known)) if np.isfinite(known).any() else 0.0
        rise = (squared_error(known, said) - squared_error(known, plain)) / (variance or 1.0)
        auc = sum_by_user(users[:0], np.zeros((0, 1)))
    return Compared(sum_by_user(users, rise[:, None]), auc, lists, float(apart.max(initial=0.0)))


def in_common(plain: F32, variant: F32, length: int = LIST) -> float | None:
    """Mean share of each request's best candidates by one graph that are among the best by the other.

    Args:
        plain: scores [R, M].
        variant: scores [R, M]; NaN is below all others.
        length: most candidates of a list.

    >>> in_common(np.float32([[3, 2, 1, 0]]), np.float32([[3, 1, 2, 0]]), length=2)
    0.5
    """
    requests, candidates = plain.shape
    if requests == 0 or candidates == 0:
        return None
    best = [np.argsort(-one, axis=1, kind="stable")[:, :length] for one in (plain, variant)]
    chosen = np.zeros((2, requests, candidates), bool)
    for which, order in enumerate(best):
        np.put_along_axis(chosen[which], order, True, axis=1)
    return float((chosen[0] & chosen[1]).sum() / chosen[0].sum())


@dataclass(frozen=True)
class Agreement:
    """A variant beside fp32 over some nights, for one objective, as a manifest tells it.

    Attributes:
        objective: which.
        log_loss: how much it adds per row, with its interval; see `Compared.loss`.
        auc: how much AUC a user loses; without users for ratings.
        lists: mean share of the top 10 in common on the newest night.
        largest: largest difference of a score on the newest night.
    """

    objective: str
    log_loss: Interval
    auc: Interval
    lists: float | None
    largest: float

    def as_json(self) -> dict[str, object]:
        """Fields as JSON knows them."""
        return {
            "objective": self.objective,
            "log_loss_rise": self.log_loss.as_json(),
            "auc_loss": self.auc.as_json(),
            "top_10_in_common": self.lists,
            "largest_difference": self.largest if np.isfinite(self.largest) else None,
        }


def agreement(objective: ObjectiveConfig, nights: Sequence[Compared]) -> Agreement:
    """Pool nights, the newest first."""
    loss = paired_intervals(pool([night.loss for night in nights]), seed=0)[0]
    auc = paired_intervals(pool([night.auc for night in nights]), seed=0)[0]
    return Agreement(objective.name, loss, auc, nights[0].lists, nights[0].largest)


def judged(
    config: ExportConfig, parity: float | None, found: Sequence[tuple[ObjectiveConfig, Agreement]]
) -> tuple[Outcome, str]:
    """Whether rankers may take a variant, and the sentence that says why.

    It passes where it is shown, for every objective, to cost no more than the limits: the upper bounds are within them.

    Args:
        config: the limits.
        parity: its largest difference on golden requests; None where an answer is not finite.
        found: what the held-out rows say, per objective.
    """
    if parity is None or any(not np.isfinite(one.largest) for _, one in found):
        return "failed", NOT_FINITE
    if parity > LARGEST_DIFFERENCE:
        return "failed", f"a golden request is answered {parity:.3g} off, limit {LARGEST_DIFFERENCE:g}"
    for objective, one in found:
        costs = [("log-loss" if objective.kind == "binary" else "error", one.log_loss, config.max_log_loss_rise)]
        costs += [("AUC", one.auc, config.max_auc_loss)] if objective.kind == "binary" else []
        for what, cost, limit in costs:
            if not cost.high <= limit:
                shown = "costs more" if cost.low > limit else f"{cost.users} users do not show that it costs no more"
                interval = f"{cost.estimate:+.5f} [{cost.low:+.5f}, {cost.high:+.5f}]"
                return "failed", f"{objective.name}: {what} worse by {interval}, limit {limit:g}: {shown}"
    bounds = [f"log-loss rises by at most {max(one.log_loss.high for _, one in found):.5f}"]
    bounds += [f"AUC falls by at most {one.auc.high:.5f}" for objective, one in found if objective.kind == "binary"]
    return "passed", ", ".join(bounds)


def taken_over(judged: Variant, release: str, parity: Mapping[str, float], same: bool) -> Variant:
    """A variant of a release that another's weights of few segments were taken out of, by that other's verdict.

    The rows that it was judged on are not asked again: base and recipe are the same, and a bank's rows are held one by
    one. So the verdict stands while the golden requests are answered as closely as rankers hold the judged one to.

    Args:
        judged: the other's variant, or what was taken over for it.
        release: id of the other.
        parity: what the new one's answers to golden requests are, see `variants.parity_of`.
        same: whether base and recipe are the same.
    """
    origin = str(judged.agreement.get("release", release))
    limit, apart = judged.parity.get("tolerance", 0.0), parity.get("largest")
    told = replace(judged, parity=parity, agreement={**judged.agreement, "release": origin})
    if judged.verdict == "passed":
        if not same:
            return replace(told, verdict="failed", why=f"release {origin[:12]} was judged with another base or recipe")
        if apart is None:
            return replace(told, verdict="failed", why=NOT_FINITE)
        if apart > limit:
            why = f"a golden request is answered {apart:.3g} off, limit {limit:.3g}, which release {origin[:12]} keeps"
            return replace(told, verdict="failed", why=why)
    if "release" in judged.agreement:
        return told
    return replace(
        told, why=f"as release {origin[:12]} was judged, but for segments that fell back since: {judged.why}"
    )


def save(found: Mapping[tuple[VariantName, str], Compared], path: Path) -> None:
    """Write comparisons by variant and objective: sums per user, and one line for the rest."""
    parts = []
    for (variant, objective), one in found.items():
        for what, sums in (("loss", one.loss), ("auc", one.auc)):
            parts.append(
                pa.table(
                    {
                        "variant": pa.array([variant] * len(sums.users), pa.string()),
                        "objective": pa.array([objective] * len(sums.users), pa.string()),
                        "what": pa.array([what] * len(sums.users), pa.string()),
                        "user": pa.array(sums.users.astype(str).tolist(), pa.string()),
                        "sum": pa.array(sums.sums[:, 0].astype(np.float64)),
                        "rows": pa.array(sums.rows.astype(np.int64)),
                    }
                )
            )
    pq.write_table(pa.concat_tables(parts), path, compression="zstd")


def load(path: Path, variant: str, objective: str, lists: float | None, largest: float) -> Compared:
    """Read back what `save` wrote of one variant and objective."""
    table = pq.read_table(path, filters=[("variant", "==", variant), ("objective", "==", objective)])
    what = table["what"].to_numpy(zero_copy_only=False)

    def sums(name: str) -> UserSums:
        mine = np.flatnonzero(what == name)
        users = table["user"].to_numpy(zero_copy_only=False).astype(str)[mine]
        return UserSums(users, table["sum"].to_numpy()[mine][:, None], table["rows"].to_numpy()[mine])

    return Compared(sums("loss"), sums("auc"), lists, largest)
