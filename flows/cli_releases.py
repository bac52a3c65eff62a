"""`nightrank releases ...`: what was published, and an operator's hand on it."""

import argparse
import json
import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.cli_triton import add_triton

if TYPE_CHECKING:
    from rich.console import Console

    from tasks.clients.object_store import ObjectStore
    from tasks.references import Place
    from tasks.release.manifest import Pointer

NAMES = "an id or its first digits, a night (YYYY-MM-DD), champion, previous or challenger"
GRACE = 24
_MOST = 1_000_000
"""Releases, or hours, that a number can say."""
_NAMED = 4
"""Releases that a message names one by one."""


def add_releases(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `releases` and all that is below it to a command line."""
    root = commands.add_parser(
        "releases",
        help="what was published: list, show, diff, verify, promote, rollback, challenger, fallback, gc, triton, ...",
        description="What was published, and an operator's hand on it. A release is named by " + NAMES + ".",
    )
    below = root.add_subparsers(required=True, metavar="ACTION")

    def action(name: str, does: Callable[..., None], told: str, config_only: bool = False) -> argparse.ArgumentParser:
        made = below.add_parser(name, help=told, description=f"{told[0].upper()}{told[1:]}.")
        made.add_argument("--config", required=config_only, help="config file")
        if not config_only:
            made.add_argument("--store", help="the store, where there is no config")
            made.add_argument("--pipeline", help="the pipeline, where there is no config")
        made.set_defaults(command=does)
        return made

    def machines(made: argparse.ArgumentParser) -> None:
        made.add_argument("--json", action="store_true", help="print JSON, for machines")

    def reason(made: argparse.ArgumentParser) -> None:
        made.add_argument("--reason", required=True, help="why; it is kept in the pointer and in the ledger")

    machines(action("list", _list, "list the releases of a pipeline"))
    show = action("show", _show, "show one release: where it is from, what it holds, what was measured")
    show.add_argument("release", nargs="?", default="champion", help=f"{NAMES} (default: champion)")
    machines(show)
    diff = action("diff", _diff, "compare two releases: what a ranker fetches, what its requests need, what changed")
    diff.add_argument("before", nargs="?", default="previous", help=f"{NAMES} (default: previous)")
    diff.add_argument("after", nargs="?", default="champion", help="as before (default: champion)")
    machines(diff)
    verify = action("verify", _verify, "try a release as a ranker does: signature, digests, golden requests")
    verify.add_argument("release", nargs="*", default=["champion"], help=f"{NAMES} (default: champion)")
    verify.add_argument("--all", action="store_true", help="every release")
    machines(verify)

    promote = action("promote", _promote, "make a release the champion, whatever the gate said")
    promote.add_argument("release", help=NAMES)
    reason(promote)
    back = action("rollback", _rollback, "make the champion before this one the champion again")
    back.add_argument("--to", metavar="RELEASE", help=f"another release: {NAMES}")
    back.add_argument("--hold", action="store_true", help="from now on no night promotes, until `releases unhold`")
    reason(back)
    reason(action("hold", _hold, "let no night promote until `releases unhold`; nights run and publish as ever"))
    reason(action("unhold", _unhold, "let nights promote again"))
    rival = action("challenger", _challenger, "let another release answer a share of the users")
    given = rival.add_mutually_exclusive_group(required=True)
    given.add_argument("release", nargs="?", help=NAMES)
    given.add_argument("--none", action="store_true", help="take the challenger away")
    rival.add_argument("--share", type=_share, help="of the users in percent, such as 5 or 0.25")
    reason(rival)
    down = action("fallback", _fallback, "serve a segment by its parent's weights, at once and on nights to come", True)
    down.add_argument("segment", nargs="+", type=_column, metavar="COLUMN=KEY", help="the segment, such as user_id=ann")
    instead = down.add_mutually_exclusive_group()
    instead.add_argument("--to", metavar="RELEASE", help="its own weights of a release of the same base; ends a hold")
    instead.add_argument("--undo", action="store_true", help="let it have weights of its own from the next night on")
    down.add_argument("--reason", default="", help="why; it is kept with the release, the pointer and the ledger")
    sign = action("sign", _sign, "sign releases and the pointer with this host's key, as after a new one took over")
    sign.add_argument("release", nargs="*", help=f"{NAMES} (default: every release, and the pointer)")
    sign.add_argument("--pointer", action="store_true", help="the pointer, too, where releases are named")
    sign.add_argument(
        "--unsigned", action="store_true",
        help="also what no trusted key vouches for; look at it before. Such a pointer must be what the ledger says",
    )  # fmt: skip
    gc = action("gc", _gc, "mark what nothing names any more, and remove what was marked long enough ago", True)
    gc.add_argument("--keep", type=_count, metavar="N", help="newest releases kept (default: 14)")
    gc.add_argument(
        "--grace", type=_count, default=GRACE, metavar="HOURS",
        help=f"hours between mark and removal, at least 1 (default: {GRACE})",
    )  # fmt: skip
    gc.add_argument("--dry-run", action="store_true", help="only say what would be done")
    add_triton(action, NAMES)


def store_and_pipeline(options: argparse.Namespace, command: str) -> tuple[str, str]:
    """Where the releases are, by `--config` or by `--store` and `--pipeline`, which need nothing else installed.

    Raises:
        InvalidConfig: neither says it.
    """
    from tasks.errors import InvalidConfig

    store, pipeline = options.store, options.pipeline
    if options.config:
        from flows.config import load_config

        config = load_config(options.config)
        store, pipeline = store or config.store, pipeline or config.pipeline
    if not store or not pipeline:
        raise InvalidConfig(f"{command} needs to know where the releases are: give --config, or --store and --pipeline")
    return store, pipeline


def opened(options: argparse.Namespace, command: str = "nightrank releases") -> "tuple[ObjectStore, str]":
    """The store and the pipeline that a command is about.

    Raises:
        InvalidConfig: nothing says which.
        ObjectMissing: the store is a directory that does not exist: a name that was mistyped, or no night ran yet.
    """
    from tasks.clients.object_store import open_store

    url, pipeline = store_and_pipeline(options, command)
    return _made(open_store(url)), pipeline


def _made(store: "ObjectStore") -> "ObjectStore":
    from tasks.errors import ObjectMissing

    if not store.is_made():
        raise ObjectMissing(
            f"store {store.url}: there is no such directory; look how it is spelt (--store, or the config's), or run a "
            f"first night (`nightrank run`), which makes it"
        )
    return store


def _named(options: argparse.Namespace, name: str) -> "tuple[ObjectStore, str, str]":
    from tasks.release.published import resolve

    store, pipeline = opened(options)
    return store, pipeline, resolve(store, pipeline, name)


def _place(options: argparse.Namespace) -> "Place":
    from tasks.references import Place

    if options.config:
        from flows.config import load_config

        place = load_config(options.config).place()
        given = {name: getattr(options, name) for name in ("store", "pipeline") if getattr(options, name, None)}
        return place.model_copy(update=given)
    store, pipeline = store_and_pipeline(options, "nightrank releases")
    return Place(store=store, pipeline=pipeline, scratch="var/scratch")


def _as_json(console: "Console", told: object) -> None:
    console.print(json.dumps(told, indent=1, sort_keys=True, default=str), markup=False, soft_wrap=True)


def _list(options: argparse.Namespace, console: "Console") -> None:
    from flows.display_releases import show_releases
    from tasks.release.published import no_releases
    from tasks.releases import releases

    where = opened(options)
    rows = releases(_place(options))
    if options.json:
        _as_json(console, [row.model_dump(mode="json") for row in rows])
    elif not rows:
        console.print(no_releases(*where), markup=False, soft_wrap=True)
    else:
        show_releases(console, rows)


def _show(options: argparse.Namespace, console: "Console") -> None:
    from flows.display_releases import show_release
    from tasks.release.about import about

    store, pipeline, release = _named(options, options.release)
    found = about(store, pipeline, release)
    if options.json:
        _as_json(console, found.as_json())
    else:
        show_release(console, found, store.url)


def _diff(options: argparse.Namespace, console: "Console") -> None:
    from flows.display_releases import show_difference
    from tasks.release.about import about, difference
    from tasks.release.published import resolve

    store, pipeline = opened(options)
    before, after = (about(store, pipeline, resolve(store, pipeline, one)) for one in (options.before, options.after))
    found = difference(before, after)
    if options.json:
        _as_json(console, found.as_json())
    else:
        show_difference(console, found)


def _verify(options: argparse.Namespace, console: "Console") -> None:
    from flows.display_releases import show_checks
    from tasks.errors import NoRelease, ReleaseRefused
    from tasks.release.published import folders, no_releases, resolve
    from tasks.verify import verify

    store, pipeline = opened(options)
    every = folders(store, pipeline).visible if options.all else ()
    if options.all and not every:
        raise NoRelease(no_releases(store, pipeline))
    asked = every or [resolve(store, pipeline, name) for name in options.release]
    found = {release: verify(store, pipeline, release) for release in dict.fromkeys(asked)}
    if options.json:
        _as_json(console, {release: [vars(check) for check in checks] for release, checks in found.items()})
    for release, checks in () if options.json else found.items():
        show_checks(console, release, checks)
    if bad := [release[:12] for release, checks in found.items() if not all(check.fine for check in checks)]:
        raise ReleaseRefused(
            f"{len(bad)} of {len(found)} releases would be refused by rankers, or were changed: {', '.join(bad)}; "
            f"the lines above say why"
        )


def _promote(options: argparse.Namespace, console: "Console") -> None:
    from tasks.release.moves import promote

    store, pipeline, release = _named(options, options.release)
    _show_pointer(console, promote(store, pipeline, release, options.reason))


def _rollback(options: argparse.Namespace, console: "Console") -> None:
    from tasks.release.moves import rollback
    from tasks.release.published import resolve

    store, pipeline = opened(options)
    to = None if options.to is None else resolve(store, pipeline, options.to)
    _show_pointer(console, rollback(store, pipeline, to, options.reason, options.hold))


def _hold(options: argparse.Namespace, console: "Console") -> None:
    from tasks.release.moves import hold

    _show_pointer(console, hold(*opened(options), options.reason))


def _unhold(options: argparse.Namespace, console: "Console") -> None:
    from tasks.release.moves import unhold

    _show_pointer(console, unhold(*opened(options), options.reason))


def _challenger(options: argparse.Namespace, console: "Console") -> None:
    from tasks.errors import InvalidConfig
    from tasks.release.moves import challenge
    from tasks.release.published import resolve

    store, pipeline = opened(options)
    if options.none:
        _show_pointer(console, challenge(store, pipeline, None, 0, options.reason))
        return
    if options.share is None:
        raise InvalidConfig("a challenger needs a share of the users; give --share in percent, such as --share 5")
    release = resolve(store, pipeline, options.release)
    _show_pointer(console, challenge(store, pipeline, release, options.share, options.reason))


def _fallback(options: argparse.Namespace, console: "Console") -> None:
    from flows.config import load_config
    from flows.display_releases import show_fallback, show_let_go
    from tasks.errors import InvalidConfig
    from tasks.fallback import fall_back, let_go
    from tasks.release.published import resolve
    from tasks.steps import store_of

    columns = [column for column, _ in options.segment]
    if twice := sorted({column for column in columns if columns.count(column) > 1}):
        raise InvalidConfig(f"{', '.join(twice)} is named twice; a fallback is of one segment: give one a command")
    config, named = load_config(options.config), dict(options.segment)
    place, levels = config.place(), config.segments.levels
    if options.undo:
        show_let_go(console, *let_go(place, config.data, levels, named))
        return
    to = None if options.to is None else resolve(store_of(place), place.pipeline, options.to)
    show_fallback(console, fall_back(place, config.data, levels, named, options.reason, to))


def _gc(options: argparse.Namespace, console: "Console") -> None:
    from datetime import UTC, datetime

    from flows.display_releases import show_collected
    from tasks.release.garbage import collect
    from tasks.standing import KEEP
    from tasks.steps import hold, store_of

    place = _place(options)
    given: dict[str, Any] = {
        "keep": options.keep or KEEP,
        "grace": timedelta(hours=options.grace),
        "now": datetime.now(UTC),
    }
    where = (_made(store_of(place)), place.pipeline, Path(place.scratch))
    if options.dry_run:
        show_collected(console, collect(*where, **given, held=lambda: None, dry_run=True), dry_run=True)
        return
    with hold(place) as lease:
        show_collected(console, collect(*where, **given, held=lease.held), dry_run=False)


def _sign(options: argparse.Namespace, console: "Console") -> None:
    from flows.display_releases import show_signed
    from tasks.errors import InvalidConfig, NoRelease, ReleaseRefused
    from tasks.release.published import folders, no_releases, resolve
    from tasks.release.resigning import sign_releases
    from tasks.release.signing import KEY_VARIABLE, KEYS_VARIABLE, Keyring, signer

    store, pipeline = opened(options)
    key, keyring = signer(), Keyring.from_environment()
    if key is None:
        raise InvalidConfig(f"there is no key to sign with; name it by {KEY_VARIABLE}, see `nightrank keys create`")
    if keyring is None and not options.unsigned:
        raise InvalidConfig(
            f"no keyring says what is good so far; name it by {KEYS_VARIABLE}, or say --unsigned where you have looked"
        )
    if not folders(store, pipeline).visible:
        raise NoRelease(no_releases(store, pipeline))
    named = [resolve(store, pipeline, name) for name in options.release] or None
    with_pointer = options.pointer or named is None
    done = sign_releases(*(store, pipeline, key, keyring, named), unsigned=options.unsigned, with_pointer=with_pointer)
    show_signed(console, done)
    if options.unsigned and done.pointer_refused:
        raise ReleaseRefused(done.pointer_refused)
    if done.refused:
        shown = " ".join(release[:12] for release in done.refused) if len(done.refused) <= _NAMED else "--all"
        raise ReleaseRefused(
            f"{len(done.refused)} releases{' and the pointer' if done.pointer_refused else ''} were left as they are: "
            f"no trusted key vouches for them; look at them (`nightrank releases verify {shown}`), then sign them with "
            f"--unsigned if they are good"
        )
    if done.pointer_refused:
        raise ReleaseRefused(f"the pointer was left as it is: {done.pointer_refused}")


def _show_pointer(console: "Console", pointer: "Pointer") -> None:
    from flows.display_releases import show_pointer

    show_pointer(console, pointer)


def _column(text: str) -> tuple[str, str]:
    column, equals, key = text.partition("=")
    if not (column and equals and key):
        raise argparse.ArgumentTypeError(f"{text!r} names no segment; give COLUMN=KEY, such as user_id=ann")
    return column, key


def _share(text: str) -> int:
    """Percent with two digits, as basis points.

    >>> _share("0.25"), _share("100")
    (25, 10000)
    """
    from fractions import Fraction

    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{0,9})?|\.[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"{text!r:.80} is no share; give percent in digits, such as 5 or 0.25")
    points = Fraction(text) * 100
    if not 1 <= points <= 10_000 or points.denominator != 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share; give percent from 0.01 to 100, by hundredths")
    return int(points)


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > len(str(_MOST)) or not 1 <= int(text) <= _MOST:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no count; give a whole number from 1 to {_MOST:,}")
    return int(text)
