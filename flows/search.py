"""Settings tried on earlier nights and compared, and nothing published."""

from datetime import date
from pathlib import Path

from prefect import flow
from pydantic import ValidationError

from flows.config import RetrainConfig, read_tree
from flows.nightly import resolve
from tasks.errors import InvalidConfig
from tasks.learning.space import Sections, Space, candidate_kinds, default_space, read_space
from tasks.prepare import prepare_history
from tasks.search import SearchPlan, SearchRef, search_settings
from tasks.steps import hold


@flow(name="search", validate_parameters=True, persist_result=False)
def search(
    config: RetrainConfig | str,
    night: date,
    trials: int,
    minutes: float | None = None,
    space: str | None = None,
    block: int = 7,
    cuts: int = 2,
    seed: int = 0,
    storage: str | None = None,
) -> SearchRef:
    """Try settings on the nights before one, and compare the best with the config's own.

    It writes step records of the history, under the lease, and the file of trials; lake, releases, pointer and ledger
    stay as they are.

    Args:
        config: the pipeline's config, or the path of its file.
        night: only nights before this one are read; it need not be there.
        trials: how many in all, those of earlier runs included.
        minutes: no trial begins later than this after the start; none: all trials.
        space: path of a YAML file of what may be tried; none: `tasks.learning.space.default_space`.
        block: nights of a block.
        cuts: blocks that settings are chosen by; one more is held back.
        seed: of the sampler.
        storage: file that remembers the trials; none: `var/search/<pipeline>-<night>.journal`.

    Raises:
        InvalidConfig: the space has faults, an option is out of bounds, or Optuna is not installed.
        SearchRunning: another search uses the file of trials.
        NotEnoughHistory: too few nights before this one.
    """
    config = resolve(config)
    kept = storage or str(Path("var/search") / f"{config.pipeline}-{night}.journal")
    try:
        plan = SearchPlan(trials=trials, minutes=minutes, seed=seed, block=block, cuts=cuts, storage=kept)
    except ValidationError as error:
        faults = (f"--{fault['loc'][0]}: {fault['input']!r}: {fault['msg']}" for fault in error.errors())
        raise InvalidConfig("\n".join(faults)) from None
    tried = _space(config, space)
    place = config.place()
    with hold(place):
        history = prepare_history(place, config.data, config.segments, config.statistics, night)
    sections = (config.ranker, config.training, config.adapter, config.gate)
    return search_settings(place, config.data, config.segments, *sections, history, tried, plan)


def _space(config: RetrainConfig, path: str | None) -> Space:
    """What may be tried."""
    now = Sections(config.ranker, config.adapter, config.training, candidate_kinds(config.data))
    if path is None:
        return default_space(now)
    return read_space({str(name): told for name, told in read_tree(path, "space").items()}, now, f"space {path}")
