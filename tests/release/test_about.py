"""Two releases side by side: what those who send requests must know."""

from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from flows.display_releases import show_difference
from tasks.clients.object_store import open_store
from tasks.release.about import about, difference
from tasks.release.manifest import Personal
from tasks.release.publishing import publish_release
from tests.releases import PIPELINE, Made, manifest_of


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"personal": Personal("spring")}, "hmac-sha256 with key spring"),
        ({"optional": True}, "optional"),
        ({"missing": "absent"}, "missing 'absent'"),
        ({"example": "another", "meaning": "the same, told otherwise"}, None),
    ],
)
def test_whatever_a_request_needs_is_a_difference(full: Made, tmp_path: Path, change: dict, told: str | None) -> None:
    interface, found = full.manifest.interface, []
    store = open_store(str(tmp_path))
    at = next(at for at, one in enumerate(interface.inputs) if one.dtype == "string" and one.values is None)
    spec = replace(interface.inputs[at], **change)
    inputs = (*interface.inputs[:at], spec, *interface.inputs[at + 1 :])
    for one in (interface, replace(interface, inputs=inputs)):
        folder = tmp_path / f"files-{len(found)}"
        folder.mkdir()
        for path in full.folder.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        manifest = manifest_of(folder, one)
        publish_release(store, PIPELINE, folder, manifest, {})
        found.append(about(store, PIPELINE, manifest.release))
    changed = difference(*found).interface
    assert [one.name for one in changed] == ([] if told is None else [spec.name])
    shown = StringIO()
    show_difference(Console(file=shown, width=60), difference(*found))
    assert ("requests have to change" in shown.getvalue()) == (told is not None)
    assert told is None or told in shown.getvalue()
