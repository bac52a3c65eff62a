"""Verify: whether rankers would take a release, tried as they do it, and whether what lies beside it is untouched."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tasks.clients.object_store import ObjectStore
from tasks.errors import NightrankError
from tasks.release.manifest import Manifest
from tasks.release.published import beside_of, check_whole, stored_manifest
from tasks.release.publishing import read_manifest
from tasks.release.signing import UNSIGNED, Keyring
from tasks.serving.cache import ReleaseCache
from tasks.serving.loaded import load
from tasks.serving.variants import MADE_FOR, PLAIN, VariantChoice, everything


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: `manifest`, `signature`, `files`, `beside`, `answers`, or a variant's.
        fine: whether it is as it has to be.
        told: what was found, in one line.
    """

    name: str
    fine: bool
    told: str


def verify(store: ObjectStore, pipeline: str, release: str) -> tuple[Check, ...]:
    """Look at everything about a release; what fails is told, and what does not depend on it is still looked at.

    Args:
        store: where.
        pipeline: the pipeline.
        release: its id.

    Returns:
        The checks in their order: the manifest is well formed and names what is there; a trusted key has signed it,
        where keys are named; every file has its digest; so has what lies beside; and its graphs load on this host's CPU
        and answer the golden requests, as does each variant that passed and is made for the CPU.
    """
    done: list[Check] = []

    def look(name: str, at: Callable[[], str]) -> bool:
        try:
            done.append(Check(name, True, at()))
        except NightrankError as error:
            done.append(Check(name, False, f"{type(error).__name__}: {error}"))
        return done[-1].fine

    def well_formed() -> str:
        manifest = stored_manifest(store, pipeline, release)
        check_whole(store, manifest)
        return f"schema version {manifest.schema_version}, night {manifest.night}, {len(manifest.files)} files"

    def signed() -> str:
        if Keyring.from_environment() is None:
            return UNSIGNED
        read_manifest(store, pipeline, release)
        return "signed by a trusted key"

    readable = look("manifest", well_formed)
    look("signature", signed)
    if not readable:
        return tuple(done)
    manifest = stored_manifest(store, pipeline, release)
    look("beside", lambda: _beside(store, manifest))
    with tempfile.TemporaryDirectory(prefix="nightrank-verify-") as folder:
        cache = ReleaseCache(Path(folder))

        def fetched() -> str:
            with cache.opened(store, pipeline, manifest) as lay_out:
                lay_out(everything(manifest))
                return f"{manifest.size:,} bytes have their digests"

        def answers(variant: VariantChoice = PLAIN) -> str:
            with cache.opened(store, pipeline, manifest) as lay_out:
                load(lay_out, manifest, "cpu", variant=variant)
            return f"the graphs of {variant} load here and answer the golden requests"

        if look("files", fetched):
            look("answers", answers)
            own = MADE_FOR["cpu"]
            if own in manifest.variants and manifest.variants[own].verdict == "passed":
                look(own, lambda: answers(own))
    return tuple(done)


def _beside(store: ObjectStore, manifest: Manifest) -> str:
    for file in manifest.beside:
        beside_of(store, manifest, file.name)
    named = ", ".join(file.name for file in manifest.beside)
    return f"{named} have their digests" if named else "the manifest is of a version that names nothing beside it"
