"""Where a ranker's releases come from: pointer, manifest and files, each read without trust."""

from collections.abc import Callable, Collection
from datetime import date
from pathlib import Path
from typing import Literal

from tasks.clients.object_store import ObjectStore
from tasks.errors import NoRelease, ReleaseRefused
from tasks.release.manifest import Manifest, Pointer
from tasks.release.signing import (
    Keyring,
    TrustedKey,
    check_pointer,
    find_manifest,
    find_pointer,
    vouching_key,
)
from tasks.serving.cache import ReleaseCache
from tasks.serving.loaded import LoadedRelease, load
from tasks.serving.sessions import Device, Engine
from tasks.serving.variants import VariantChoice, choose, selected


class ReleaseSource:
    """One pipeline's store as a ranker reads it, through its cache."""

    def __init__(
        self,
        store: ObjectStore,
        pipeline: str,
        cache: ReleaseCache,
        device: Device,
        engine: Engine | None,
        variant: VariantChoice,
        keys: Path | None = None,
    ) -> None:
        self._store, self.pipeline, self._cache, self._keys = store, pipeline, cache, keys
        self._loaded: dict[str, tuple[bytes, TrustedKey | None]] = {}
        """Manifests of what was loaded, and who vouched for them then."""
        self._device: Device = device
        self._runs_on: Literal["cpu", "cuda"] = "cpu" if device == "auto" else device
        """Where the release runs that was loaded last."""
        self._engine = engine
        self._variant: VariantChoice = variant

    def keyring(self) -> Keyring | None:
        """The keys that may sign, read anew; None where none are named.

        Raises:
            InvalidConfig: the keyring cannot be used.
        """
        return Keyring.from_environment() if self._keys is None else Keyring.load(self._keys)

    def pointer(self) -> Pointer:
        """The pointer as it stands.

        Raises:
            NoRelease: nothing was promoted yet.
            ReleaseRefused: it is damaged, or not signed by a trusted key where keys are named.
            InvalidConfig: the keyring cannot be used.
            StoreError: the store cannot be read.
        """
        keyring, stored = self.keyring(), find_pointer(self._store, self.pipeline)
        if stored is None:
            raise NoRelease(
                f"{self._store.url} has no champion for pipeline {self.pipeline!r}; run a night, or promote a release"
            )
        return check_pointer(keyring, self.pipeline, stored.data)

    def manifest(self, release: str) -> Manifest:
        """A release's manifest.

        Raises:
            ReleaseRefused: there is none, it is odd, or not signed by a trusted key where keys are named.
            InvalidConfig: the keyring cannot be used.
        """
        return self._checked(release)[0]

    def vouched(self, serve: Collection[str]) -> bool:
        """Whether keys that are trusted now have signed all that serves; False where no keys are named.

        The store is asked only where the key that vouched for a release is trusted no more.

        Args:
            serve: ids of releases that were loaded; others are forgotten.

        Raises:
            InvalidConfig: the keyring cannot be used.
            StoreError: the store cannot be read.
        """
        self._loaded = {release: self._loaded[release] for release in serve}
        keyring = self.keyring()
        return keyring is not None and all(self._vouched(keyring, release) for release in serve)

    def _vouched(self, keyring: Keyring, release: str) -> bool:
        data, key = self._loaded[release]
        known = None if key is None else keyring.find(key.key_id)
        if known is None or known.state == "revoked":
            try:
                known = vouching_key(self._store, keyring, self.pipeline, release, data)
            except ReleaseRefused:
                return False
            self._loaded[release] = (data, known)
        return True

    def load(
        self,
        release: str,
        keep: Collection[str],
        night: date | None = None,
        between: Callable[[], object] | None = None,
    ) -> LoadedRelease:
        """Fetch, verify and load a release, and ask it its golden requests.

        Args:
            release: its id.
            keep: ids of releases that stay in the cache.
            night: what the pointer says of its night; None where it says nothing.
            between: called while files arrive; what it raises gives that up, and passes as it is.

        Raises:
            ReleaseRefused: anything about it is odd.
            DeviceUnavailable: a GPU was asked for and none works.
        """
        manifest, data, key = self._checked(release)
        if night is not None and manifest.night != night:
            raise ReleaseRefused(
                f"the pointer says that release {release[:12]} is of night {night}, its manifest says "
                f"{manifest.night}; promote it again"
            )
        with self._cache.opened(self._store, self.pipeline, manifest, keep, between) as lay_out:
            loaded = load(lay_out, manifest, self._device, self._engine, self._variant)
        self._runs_on = loaded.device
        self._loaded[release] = (data, key)
        return loaded

    def hold(self, release: str, keep: Collection[str], between: Callable[[], object] | None = None) -> None:
        """Have the files that this ranker opens of a release on the disk, so that going back to it fetches nothing.

        It is not loaded: should its variant not answer its golden requests, the files of fp32 are fetched then.
        Arguments as for `load`.

        Raises:
            ReleaseRefused, StoreError: it is gone, odd, or cannot be fetched, or lacks the variant that is insisted on.
        """
        manifest = self.manifest(release)
        chosen = choose(manifest, self._variant, self._runs_on)
        with self._cache.opened(self._store, self.pipeline, manifest, keep, between) as lay_out:
            lay_out(selected(manifest, chosen, self._runs_on))

    def _checked(self, release: str) -> tuple[Manifest, bytes, TrustedKey | None]:
        """A release's manifest, its bytes and who vouches for it; None where no keys are named."""
        stored = find_manifest(self._store, self.pipeline, release)
        if stored is None:
            raise ReleaseRefused(f"release {release[:12]} has no manifest; publish it again")
        keyring = self.keyring()
        key = None if keyring is None else vouching_key(self._store, keyring, self.pipeline, release, stored.data)
        return Manifest.parse(stored.data, self.pipeline, release), stored.data, key
