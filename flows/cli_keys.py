"""`nightrank keys ...`: the keys that sign releases, made and replaced by hand."""

import argparse
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def add_keys(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser."""
    keys = commands.add_parser("keys", help="make, list, rotate and revoke the keys that sign releases")
    actions = keys.add_subparsers(required=True, metavar="ACTION")
    ring = argparse.ArgumentParser(add_help=False)
    ring.add_argument("--keys", type=Path, help="the keyring file (default: what NIGHTRANK_TRUSTED_KEYS names)")
    private = argparse.ArgumentParser(add_help=False)
    private.add_argument("--key", type=Path, required=True, help="file to be made for the private key")
    private.add_argument("--comment", default="", help="a word on the key, for people")

    create = actions.add_parser("create", parents=[ring, private], help="make a key, and the keyring if there is none")
    create.set_defaults(command=_create)
    listed = actions.add_parser("list", parents=[ring], help="the keys of a keyring and their states")
    listed.set_defaults(command=_list)
    rotate = actions.add_parser(
        "rotate", parents=[ring, private], help="a new key in place of those that sign; what they signed stays good"
    )
    rotate.set_defaults(command=_rotate)
    revoke = actions.add_parser("revoke", parents=[ring], help="refuse whatever a key has signed")
    revoke.add_argument("key_id", help="the key's id, as `nightrank keys list` shows it")
    revoke.set_defaults(command=_revoke)


def _create(options: argparse.Namespace, console: "Console") -> None:
    from tasks.release.key_files import create_key

    made = create_key(_ring(options), options.key, options.comment)
    _say_made(console, options, made.key_id)


def _rotate(options: argparse.Namespace, console: "Console") -> None:
    from tasks.release.key_files import rotate_key

    made = rotate_key(_ring(options), options.key, options.comment)
    _say_made(console, options, made.key_id)
    console.print(
        "first hand the keyring to every ranker, for one without it refuses what the new key signs; then sign what is "
        "there with the new key: nightrank releases sign",
        soft_wrap=True,
    )


def _list(options: argparse.Namespace, console: "Console") -> None:
    from tasks.release.signing import Keyring

    for key in Keyring.load(_ring(options)).keys:
        console.print(f"{key.key_id}  {key.state:<11}  {key.created}  {key.comment}".rstrip(), markup=False)


def _revoke(options: argparse.Namespace, console: "Console") -> None:
    from tasks.release.key_files import revoke_key
    from tasks.release.signing import Keyring

    revoked = revoke_key(_ring(options), options.key_id)
    console.print(f"revoked {revoked.key_id}: rankers refuse what it signed once they have this keyring")
    if not any(key.state == "active" for key in Keyring.load(_ring(options)).keys):
        console.print("no key signs now: nightrank keys rotate makes one")


def _ring(options: argparse.Namespace) -> Path:
    from tasks.errors import InvalidConfig
    from tasks.release.signing import KEYS_VARIABLE

    named = options.keys or os.environ.get(KEYS_VARIABLE)
    if not named:
        raise InvalidConfig(f"which keyring? give --keys, or name it by {KEYS_VARIABLE}")
    return Path(named)


def _say_made(console: "Console", options: argparse.Namespace, key_id: str) -> None:
    from tasks.release.signing import KEY_VARIABLE, KEYS_VARIABLE

    console.print(f"key     {key_id}: {options.key} signs; keep it on the host that publishes", soft_wrap=True)
    console.print(f"keyring {_ring(options)}: no secret, for publisher and rankers", soft_wrap=True)
    # Absolute: a nightly run starts in another directory.
    key, ring = (shlex.quote(str(path.absolute())) for path in (options.key, _ring(options)))
    console.print(f"export {KEY_VARIABLE}={key} {KEYS_VARIABLE}={ring}", soft_wrap=True, markup=False)
