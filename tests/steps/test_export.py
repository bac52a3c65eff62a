"""What an operator is told where a graph and its network disagree."""

import re

import pytest

from tasks.errors import ObjectMissing, ParityBroken
from tasks.export import _says_what_to_delete
from tests.finished import Finished


def test_where_the_shared_graph_may_be_to_blame_the_error_names_the_folder_that_holds_it(finished: Finished) -> None:
    with (
        pytest.raises(ParityBroken, match=r"^model\.onnx differs by 0\.5; to have the graph traced anew") as caught,
        _says_what_to_delete(finished.config.place()),
    ):
        raise ParityBroken("model.onnx differs by 0.5")
    assert isinstance(caught.value.__cause__, ParityBroken)
    named = re.search(r"delete (\S+) in the store and run again$", str(caught.value))
    assert named is not None
    held = {key.removeprefix(named[1]).partition("/")[2] for key in finished.store.list(named[1])}
    assert "record.json" in held


def test_an_error_of_another_kind_is_left_as_it_is(finished: Finished) -> None:
    said = ObjectMissing("tiny/work/export/1 is gone")
    with pytest.raises(ObjectMissing) as caught, _says_what_to_delete(finished.config.place()):
        raise said
    assert caught.value is said
