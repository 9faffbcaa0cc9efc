"""Safetensors headers: the same tensors as the reference reader, and no surprise from damaged files."""

import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from opd_mcp.identity.safetensors import full_digest, read_tensors, sampled_digest, weight_files
from opd_mcp.schemas.errors import IntegrityError


def test_tensors_are_where_the_reference_reader_finds_them(make_model):
    model = make_model("teacher")
    expected = load_file(model / "model.safetensors")
    tensors = read_tensors(model)
    assert [tensor.name for tensor in tensors] == sorted(expected)
    for tensor in tensors:
        content = tensor.file.read_bytes()[tensor.begin : tensor.end]
        found = np.frombuffer(content, dtype="float32").reshape(tensor.shape)
        np.testing.assert_array_equal(found, expected[tensor.name])


def test_empty_and_scalar_tensors_have_digests(tmp_path):
    save_file({"empty": np.zeros((0, 3), "float32"), "scalar": np.array(1, "int64")}, tmp_path / "a.safetensors")
    empty, scalar = read_tensors(tmp_path)
    assert (empty.elements, scalar.elements) == (0, 1)
    assert full_digest(empty) != full_digest(scalar)


def test_the_last_byte_of_a_large_tensor_is_among_the_sampled(tmp_path):
    values = np.zeros(100_001, "uint8")
    save_file({"w": values}, tmp_path / "a.safetensors")
    before = sampled_digest(read_tensors(tmp_path)[0])
    values[-1] = 1
    save_file({"w": values}, tmp_path / "a.safetensors")
    assert sampled_digest(read_tensors(tmp_path)[0]) != before


def test_equal_bytes_of_another_shape_or_type_are_another_tensor(tmp_path):
    save_file({"a": np.zeros((2, 3), "float32"), "b": np.zeros((3, 2), "float32")}, tmp_path / "1.safetensors")
    save_file({"c": np.zeros((2, 3), "int32")}, tmp_path / "2.safetensors")
    assert len({full_digest(tensor) for tensor in read_tensors(tmp_path)}) == 3


def test_one_name_in_two_files_is_an_error(tmp_path):
    for name in ("1.safetensors", "2.safetensors"):
        save_file({"w": np.zeros(1, "float32")}, tmp_path / name)
    with pytest.raises(IntegrityError, match="also in"):
        read_tensors(tmp_path)


def test_a_second_copy_in_another_format_beside_the_model_is_left_alone(make_model):
    model = make_model("teacher")
    save_file({"w": np.zeros(1, "float32")}, model / "consolidated.safetensors")
    assert [file.name for file in weight_files(model)] == ["model.safetensors"]


@settings(max_examples=150)
@given(data=st.data())
def test_mutated_files_are_read_or_refused(tmp_path, data):
    path = tmp_path / "model.safetensors"
    save_file({"w": np.arange(6, dtype="float32"), "v": np.zeros((2, 2), "int64")}, path)
    content = bytearray(path.read_bytes())
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, min(len(content), start + 20)))
    content[start:end] = data.draw(st.binary(max_size=20))
    path.write_bytes(content)
    assert outcome(tmp_path) in {"digests", "damaged_file"}


def outcome(directory):
    """What reading a model directory's tensors ends in."""
    try:
        digests = [(full_digest(tensor), sampled_digest(tensor)) for tensor in read_tensors(directory)]
    except IntegrityError as error:
        return error.code
    return "digests" if digests is not None else "nothing"


def test_tensors_that_overlap_are_damage(tmp_path):
    entry = {"dtype": "U8", "shape": [64], "data_offsets": [0, 64]}
    header = json.dumps({f"t{index}": entry for index in range(3)}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    with pytest.raises(IntegrityError, match="overlaps"):
        read_tensors(tmp_path)
