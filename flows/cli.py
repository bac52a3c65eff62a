"""`nightrank ...`: the flows by hand, and an operator's questions. What has a deployment prints its Prefect command."""

import argparse
import json
import os
import shlex
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from flows.cli_doctor import add_doctor
from flows.cli_keys import add_keys
from flows.cli_releases import add_releases, store_and_pipeline

if TYPE_CHECKING:
    from rich.console import Console

DEMO = Path("var/movielens")

# The embedded default: no server runs, so nobody reads its logs. Set by hand, the environment's own values win.
EMBEDDED = {
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",  # its own 20 s are too few on a busy host
    # Writing each task run's event as it comes, the server is still at it when the run ends, and loses the last ones.
    # Written together, the rest is written after it was told to stop.
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "500",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "60",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "DO_NOT_TRACK": "1",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script.

    Args:
        arguments: the words after `nightrank`; none: the process's own.
    """
    options = parser().parse_args(arguments)
    for name, value in EMBEDDED.items():
        os.environ.setdefault(name, value)
    from rich.console import Console

    from flows.display import errors_to

    with errors_to(Console(stderr=True, highlight=False)):
        options.command(options, Console(highlight=False))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = argparse.ArgumentParser(prog="nightrank", description="Retrain, prove and publish rankers, night by night.")
    commands = root.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo-data", help="build a lake of MovieLens 100k nights")
    demo.add_argument("--target", type=Path, default=DEMO, help=f"folder of the lake (default: {DEMO})")
    demo.set_defaults(command=_demo_data)

    run = commands.add_parser("run", help="run one night")
    run.add_argument("--config", required=True, help="config file, such as infra/movielens.yaml")
    run.add_argument("--night", type=_night, help="the night, YYYY-MM-DD (default: today less night_lag_days)")
    run.add_argument("--override", metavar="REASON", help="release although the gate holds; the reason is recorded")
    run.set_defaults(command=_run)

    back = commands.add_parser("backfill", help="run the nights of a range in order, skipping finished ones")
    back.add_argument("--config", required=True, help="config file")
    back.add_argument("--start", type=_night, required=True, help="first night, YYYY-MM-DD")
    back.add_argument("--end", type=_night, required=True, help="last night, included")
    back.add_argument("--promote", action="store_true", help="move the pointer when a night's gate agrees")
    back.add_argument("--dry-run", action="store_true", help="print the plan and change nothing")
    back.set_defaults(command=_backfill)

    again = commands.add_parser(
        "replay",
        help="examine the nights of a range without publishing, and compare every method over them",
        description="Examines the nights of a range in order without publishing, and compares every method over them: "
        "per night and pooled, by support and by what is new. Each night starts from what the replay made of the one "
        "before; the gate plays no part. Examined nights are remembered: run it again to resume.",
    )
    again.add_argument("--config", required=True, help="config file")
    again.add_argument("--start", type=_night, required=True, help="first night, YYYY-MM-DD")
    again.add_argument("--end", type=_night, required=True, help="last night, included")
    again.add_argument("--min-rows", type=int, default=0, metavar="N", help="leave out nights with fewer rows")
    again.add_argument("--warm", action="store_true", help="start from the newest release before the first night")
    again.add_argument("--joint", action="store_true", help="compare with joint training as well: trains twice a night")
    again.add_argument("--per-night", action="store_true", help="print every method of each night, not a line a night")
    again.add_argument("--out", metavar="FOLDER", help="where table and page go (default: below var/replay)")
    again.add_argument("--seed", type=_seed, default=0, help="of the bootstrap (default: 0)")
    again.set_defaults(command=_replay)

    tune = commands.add_parser(
        "search",
        help="try settings of training, ranker and adapter on earlier nights, and print the best",
        description="Tries settings on nights before the given one only, and compares the best with the config's own "
        "on a last block of nights that none was chosen by. Publishes nothing. Trials are remembered: run it again to "
        "resume, or with more trials to go on.",
    )
    tune.add_argument("--config", required=True, help="config file")
    tune.add_argument("--night", type=_night, required=True, help="only nights before this one are read, YYYY-MM-DD")
    tune.add_argument("--trials", type=int, required=True, metavar="N", help="trials in all, resumed ones included")
    tune.add_argument("--minutes", type=float, metavar="M", help="begin no trial later than this")
    tune.add_argument("--space", metavar="FILE", help="YAML file of what may be tried (default: see the README)")
    tune.add_argument("--block", type=int, default=7, metavar="NIGHTS", help="nights of a block (default: 7)")
    tune.add_argument(
        "--cuts", type=int, default=2, metavar="N", help="blocks that settings are chosen by (default: 2)"
    )
    tune.add_argument("--seed", type=_seed, default=0, help="of the sampler (default: 0)")
    tune.add_argument("--storage", metavar="FILE", help="where trials are remembered (default: below var/search)")
    tune.set_defaults(command=_search)

    add_releases(commands)
    add_keys(commands)
    add_doctor(commands)

    rank = commands.add_parser("rank", help="rank a request's candidates with the champion")
    rank.add_argument("--request", type=Path, required=True, help="JSON file: input name to values")
    rank.add_argument("--config", help="config file that names store and pipeline")
    rank.add_argument("--store", help="the store, where there is no config")
    rank.add_argument("--pipeline", help="the pipeline, where there is no config")
    rank.set_defaults(command=_rank)
    return root


def _night(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no date; give YYYY-MM-DD") from error


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no seed; give a whole number from 0 on")
    return int(text)


def prefect_command(deployment: str, parameters: dict[str, object]) -> str:
    """The Prefect command that does the same by deployment.

    >>> print(prefect_command("nightly-retrain/nightly", {"night": "1998-04-22"}))
    prefect deployment run nightly-retrain/nightly --param 'night="1998-04-22"'
    """
    words = ["prefect", "deployment", "run", deployment]
    for name, value in parameters.items():
        words += ["--param", f"{name}={json.dumps(value, default=str)}"]
    return shlex.join(words)


def _demo_data(options: argparse.Namespace, console: "Console") -> None:
    from flows.display import Screen
    from tasks.data.movielens import build_lake, default_cache, write_request

    cache = default_cache()
    with Screen(console) as screen:
        screen.started("demo-data", f"downloads MovieLens 100k once, into {cache}")
        summary = build_lake(
            options.target, cache, lambda done, total: screen.progressed("demo-data", done, total, "nights")
        )
    request = options.target / "request.json"
    write_request(summary, request)
    state = "already there" if summary.reused else "built"
    console.print(
        f"{state}: {len(summary.nights)} nights, {summary.nights[0]} to {summary.nights[-1]}, "
        f"{summary.rows:,} interactions in {summary.source}; a ranking request to try is {request}"
    )


def _run(options: argparse.Namespace, console: "Console") -> None:
    from flows.config import load_config
    from flows.display import Screen, show_night
    from flows.embedded import embedded
    from flows.nightly import nightly_retrain
    from tasks.steps import watched_by

    config = load_config(options.config)
    given = {"night": options.night} if options.night else {}
    if options.override:
        given["override"] = options.override
    _say_equal(console, "nightly-retrain/nightly", {"config": options.config, **given})
    with embedded(), Screen(console) as screen, watched_by(screen):
        result = nightly_retrain(config, options.night, override=options.override)
    show_night(console, result)


def _backfill(options: argparse.Namespace, console: "Console") -> None:
    from flows.backfill import backfill, told_to
    from flows.config import load_config
    from flows.display import BackfillScreen, Screen, show_backfill
    from flows.embedded import embedded
    from tasks.steps import watched_by

    config = load_config(options.config)
    parameters = {"start": options.start, "end": options.end, "promote": options.promote, "dry_run": options.dry_run}
    _say_equal(console, "backfill/backfill", {"config": options.config, **parameters})
    nights = BackfillScreen(console)
    try:
        with embedded(), Screen(console) as screen, watched_by(screen), told_to(nights):
            backfill(config, **parameters)
    finally:
        if nights.outcomes:
            show_backfill(console, nights.outcomes)


def _replay(options: argparse.Namespace, console: "Console") -> None:
    from flows.config import load_config
    from flows.display import ReplayScreen, Screen, show_replay
    from flows.embedded import embedded
    from flows.replay import replay, replay_told_to
    from tasks.release import cost, earned, lift, variety
    from tasks.release.slices import load
    from tasks.steps import watched_by

    config = load_config(options.config)
    given = {name: getattr(options, name) for name in ("start", "end", "min_rows", "warm", "out", "seed", "joint")}
    with embedded(), Screen(console) as screen, watched_by(screen), replay_told_to(ReplayScreen(console)):
        result = replay(config, **given)
    written = result.written
    unnamed = lift.unnamed_levels(config.data, config.segments.levels)
    steps, gained = earned.load(Path(written.earned)), lift.summaries(lift.load(Path(written.lift)), unnamed)
    paid, shown = cost.load(Path(written.cost)), variety.load(Path(written.variety))
    paths = (written.table, written.earned, written.lift, written.cost, written.variety, written.page)
    show_replay(console, load(Path(written.table)), steps, gained, paid, shown, paths, options.per_night)


def _search(options: argparse.Namespace, console: "Console") -> None:
    from flows.config import load_config
    from flows.display import Screen, show_search
    from flows.embedded import embedded
    from flows.search import search
    from tasks.steps import watched_by

    config = load_config(options.config)
    names = ("night", "trials", "minutes", "space", "block", "cuts", "seed", "storage")
    with embedded(), Screen(console) as screen, watched_by(screen):
        found = search(config, **{name: getattr(options, name) for name in names})
    show_search(console, found)


def _rank(options: argparse.Namespace, console: "Console") -> None:
    from flows.display import show_ranked
    from tasks.errors import RequestRejected
    from tasks.serving.ranker import Ranker

    store, pipeline = store_and_pipeline(options, "rank")
    try:
        request = json.loads(options.request.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestRejected(f"request {options.request} cannot be read as JSON: {error}") from error
    with Ranker(store, pipeline) as ranker:
        show_ranked(console, ranker.release, ranker.night, ranker.rank(request))


def _say_equal(console: "Console", deployment: str, parameters: dict[str, object]) -> None:
    console.print(f"[dim]the same by deployment: {prefect_command(deployment, parameters)}[/dim]", soft_wrap=True)


if __name__ == "__main__":
    main()
