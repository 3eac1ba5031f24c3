"""Safetensors from strangers: whole ones are read as the library reads them, all others are a ValueError."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from animatelcm.weights.files import (
    DTYPES,
    MAX_TENSORS,
    TensorInfo,
    read_header,
    read_metadata,
    read_safetensors,
    read_state,
    write_safetensors,
)
from weight_files import FUZZ, SUFFIXES, everything, filled, memory, outcome, refusal, same


def put(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    """A safetensors file with any header: JSON of an object, or bytes as they are."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def one(**changes: object) -> dict[str, object]:
    """The description of two float32 numbers, with changes."""
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


def test_all_dtypes_are_read_as_the_safetensors_library_reads_them(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(everything(), path, metadata={"a": "b\n\u00e9"})
    assert same(read_state(path), load_file(path))
    assert same(read_safetensors(path), everything())
    assert read_header(path) == {
        key: TensorInfo(tuple(value.shape), key.partition(".")[0]) for key, value in everything().items()
    }
    assert read_metadata(path) == {"a": "b\n\u00e9"}


names = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z"), exclude_characters="./\\"), max_size=8)
states = st.dictionaries(
    names.filter(lambda name: name != "__metadata__" and name.isprintable()),
    st.tuples(st.lists(st.integers(0, 4), max_size=4).map(tuple), st.sampled_from(list(DTYPES.values()))),
    max_size=5,
)


@given(states, st.integers(0, 99))
@settings(FUZZ, max_examples=50)
def test_what_the_library_writes_is_read_back(tmp_path_factory, kinds, seed):
    state = {name: filled(shape, dtype, seed) for name, (shape, dtype) in kinds.items()}
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    save_file(state, path)
    assert same(read_state(path), load_file(path))
    write_safetensors(state, path)
    assert same(load_file(path), state)
    assert read_metadata(path) == {"format": "pt"}


def test_tensors_are_of_their_own_memory(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(4), "b": torch.ones(4)}, path)
    state = read_state(path)
    path.write_bytes(b"")
    state["a"].zero_()
    assert state["b"].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_only_wanted_tensors_are_read(suffix, tmp_path):
    path, state = tmp_path / f"x{suffix}", {name: filled((3,), torch.float32, i) for i, name in enumerate("abc")}
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    assert same(read_state(path, lambda name: name != "b"), {name: state[name] for name in "ac"})
    assert read_state(path, lambda name: False) == {}


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        (b"[]", b"", "no JSON object"),
        (b" {}", b"", "no JSON object"),
        (b'{"a"', b"", "header"),
        (b"\xff{}", b"", "header"),
        (b"[" * 10_000, b"", "recursion"),
        ({"a": one()}, b"\0" * 7, "last 1 bytes are missing"),
        ({"a": one()}, b"\0" * 9, "1 bytes of it belong to no tensor"),
        ({}, b"\0", "1 bytes of it belong to no tensor"),
        ({"a": one(), "b": one(data_offsets=[12, 20])}, b"\0" * 20, "a hole in its data before 'b'"),
        ({"a": one(), "b": one(data_offsets=[4, 12])}, b"\0" * 12, "an overlap in its data before 'b'"),
        ({"a": one(), "b": one()}, b"\0" * 8, "an overlap"),
        ({"a": one(data_offsets=[8, 0])}, b"\0" * 8, "'a' has -8 bytes"),
        ({"a": one(data_offsets=[0, 4])}, b"\0" * 4, "'a' has 4 bytes, not those of its shape"),
        ({"a": one(data_offsets=[-8, 0])}, b"", "-8"),
        ({"a": one(data_offsets=[0, 8, 8])}, b"\0" * 8, "'a' is not described"),
        ({"a": one(data_offsets=[False, 8])}, b"\0" * 8, "'a' has no shape"),
        ({"a": one(shape=[True, 2])}, b"\0" * 8, "'a' has no shape"),
        ({"a": one(shape=[2.0])}, b"\0" * 8, "2.0"),
        ({"a": one(shape=["2"])}, b"\0" * 8, "'a' has no shape"),
        ({"a": one(shape=[-1, -2])}, b"\0" * 8, "-1"),
        ({"a": one(shape=[2**62, 4], data_offsets=[0, 0])}, b"", "461168601842738"),
        ({"a": one(shape=[10**9, 10**9, 10**9, 0], data_offsets=[0, 0])}, b"", "'a' has no shape"),
        ({"a": one(shape=[1] * 100_000 + [2])}, b"\0" * 8, "'a' has no shape"),
        ({"a": one(dtype="F31")}, b"\0" * 8, "'F31' numbers in 'a'"),
        ({"a": one(dtype=["F32"])}, b"\0" * 8, "'a' is not described"),
        ({"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8, "'a' is not described"),
        ({"a": None}, b"", "'a' is not described"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
        ({"__metadata__": ["a"]}, b"", "__metadata__"),
        ({"__metadata__": {"a": "\ud800"}}, b"", "surrogates"),
        (b'{"__metadata__":{"a":"1","a":"2"}}', b"", "'a' twice"),
        (b'{"a":%s,"a":%s}' % (2 * (json.dumps(one()).encode(),)), b"\0" * 8, "'a' twice"),
        (b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"\0" * 8, "'dtype' twice"),
        (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', b"\0" * 8, "NaN"),
        (b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', b"", "-0"),
        (b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,8]}}' % (b"9" * 100_000), b"\0" * 8, "9999"),
    ],
)
def test_a_wrong_header_is_explained(header, data, reason, tmp_path):
    path = put(tmp_path / "x.safetensors", header, data)
    for read in (read_state, read_header, read_safetensors, read_metadata):
        assert reason in refusal(read, path)


KEYS = ["../a", "a/../b", "..", "/etc/passwd", "a\\b", "a\0b", "a\nb", "\x1b[2J", "\u202eab", "a\ud800", "k" * 1001]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_names_that_are_no_names_of_layers_are_refused(key, suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    if suffix == ".safetensors":
        put(path, {key: one()}, b"\0" * 8)
    else:
        torch.save({key: torch.zeros(2)}, path)
    assert re.search("has a tensor named|surrogates", refusal(read_state, path))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_ordinary_names_are_taken(suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    state = dict.fromkeys(["a.0.weight", "lora_unet_a", "a.weight/exp_avg", "*", "\u6a21\u578b", "k" * 1000])
    state = {name: torch.full((2,), float(i)) for i, name in enumerate(state)}
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    assert same(read_state(path), state)


@pytest.mark.parametrize("length", [0, 3, 2**31, 100_000_001, 2**63, 2**64 - 1])
def test_the_header_s_length_is_not_believed(length, tmp_path):
    path = put(tmp_path / "x.safetensors", {"a": one()}, b"\0" * 8, length=length)
    with memory(2**26):
        refusal(read_state, path)


def test_a_header_of_more_than_100_megabytes_is_not_read(tmp_path):
    path = put(tmp_path / "x.safetensors", b"{", length=100_000_001)
    os.truncate(path, 200_000_000)
    with memory(2**26):
        assert "100000001" in refusal(read_state, path)


def test_sizes_are_not_believed(tmp_path):
    """A file of some hundred bytes that claims terabytes."""
    count = 2**40
    path = put(tmp_path / "x.safetensors", {"a": one(shape=[count], data_offsets=[0, 4 * count])}, b"\0" * 8)
    with memory(2**26):
        assert f"{4 * count - 8} bytes are missing" in refusal(read_state, path)


@pytest.mark.parametrize("entry", [b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}', b"0", b"{}", b"[]"])
def test_a_million_names_are_refused_at_once(entry, tmp_path):
    header = b"{" + b",".join(b'"%d":%s' % (i, entry) for i in range(10**6)) + b"}"
    path = put(tmp_path / "x.safetensors", header)
    with memory(2**29):
        assert f"more than {MAX_TENSORS} tensors" in refusal(read_header, path)


def test_the_most_names_are_read_and_one_more_is_not(tmp_path):
    entry = b'"%d":{"dtype":"U8","shape":[1,1,1,1],"data_offsets":[%d,%d]}'
    header = b",".join(entry % (i, i, i + 1) for i in range(MAX_TENSORS))
    path = put(tmp_path / "x.safetensors", b'{"__metadata__":{},' + header + b"}", bytes(MAX_TENSORS))
    assert len(read_header(path)) == MAX_TENSORS
    put(path, b"{" + header + b',"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', bytes(MAX_TENSORS))
    assert f"more than {MAX_TENSORS} tensors" in refusal(read_header, path)


def test_reading_takes_the_memory_of_the_weights_alone(tmp_path):
    """With room for the tensors and half of one they are read; with less room than they have numbers they are not.

    In a process of its own: what an older one has freed is room that no limit sees.
    """
    path, size = tmp_path / "x.safetensors", 40_000_000  # a block of its own, which goes back to the system when freed
    save_file({str(i): torch.zeros(size, dtype=torch.uint8) for i in range(3)}, path)
    script = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from weight_files import memory
from animatelcm.weights.files import read_state
with memory(int(sys.argv[2])):
    print(sum(value.nbytes for value in read_state(Path(sys.argv[1])).values()))
"""
    done = [
        subprocess.run([sys.executable, "-c", script, path, str(room)], capture_output=True, text=True, check=False)
        for room in (5 * size // 2, 7 * size // 2)
    ]
    assert done[0].returncode != 0
    assert "emory" in done[0].stderr
    assert done[1].stdout.strip() == str(3 * size), done[1].stderr


def as_the_library(path: Path) -> bool:
    """The law of reading: the tensors that the safetensors library finds, or a ValueError; and soon."""
    found = outcome(path)
    assert found is None or same(found, load_file(path))
    return found is not None


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "x.safetensors"
    save_file({"a.weight": filled((3, 2), torch.float32), "b": filled((5,), torch.int8)}, path, metadata={"m": "n"})
    assert as_the_library(path)
    return path.read_bytes()


def test_every_truncation_is_refused(whole, tmp_path):
    for length in range(len(whole)):
        (tmp_path / "x.safetensors").write_bytes(whole[:length])
        refusal(read_state, tmp_path / "x.safetensors")


@given(st.data())
@FUZZ
def test_damaged_bytes_are_found_or_harmless(whole, tmp_path_factory, data):
    path, raw = tmp_path_factory.getbasetemp() / "damaged.safetensors", bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    path.write_bytes(raw)
    as_the_library(path)


@given(st.integers(0, 28), st.integers(0, 255))
@settings(FUZZ, max_examples=30)
def test_any_numbers_are_read_as_they_are(whole, tmp_path_factory, back, byte):
    path, raw = tmp_path_factory.getbasetemp() / "numbers.safetensors", bytearray(whole)
    raw[-1 - back] = byte
    path.write_bytes(raw)
    assert as_the_library(path)


counts = st.integers(-1, 9) | st.sampled_from([2**31, 2**32, 2**63, 2**64, 10**30])
values = st.recursive(
    st.none() | st.booleans() | counts | st.floats() | st.text(max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "U8", "BOOL", "C64", "f32"]) | values,
        "shape": st.lists(counts, max_size=3) | values,
        "data_offsets": st.lists(counts, min_size=2, max_size=2) | values,
    },
    optional={"more": values},
)


@given(
    st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), entries | values, max_size=3), st.binary(max_size=9)
)
@FUZZ
def test_any_header_is_read_as_the_library_reads_it_or_refused(tmp_path_factory, header, data):
    as_the_library(put(tmp_path_factory.getbasetemp() / "header.safetensors", header, data))


@given(st.binary(max_size=200))
@FUZZ
def test_any_bytes_are_refused_or_read_as_the_library_reads_them(tmp_path_factory, raw):
    path = tmp_path_factory.getbasetemp() / "bytes.safetensors"
    as_the_library(put(path, raw))
    path.write_bytes(raw)
    as_the_library(path)
