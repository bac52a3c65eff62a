"""The newest generation of the pointer that rankers with this cache have served, so that no old pointer is replayed.

An old pointer is as well signed as a new one. What tells them apart is the generation, which only grows; a ranker
remembers the highest one beside its files, for its next process.
"""

import json
import os
import uuid
from pathlib import Path

from tasks.errors import InvalidConfig, ReleaseRefused
from tasks.serving.locks import locked


class SeenGeneration:
    """A small file in the cache's folder, which several processes may share."""

    def __init__(self, folder: Path, pipeline: str) -> None:
        self._path = folder / "seen.json"
        self._pipeline = pipeline

    def read(self) -> int:
        """The highest generation that was served; 0 where there was none.

        Raises:
            InvalidConfig: the folder is another pipeline's, or no folder.
            ReleaseRefused: the file is damaged, or the disk refuses.
        """
        try:
            found = json.loads(self._path.read_bytes())
            pipeline, generation = found["pipeline"], found["generation"]
            if type(generation) is not int or generation < 0 or not isinstance(pipeline, str):
                raise ValueError(f"it says generation {generation!r} of pipeline {pipeline!r}")
        except FileNotFoundError:
            return 0
        except NotADirectoryError as error:
            raise InvalidConfig(
                f"the cache {self._path.parent} is a file, or lies under one; name a folder, or a path where one can "
                f"be made"
            ) from error
        except OSError as error:
            raise ReleaseRefused(
                f"{self._path} cannot be read ({error.strerror or error}), so that an old pointer could not be told "
                f"from a new one; let this process read and write there, or name another folder"
            ) from error
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ReleaseRefused(
                f"{self._path} cannot be read ({error!r}), so that an old pointer could not be told from a new one; "
                f"look who wrote to that folder, then delete the file"
            ) from error
        if pipeline != self._pipeline:
            raise InvalidConfig(
                f"the cache {self._path.parent} belongs to pipeline {pipeline!r}, not {self._pipeline!r}; "
                f"give each pipeline a folder of its own"
            )
        return generation

    def remember(self, generation: int) -> None:
        """Remember a generation whose release was verified, loaded and found good; a lower one changes nothing.

        Raises:
            ReleaseRefused: the disk refuses, the file is damaged, or a process that was stopped holds its lock.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with locked(self._path.with_suffix(".lock")):
                if generation > self.read():
                    self._write(generation)
        except OSError as error:
            raise ReleaseRefused(
                f"generation {generation} cannot be remembered in {self._path}: {error.strerror or error}; free space "
                f"there or name another folder"
            ) from error

    def forget(self) -> None:
        """Forget it, because the pipeline's store was made anew and begins at generation 1 again."""
        self._path.unlink(missing_ok=True)

    def _write(self, generation: int) -> None:
        part = self._path.parent / f".{uuid.uuid4().hex}.part"
        try:
            with part.open("x") as file:
                json.dump({"pipeline": self._pipeline, "generation": generation}, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(self._path)
        finally:
            part.unlink(missing_ok=True)
