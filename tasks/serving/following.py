"""A ranker's way from one release to the next: look at the pointer, load before unloading, swap in one assignment.

The champion is first, its challenger follows. While files arrive the pointer is looked at as often as ever: where it
has moved they are given up, so that a rollback waits for no download.
"""

import logging
import threading
import time
from collections.abc import Callable

from tasks.errors import NightrankError, NoRelease, ReleaseRefused, StoreUnavailable
from tasks.release.manifest import Pointer
from tasks.serving.answering import Champion, Contest
from tasks.serving.batcher import Batcher
from tasks.serving.events import Events
from tasks.serving.guards import MOST, WINDOW
from tasks.serving.loaded import LoadedRelease
from tasks.serving.refresher import Patience
from tasks.serving.seen import SeenGeneration
from tasks.serving.source import ReleaseSource

log = logging.getLogger("nightrank.ranker")
LOOK_S = 1.0
"""Seconds between looks at the pointer while files arrive, where no thread polls."""


class _Overtaken(Exception):
    """What a pointer names was given up for a newer pointer, or because the ranker was closed: no failure."""

    def __init__(self, pointer: Pointer | None) -> None:
        super().__init__("the pointer has moved")
        self.pointer = pointer


class Follower:
    """Holds what serves, and follows the pointer. All methods may be called from any number of threads.

    Attributes:
        generation: of the pointer that serves.
        refusal: why the last look at the pointer kept the old release; None where all was well.
        signed: whether, at the last look, a trusted key vouched for all that serves.
    """

    def __init__(
        self,
        source: ReleaseSource,
        seen: SeenGeneration,
        min_generation: int,
        events: Events,
        batcher: Batcher | None,
        every_s: float,
    ) -> None:
        """Load the champion.

        Args:
            source: where releases come from.
            seen: remembers the newest generation.
            min_generation: an older one is refused, too.
            events: hears what happens.
            batcher: runs small requests together; None runs each by itself.
            every_s: seconds between polls, by which patience with bad releases is measured.

        Raises:
            NoRelease, ReleaseRefused, DeviceUnavailable, InvalidConfig, StoreError: as `Ranker`.
        """
        self._source, self._seen = source, seen
        self._events, self._batcher = events, batcher
        self._refreshing = threading.Lock()
        self._look_s = every_s or LOOK_S
        self._silent = 0.0
        self._patience, self._challengers, self._holding = Patience(every_s), Patience(every_s), Patience(every_s)
        self._closed = False
        self._held = -1
        self._state: Champion | None = None
        self._no_challenger: str | None = None
        self._not_held: str | None = None
        self.refusal: str | None = None
        self.generation = max(min_generation, seen.read())
        pointer: Pointer | None = self._newer_pointer()
        again = False
        while pointer is not None:
            pointer, again = self._follow(pointer, again), True
        self._tell()

    def serving(self) -> Champion:
        """What answers now.

        Raises:
            NoRelease: it was closed.
        """
        state = self._state
        if state is None:
            raise NoRelease(f"the ranker of pipeline {self._source.pipeline!r} is closed; open another one")
        return state

    @property
    def warnings(self) -> tuple[str, ...]:
        """What an operator should look at although requests are answered."""
        state = self.serving()
        found = [self.refusal, state.release.spared, self._no_challenger, self._not_held]
        if isinstance(state, Contest) and state.lost is not None:
            found.append(f"the champion answers the challenger's users: {state.lost}")
        if isinstance(state, Contest):
            found.append(state.challenger.spared)
        if state.watch.broken:
            found.append(
                f"release {state.release.manifest.release[:12]} gave all candidates the same score in "
                f"{state.watch.share:.0%} of its last answers (at most {WINDOW}), limit {MOST:.0%}: look at its exam, "
                f"or roll back"
            )
        return tuple(one for one in found if one is not None)

    def refresh(self) -> bool:
        """Look at the pointer now; whether another champion serves since.

        One that has waited for a look to which the store gave no answer takes that for its own.
        """
        asked = time.monotonic()
        with self._refreshing:
            self.serving()
            return self._silent < asked and self._refresh(patient=False)

    def poll(self) -> None:
        """What a thread does every so often: a refresh that is patient with bad releases, and files fetched ahead."""
        asked = time.monotonic()
        with self._refreshing:
            self.serving()
            if self._silent >= asked:
                return
            self._refresh(patient=True)
            try:
                self._hold()
            except _Overtaken:
                log.info("files that were fetched ahead are given up: the pointer has moved on")
            else:
                return
            self._refresh(patient=True)

    def close(self) -> None:
        """Serve no more. Requests in flight finish."""
        self._closed = True
        self._state = None

    def _refresh(self, patient: bool) -> bool:
        before, tried, again = self.serving().release, None, False
        try:
            pointer: Pointer | None = self._newer_pointer()
            if patient and not self._patience.due(pointer):
                self._tell()
                return False
            while pointer is not None:
                tried = pointer
                pointer, again = self._follow(pointer, again), True
        except Exception as error:  # whatever it is, it must not take the release away that serves
            self.refusal = f"{type(error).__name__}: {error}"
            if isinstance(error, StoreUnavailable) or isinstance(error.__cause__, StoreUnavailable):
                self._silent = time.monotonic()
            self._patience.refused(tried)
            log.warning(
                "release %s of night %s keeps serving: %s",
                *(before.manifest.release[:12], before.manifest.night, self.refusal),
                exc_info=None if isinstance(error, NightrankError) else error,
            )
        else:
            self.refusal = None
        self._tell()
        return self.serving().release is not before

    def _tell(self) -> None:
        self.signed = self._vouched()
        self._events.polled(self.generation, self.refusal, self.signed)

    def _vouched(self) -> bool:
        """Whether a key that is trusted now vouches for champion and challenger."""
        state = self.serving()
        serve = [state.release, state.challenger] if isinstance(state, Contest) else [state.release]
        try:
            return self._source.vouched([one.manifest.release for one in serve])
        except NightrankError as error:  # nobody can be asked, which is no reason to stop serving
            log.warning("it is unknown who vouches for what serves: %s", error)
            return False

    def _newer_pointer(self) -> Pointer:
        """The pointer, unless it is older than what was seen."""
        pointer = self._source.pointer()
        if pointer.generation < self.generation:
            raise ReleaseRefused(
                f"the pointer of {self._source.pipeline!r} went back from generation {self.generation} to "
                f"{pointer.generation}: an old one was replayed, or the pipeline was made anew; then restart the "
                f"ranker, with another cache folder or after deleting its seen.json"
            )
        now = None if self._state is None else self._state.release.manifest.release
        if now is not None and pointer.generation == self.generation and pointer.release != now:
            raise ReleaseRefused(
                f"the pointer of {self._source.pipeline!r} names release {pointer.release[:12]} in generation "
                f"{pointer.generation}, which named {now[:12]}; promote {now[:12]}, then whichever is wanted"
            )
        return pointer

    def _follow(self, pointer: Pointer, again: bool) -> Pointer | None:
        """Serve what a pointer names, or give that up for a newer pointer, which is to be followed then.

        Where one was given up already, a release that is loaded serves first, however soon the next one came: or a
        pointer that moves faster than releases load would never be followed.
        """
        try:
            self._swap(pointer, again)
        except _Overtaken as signal:
            log.info("generation %d of the pointer is given up: it has moved on", pointer.generation)
            return signal.pointer
        return None

    def _look_between(self, pointer: Pointer, champion: bool = False) -> Callable[[], None]:
        """To be called while files arrive for a pointer; looks at it once a poll."""
        looked = time.monotonic()

        def look() -> None:
            nonlocal looked
            if self._closed:
                raise _Overtaken(None)
            if time.monotonic() - looked >= self._look_s:
                self._require_newest(pointer, champion)
                looked = time.monotonic()

        return look

    def _require_newest(self, pointer: Pointer, champion: bool = False) -> None:
        """Give up what a pointer names where a newer one is there; its champion only where that names another one.

        Raises:
            _Overtaken: it is.
        """
        try:
            newest = self._source.pointer()
        except NightrankError as error:  # what was good a moment ago is followed; the next look says what is wrong
            log.warning("whether the pointer has moved meanwhile is unknown: %s", error)
            return
        if newest.generation > pointer.generation and not (champion and newest.release == pointer.release):
            raise _Overtaken(newest)

    def _swap(self, pointer: Pointer, again: bool) -> None:
        """Serve what a pointer names, once it is verified, loaded and found good; what served until then goes last.

        Raises:
            _Overtaken: the pointer has moved meanwhile.
        """
        before, began = self._state, time.monotonic()
        if before is None or before.release.manifest.release != pointer.release:
            between = self._look_between(pointer, champion=True)
            champion, watch = self._source.load(pointer.release, self._keep(pointer), pointer.night, between), None
            if not again:
                self._require_newest(pointer, champion=True)
        elif pointer.generation == self.generation and not self._lacks_challenger(pointer):
            return
        else:
            champion, watch = before.release, before.watch
        seconds = time.monotonic() - began
        self._no_challenger = None
        state = alone = Champion(champion, self._events, self._batcher, watch)
        named = pointer.challenger is not None and pointer.share > 0
        rival = before.challenger if isinstance(before, Contest) else None
        if rival is not None and named and rival.manifest.release == pointer.challenger:
            state = self._contest(pointer, alone, lambda: rival)
        elif rival is not None:
            self._events.swapped("challenger", None, "", 0.0)
        self._seen.remember(pointer.generation)
        if self._closed:
            return
        self._state, self.generation = state, pointer.generation
        if before is None or champion is not before.release:
            log.info("release %s of night %s serves", champion.manifest.release[:12], champion.manifest.night)
            self._events.swapped("champion", champion.manifest, champion.device, seconds)
        if named and state is alone and self._no_challenger is None:
            self.refusal = None
            self._tell()  # it may be minutes until the challenger is there
            state = self._contest(pointer, alone, lambda: self._challenger(pointer, again))
            if not self._closed:
                self._state = state

    def _lacks_challenger(self, pointer: Pointer) -> bool:
        """Whether one is named that does not serve, and is to be tried again."""
        named = pointer.challenger is not None and pointer.share > 0
        return named and not isinstance(self._state, Contest) and self._challengers.due(pointer)

    def _challenger(self, pointer: Pointer, again: bool) -> LoadedRelease:
        """The challenger that a pointer names, once the champion serves."""
        assert pointer.challenger is not None
        loaded = self._source.load(pointer.challenger, self._keep(pointer), between=self._look_between(pointer))
        if not again:
            self._require_newest(pointer)
        return loaded

    def _contest(self, pointer: Pointer, alone: Champion, load: Callable[[], LoadedRelease]) -> Champion:
        """The champion with its challenger, or alone where that is no good."""
        began = time.monotonic()
        try:
            challenger = load()
            contest = Contest(alone.release, challenger, pointer.share, self._events, self._batcher, alone.watch)
        except _Overtaken:
            raise
        except Exception as error:  # whatever it is, the champion can answer everybody
            reason = f"challenger {(pointer.challenger or '')[:12]} does not serve: {type(error).__name__}: {error}"
            log.warning("%s", reason, exc_info=None if isinstance(error, NightrankError) else error)
            self._no_challenger = reason
            self._challengers.refused(pointer)
            self._events.swapped("challenger", None, "", 0.0)
            self._events.fell_back(reason)
            return alone
        self._events.swapped("challenger", challenger.manifest, challenger.device, time.monotonic() - began)
        return contest

    def _keep(self, pointer: Pointer) -> set[str]:
        """Releases with a role, whose files stay on this disk."""
        serving = None if self._state is None else self._state.release.manifest.release
        return {one for one in (pointer.release, pointer.previous, pointer.challenger, serving) if one is not None}

    def _hold(self) -> None:
        """Have the files of the release before and of the challenger on the disk.

        Once for each move of the pointer; what fails is tried again at later polls, less and less often.

        Raises:
            _Overtaken: the pointer has moved meanwhile.
        """
        if self.refusal is not None or self._held == self.generation or not self._holding.due(self.generation):
            return
        try:
            pointer = self._source.pointer()
            for release in (pointer.previous, pointer.challenger):
                if release is not None:
                    self._source.hold(release, self._keep(pointer), self._look_between(pointer))
        except NightrankError as error:
            self._not_held = f"not every release with a role is kept at hand: {type(error).__name__}: {error}"
            self._holding.refused(self.generation)
            log.warning("%s", self._not_held)
        else:
            self._held, self._not_held = self.generation, None
