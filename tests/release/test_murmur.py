"""MurmurHash3 in numpy against onnxruntime's operator, bit by bit."""

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pyarrow as pa
import pytest
from onnx import TensorProto, helper

from tasks.release.murmur import finish, hash_int64, hash_strings

SEEDS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1)
LETTERS = list("abc 7é日😀\x00\n")


def operator(values: npt.NDArray[np.generic], seed: int) -> npt.NDArray[np.uint32]:
    kind = TensorProto.STRING if values.dtype == object else TensorProto.INT64
    node = helper.make_node("MurmurHash3", ["keys"], ["hashes"], domain="com.microsoft", seed=seed, positive=1)
    given = helper.make_tensor_value_info("keys", kind, ["keys"])
    asked = helper.make_tensor_value_info("hashes", TensorProto.UINT32, ["keys"])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "hash", [given], [asked]), opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"keys": values})[0])


@pytest.mark.parametrize("seed", SEEDS)
def test_strings_of_every_length_and_tail_hash_as_the_operator_does(seed: int):
    random = np.random.default_rng(seed)
    listed = ["".join(random.choice(LETTERS, length)) for length in (*range(40), 1000) for _ in range(10)]
    np.testing.assert_array_equal(hash_strings(pa.array(listed), seed), operator(np.array(listed, object), seed))


@pytest.mark.parametrize("seed", SEEDS)
def test_integers_hash_as_the_operator_does(seed: int):
    edges = [0, 1, -1, 2**31, 2**32, -(2**32), 2**63 - 1, -(2**63)]
    values = np.concatenate([edges, np.random.default_rng(seed).integers(-(2**63), 2**63 - 1, 500)]).astype(np.int64)
    np.testing.assert_array_equal(hash_int64(values, seed), operator(values, seed))


def test_slices_of_columns_and_none_at_all():
    listed = pa.array(["before", "a", "", "longer than a block", "behind"])
    whole = hash_strings(listed, 7)
    assert hash_strings(listed[1:4], 7).tolist() == whole[1:4].tolist()
    assert hash_strings(listed[:0], 7).shape == hash_int64(np.zeros(0, np.int64), 7).shape == (0,)
    assert hash_strings(pa.array(["", ""]), 7).tolist() == [finish(np.array([7], np.uint32))[0]] * 2
