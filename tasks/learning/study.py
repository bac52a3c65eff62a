"""A search by Optuna: which settings to try next, which to give up early, and the memory that lets it go on.

The sampler is the tree-structured Parzen estimator (Bergstra et al., 2011), the pruner the median rule (Golovin et al.,
2017): a trial ends early where what it has shown so far is worse than the median of the others at the same point. The
memory is Optuna's journal, a file with a line of JSON for each step.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tasks.errors import InvalidConfig, ObjectCorrupt, StoreUnwritable, TrainingDiverged
from tasks.learning.space import Settings, Space, Value

if TYPE_CHECKING:
    from optuna import Study, Trial

DEFAULT = "default"
"""Attribute of the study that keeps what the config's own settings reach."""
DIGITS = 4
"""Significant digits of a number that is tried, so that it can be written into a config."""
STARTUP = 8
"""Trials at random before the sampler believes what it has seen, and before anything is given up early."""

Told = Callable[[int, float], None]
"""Called as ``told(part, loss so far)``; raises where the trial is not worth going on."""
Score = Callable[[Settings, Told], float]
"""Settings to their loss."""


@dataclass(frozen=True)
class Tried:
    """A finished trial."""

    settings: Settings
    state: Literal["complete", "pruned"]
    loss: float | None
    """None where it was given up."""
    why: str = ""
    """Why it was given up, if its settings cannot be trained."""


class Search:
    """A study that is remembered in a file.

    Args:
        path: the file; it is made. Several studies may stand in it.
        name: of the study: a digest of all that a loss depends on, so that no trial of another search is taken over.
        space: what may be tried.
        seed: of the sampler.

    Raises:
        InvalidConfig: Optuna is not installed.
        ObjectCorrupt: the file is none of Optuna's journals.
        StoreUnwritable: the file cannot be written.
    """

    def __init__(self, path: Path, name: str, space: Space, seed: int) -> None:
        optuna = library()
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space, self.seed = space, seed
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _mend(path)
            storage = JournalStorage(JournalFileBackend(str(path)))
            pruner = optuna.pruners.MedianPruner(n_startup_trials=STARTUP)
            self._study: Study = optuna.create_study(
                storage=storage, study_name=name, direction="minimize", pruner=pruner, load_if_exists=True
            )
        except OSError as error:
            raise StoreUnwritable(f"cannot write {path}: {error.strerror}; give another --storage") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ObjectCorrupt(f"{path} is no journal of a search: {error}; give another --storage") from error
        # A run that was killed left its trial open; it would count as tried, and lead the sampler elsewhere.
        for trial in self._study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            self._study.tell(trial.number, state=optuna.trial.TrialState.FAIL)

    @property
    def tried(self) -> list[Tried]:
        """Finished trials in their order."""
        from optuna.trial import TrialState

        trials = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        return [
            Tried(
                self._settings(trial.params),
                "complete" if trial.state is TrialState.COMPLETE else "pruned",
                trial.value if trial.state is TrialState.COMPLETE else None,
                trial.user_attrs.get("why", ""),
            )
            for trial in trials
        ]

    def default(self, score: Callable[[], float]) -> float:
        """The loss of the config's own settings, scored once."""
        found = self._study.user_attrs.get(DEFAULT)
        if found is None:
            found = score()
            self._study.set_user_attr(DEFAULT, found)
        return float(found)

    def run(self, score: Score, trials: int, go_on: Callable[[], bool], report: Callable[[int], None]) -> None:
        """Try settings until so many trials are finished, those of earlier runs included.

        Args:
            score: settings to their loss; it may raise `TrainingDiverged` or `InvalidConfig`, which ends the trial.
            trials: how many in all.
            go_on: asked before each trial.
            report: told how many are finished.
        """
        import optuna

        done = len(self.tried)
        report(done)
        while done < trials and go_on():
            # One sampler per trial: a run that goes on draws what the one before would have drawn.
            drawn = int(np.random.SeedSequence([self.seed, done]).generate_state(1)[0])
            self._study.sampler = optuna.samplers.TPESampler(seed=drawn, n_startup_trials=STARTUP)
            trial = self._study.ask()
            try:
                loss = score(self._settings(self._suggested(trial)), _teller(trial))
                if not math.isfinite(loss):
                    raise TrainingDiverged(f"the loss is {loss}")
                self._study.tell(trial, loss)
            except optuna.TrialPruned:
                self._study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            except (TrainingDiverged, InvalidConfig) as error:
                trial.set_user_attr("why", str(error))
                self._study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            done += 1
            report(done)

    def _suggested(self, trial: "Trial") -> dict[str, Any]:
        for name, one in self.space.items():
            if one.type == "choice":
                trial.suggest_categorical(name, one.choices)
            elif one.type == "int":
                trial.suggest_int(name, int(one.low or 0), int(one.high or 0), log=one.log)
            else:
                trial.suggest_float(name, float(one.low or 0), float(one.high or 0), log=one.log)
        return dict(trial.params)

    def _settings(self, drawn: Mapping[str, Value]) -> Settings:
        return {name: _short(drawn[name], one.low, one.high) for name, one in self.space.items() if name in drawn}


def library() -> Any:
    """Optuna.

    Raises:
        InvalidConfig: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise InvalidConfig(
            f"a search needs Optuna, which cannot be loaded ({error}); install it with pip install 'nightrank[search]'"
        ) from error
    return optuna


def _teller(trial: "Trial") -> Told:
    def told(part: int, loss: float) -> None:
        import optuna

        trial.report(loss, part)
        if trial.should_prune():
            raise optuna.TrialPruned

    return told


def _short(value: Value, low: float | None, high: float | None) -> Value:
    """A number with few digits, within its bounds.

    >>> _short(0.000123456, 1e-4, 1e-2), _short(7, 1, 9), _short("mlp", None, None)
    (0.0001235, 7, 'mlp')
    """
    if not isinstance(value, float) or low is None or high is None:
        return value
    return min(max(float(f"{value:.{DIGITS}g}"), low), high)


def _mend(path: Path) -> None:
    """Cut off a last line that a killed run has not finished: the next one would be written behind it."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if data[:whole]:
        json.loads(data[: data.find(b"\n")])  # of some other file nothing is cut
    elif data:
        raise ValueError("its first line does not end")
    if whole < len(data):
        os.truncate(path, whole)
