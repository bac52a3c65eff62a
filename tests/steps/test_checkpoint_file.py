"""The files that a training's checkpoint, and those of its parts, are kept in."""

from datetime import date
from pathlib import Path

from tasks.meta_train import CheckpointFile
from tasks.references import Place

NIGHT = date(2026, 3, 7)


def names(place: Place) -> set[str]:
    return {path.name for path in (Path(place.scratch) / "checkpoints").iterdir()}


def test_parts_are_kept_beside_each_other_until_the_whole_is_on_record(tmp_path: Path) -> None:
    place = Place(store="s", pipeline="tiny", scratch=str(tmp_path))
    old, new = CheckpointFile(place, NIGHT, "aaaa"), CheckpointFile(place, NIGHT, "bbbb")
    other = CheckpointFile(place, date(2026, 3, 8), "aaaa")
    for file, data in ((old, b"0"), (old.part("member-1"), b"1"), (other.part("member-1"), b"2")):
        file.save(data)
    assert (old.load(), old.part("member-1").load(), new.load()) == (b"0", b"1", None)
    new.part("member-1").save(b"3")  # other inputs of this night: what the old ones left goes
    new.part("student").save(b"4")
    assert names(place) == {
        "tiny-2026-03-08.aaaa.member-1",
        "tiny-2026-03-07.bbbb.member-1",
        "tiny-2026-03-07.bbbb.student",
    }
    assert CheckpointFile(place, NIGHT, "bbbb").part("student").load() == b"4"
    new.clear()
    assert names(place) == {"tiny-2026-03-08.aaaa.member-1"}
    new.clear()
