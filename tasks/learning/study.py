"""A search by Optuna: which settings to try next, which to give up early, and the memory that lets it go on.

The sampler is the tree-structured Parzen estimator (Bergstra et al., 2011), the pruner the median rule (Golovin et al.,
2017): a trial ends early where what it has shown so far is worse than the median of the others at the same point. The
memory is Optuna's journal, a file with a line of JSON for each step. One process at a time has it.
"""

import fcntl
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from tasks.errors import InvalidConfig, ObjectCorrupt, SearchRunning, StoreUnwritable, TrainingDiverged
from tasks.learning.space import Sections, Settings, Space, Value, in_order

if TYPE_CHECKING:
    from optuna import Study, Trial

DEFAULT = "default"
"""Attribute of the study that keeps what the config's own settings reach."""
WHY = "why"
"""Attribute of a trial that keeps why it was given up; empty where that says nothing of its settings."""
NO_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""How torch says that memory is short where it has no class of error for it."""
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
    """Why it was given up, if its settings cannot be trained, or if its process was killed."""


@contextmanager
def remembered(path: Path, name: str, space: Space, seed: int, now: Sections) -> Iterator["Search"]:
    """A study that is remembered in a file, which no other process may use as long as the block lasts.

    Args:
        path: the file; it is made. Several studies may stand in it.
        name: of the study: a digest of all that a loss depends on, so that no trial of another search is taken over.
        space: what may be tried.
        seed: of the sampler.
        now: the config's own sections, which hold where a trial draws nothing else.

    Raises:
        InvalidConfig: Optuna is not installed.
        SearchRunning: another search uses the file.
        ObjectCorrupt: the file is none of Optuna's journals.
        StoreUnwritable: the file cannot be written.
    """
    library()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError as error:
        raise _unwritable(path, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel gives it back, however this process ends
        except BlockingIOError as error:
            raise SearchRunning(
                f"another search is using {path}; wait for its end (`lslocks` names its process), or give another "
                "--storage"
            ) from error
        except OSError as error:
            raise _unwritable(path, error) from error
        yield Search(path, name, space, seed, now)


class Search:
    """A study in a file that is ours; see `remembered`."""

    def __init__(self, path: Path, name: str, space: Space, seed: int, now: Sections) -> None:
        optuna = library()
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space, self.seed, self.now = space, seed, now
        try:
            _mend(path)
            storage = JournalStorage(JournalFileBackend(str(path)))
            pruner = optuna.pruners.MedianPruner(n_startup_trials=STARTUP)
            self._study: Study = optuna.create_study(
                storage=storage, study_name=name, direction="minimize", pruner=pruner, load_if_exists=True
            )
        except OSError as error:
            raise _unwritable(path, error) from error
        except (ValueError, KeyError, TypeError) as error:
            raise ObjectCorrupt(f"{path} is no journal of a search: {error}; give another --storage") from error
        # A run that was killed left its trial open. If it was being scored, its settings may be what killed the run.
        for trial in self._study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            given_up = bool(trial.user_attrs.get(WHY))
            state = optuna.trial.TrialState.PRUNED if given_up else optuna.trial.TrialState.FAIL
            self._study.tell(trial.number, state=state)

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
                trial.user_attrs.get(WHY, ""),
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

        A trial that ran out of memory, or whose process was killed, is finished too: it is not drawn again. One that
        ended by any other exception (Ctrl-C) is, by the next run.

        Args:
            score: settings to their loss; `TrainingDiverged`, `InvalidConfig` or too little memory ends the trial.
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
            settings = self._settings(self._suggested(trial))
            with_these = ", ".join(f"{name} {value}" for name, value in settings.items())
            trial.set_user_attr(WHY, f"the process was killed, perhaps for want of memory, with {with_these}")
            try:
                loss, why = _scored(score, settings, trial, with_these)
            except BaseException:
                self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
                raise
            trial.set_user_attr(WHY, why)
            if loss is None:
                self._study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            else:
                self._study.tell(trial, loss)
            done += 1
            report(done)

    def _suggested(self, trial: "Trial") -> dict[str, Any]:
        for name in in_order(self.space):
            one = self.space[name]
            if not self.now.applies(name, self._settings(trial.params)):
                continue
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


def _scored(score: Score, settings: Settings, trial: "Trial", with_these: str) -> tuple[float | None, str]:
    """The loss of a trial; None if it was given up, and why if that is its settings' fault."""
    import optuna

    try:
        loss = score(settings, _teller(trial))
    except optuna.TrialPruned:
        return None, ""
    except (TrainingDiverged, InvalidConfig) as error:
        return None, str(error)
    except (MemoryError, RuntimeError) as error:
        told = str(error)
        short = isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in told for sign in NO_MEMORY)
        if not short:
            raise
        return None, f"out of memory with {with_these}: {(told.splitlines() or [type(error).__name__])[0]}"
    return (loss, "") if math.isfinite(loss) else (None, f"the loss is {loss}")


def _unwritable(path: Path, error: OSError) -> StoreUnwritable:
    return StoreUnwritable(f"cannot write {path}: {error.strerror}; give another --storage")


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
