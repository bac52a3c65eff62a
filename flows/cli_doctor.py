"""`nightrank doctor`: config, lake, store, keys, pointer, leftovers and device, before a night needs them."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def add_doctor(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `doctor` to a command line."""
    doctor = commands.add_parser("doctor", help="check config, lake, store and device before a night needs them")
    doctor.add_argument("--config", required=True, help="config file")
    doctor.set_defaults(command=_doctor)


def _doctor(options: argparse.Namespace, console: "Console") -> None:
    from rich.markup import escape

    from flows.config import load_config
    from tasks.data.lakes import nights_by_lake
    from tasks.ingest import lake
    from tasks.standing import standing
    from tasks.steps import device_of, store_of
    from tasks.tensorboard import check

    config = load_config(options.config)
    console.print(f"config  {options.config}: fits, pipeline {config.pipeline}")
    nights = nights_by_lake(config.data, lake(config.data))
    for one in config.data.every_lake:
        found, called = nights[one.name], f"{one.name}, " if config.data.lakes else ""
        span = f"{len(found)} nights, {min(found)} to {max(found)}" if found else "no nights yet"
        console.print(f"lake    {called}{one.source}: {span}")
    store_of(config.place()).check()
    console.print(f"store   {config.store}: writable, honours conditions")
    for name, told in standing(config.place()):
        console.print(f"{name:<7} {escape(told)}", soft_wrap=True)
    console.print(f"device  {device_of(config.place())}")
    if config.training.tensorboard is not None:
        check(config.training)
        console.print(f"curves  {config.training.tensorboard}: writable for TensorBoard", soft_wrap=True)
