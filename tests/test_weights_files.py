"""Weight files from strangers: whole ones are read as their own libraries read them, all others are a ValueError."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import pickle
import re
import stat
import struct
import subprocess
import sys
import time
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from animatelcm.weights.files import (
    DTYPES,
    MAX_TENSORS,
    TensorInfo,
    check_finite,
    read_header,
    read_metadata,
    read_safetensors,
    read_state,
    sha256,
    write_safetensors,
)

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", *PICKLES)
READERS = (read_state, read_header)
SLOW = 5.0
"""Seconds that no file of a few megabytes may take, on a busy machine."""
FUZZ = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def filled(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Any bits that a dtype can have."""
    source = torch.Generator().manual_seed(seed)
    count = math.prod(shape) * dtype.itemsize
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), generator=source).to(torch.uint8)
    return bits.view(dtype).reshape(shape)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit, with shapes and dtypes."""
    alike = a.keys() == b.keys() and all(a[k].shape == b[k].shape and a[k].dtype == b[k].dtype for k in a)
    flat = {name: {k: v.flatten().view(torch.uint8) for k, v in state.items()} for name, state in (("a", a), ("b", b))}
    return alike and all(torch.equal(flat["a"][key], flat["b"][key]) for key in a)


def everything() -> dict[str, torch.Tensor]:
    """A matrix, a number and an empty tensor of each dtype."""
    shapes = {"matrix": (3, 5), "number": (), "empty": (0, 4)}
    return {f"{name}.{kind}": filled(shapes[kind], dtype) for name, dtype in DTYPES.items() for kind in shapes}


def refusal(read, path: Path) -> str:
    """What a reader says of a file that it refuses: without delay, and beginning with the path."""
    begun = time.monotonic()
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is what is returned
        read(path)
    assert time.monotonic() - begun < SLOW
    assert str(caught.value).startswith(f"{path} ")
    return str(caught.value).removeprefix(f"{path} ")


@contextlib.contextmanager
def memory(extra: int):
    """No more than this many bytes beyond what the process has now."""
    resource = pytest.importorskip("resource")
    if not Path("/proc/self/statm").is_file():
        pytest.skip("memory is only limited on Linux")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + extra, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# ---- safetensors


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
from test_weights_files import memory
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


def outcome(path: Path) -> dict[str, torch.Tensor] | None:
    """The tensors of a file, or None where it is refused as it should be; any other end of it fails."""
    begun, problem = time.monotonic(), ""
    try:
        found = read_state(path)
    except ValueError as error:
        found, problem = None, str(error)
    assert time.monotonic() - begun < SLOW
    assert found is not None or problem.startswith(f"{path} ")
    return found


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


# ---- pickles


def legacy(state: object, path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


WRITERS = {"zip": torch.save, "legacy": legacy}


@pytest.mark.parametrize("suffix", [*PICKLES, ".CKPT"])
@pytest.mark.parametrize("writer", WRITERS)
def test_pickles_are_read_as_torch_reads_them(writer, suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    eight = ("F8_E4M3", "F8_E5M2")  # which torch itself writes and does not read in the old format
    state = {key: value for key, value in everything().items() if writer == "zip" or not key.startswith(eight)}
    WRITERS[writer](state, path)
    assert same(read_state(path), state)
    assert same(read_state(path), torch.load(path, weights_only=True))
    assert read_header(path)["BF16.matrix"] == TensorInfo((3, 5), "BF16")
    assert read_metadata(path) == {}


@pytest.mark.parametrize("writer", WRITERS)
def test_the_weights_of_a_training_checkpoint_are_its_state_dict(writer, tmp_path):
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    checkpoint = {
        "state_dict": network.state_dict() | {"note": "x", "sizes": torch.Size([2]), "numbers": [1, 2.5, None]},
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "device": torch.device("cpu"),
        "dtype": torch.float16,
    }
    WRITERS[writer](checkpoint, tmp_path / "x.ckpt")
    assert same(read_state(tmp_path / "x.ckpt"), dict(network.state_dict()))


@pytest.mark.parametrize("writer", WRITERS)
def test_parameters_and_views_become_plain_tensors(writer, tmp_path):
    base = filled((4, 6), torch.int16)
    state = {"row": base[1], "turned": base.t(), "parameter": torch.nn.Parameter(torch.ones(2)), "tied": base}
    WRITERS[writer](OrderedDict(state), tmp_path / "x.pt")
    found = read_state(tmp_path / "x.pt")
    assert same(found, {key: value.detach() for key, value in state.items()})
    assert {type(value) for value in found.values()} == {torch.Tensor}
    assert not any(value.requires_grad for value in found.values())


class Payload:
    """What a hostile file would run when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return exec, (f"open({str(self.marker)!r}, 'w').close()",)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nothing_is_run(suffix, tmp_path):
    marker, path = tmp_path / "was-here", tmp_path / f"x{suffix}"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(Payload(marker), protocol))
        for read in (read_state, read_header, read_safetensors):
            refusal(read, path)
    for writer in WRITERS.values():
        writer({"a": torch.zeros(2), "b": Payload(marker)}, tmp_path / "with-tensors")
        path.write_bytes((tmp_path / "with-tensors").read_bytes())
        for read in (read_state, read_header, read_safetensors):
            refusal(read, path)
        if suffix in PICKLES:
            assert re.search(r"asks to run '\w+\.exec'.* look for a \.safetensors release", refusal(read_state, path))
    assert not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists(), "the payload does nothing, so this test shows nothing"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(count: int, key: str = "0", kind: str = "Float", end: bytes = b"") -> bytes:
    return (
        b"("
        + text("storage")
        + f"ctorch\n{kind}Storage\n".encode()
        + text(key)
        + text("cpu")
        + number(count)
        + end
        + b"tQ"
    )


def tensor(memory: bytes, shape: tuple[int, ...], stride: tuple[int, ...] = (1,), offset: int = 0) -> bytes:
    view = number(offset) + numbers(shape) + numbers(stride)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + memory + view + b"\x89ccollections\nOrderedDict\n)RtR"


def named(**entries: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in entries.items()) + b"u."


def zipped(path: Path, program: bytes, data: bytes = b"\0" * 8, compression: int = zipfile.ZIP_STORED) -> Path:
    """A file of torch.save with any pickle and one storage."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("x/data.pkl", program)
        archive.writestr("x/byteorder", "little")
        archive.writestr("x/data/0", data)
        archive.writestr("x/version", "3\n")
    return path


def old(path: Path, program: bytes, keys: tuple[str, ...] = ("0",), data: bytes = b"\0" * 8) -> Path:
    """A file of torch.save before 1.6 with any pickle."""
    about = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    start = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, about))
    path.write_bytes(
        start + program + pickle.dumps(list(keys), 2) + b"".join(struct.pack("<q", 2) + data for _ in keys)
    )
    return path


def test_what_the_tests_write_by_hand_is_what_torch_reads(tmp_path):
    """So that the refusals below are for what is wrong in a file, not for how it was written."""
    data = struct.pack("<2f", 1, 2)
    zipped(tmp_path / "a.pt", named(a=tensor(storage(2), (2,)), b=tower(200)), data)
    old(tmp_path / "b.pt", named(a=tensor(storage(2, end=b"N"), (2,))), data=data)
    for path in (tmp_path / "a.pt", tmp_path / "b.pt"):
        assert read_state(path).keys() == {"a"}
        assert read_state(path)["a"].tolist() == torch.load(path, weights_only=True)["a"].tolist() == [1, 2]


@pytest.mark.parametrize("shift", range(4))
def test_tensors_lie_where_arithmetic_expects_them(shift, tmp_path):
    program = named(a=tensor(storage(2), (2,)), b=text("b" * shift))
    found = read_state(zipped(tmp_path / "x.pt", program, struct.pack("<2f", 1, 2)))["a"]
    assert found.data_ptr() % 4 == 0
    assert found.tolist() == [1, 2]


def tower(height: int) -> bytes:
    """A tuple of two tuples of two tuples ...: its hash visits 2**height of them."""
    return b")" + b"q\x00h\x00\x86" * height


PROGRAMS = {
    "a name that takes years to hash": b"\x80\x02}" + tower(200) + b"Ns.",
    "names that take years to hash": b"\x80\x02}(" + tower(200) + b"Nu.",
    "a name that is a deep tuple": b"\x80\x02})" + b"\x85" * 300_000 + b"Ns.",
    "gigabytes of zeros": b"\x80\x02cbuiltins\nbytearray\n" + number(2**40) + b"\x85R.",
    "a tensor from a size": b"\x80\x02ctorch\nFloatTensor\n" + number(2**40) + b"\x85R.",
    "a size of towers": b"\x80\x02ctorch\nSize\n" + tower(200) + b"\x85\x85R.",
    "a device of towers": b"\x80\x02ctorch\ndevice\n" + text("cpu") + tower(200) + b"\x86R.",
    "a set": b"\x80\x02cbuiltins\nset\n](" + tower(200) + b"e\x85R.",
    "a state that is no dict": b"\x80\x02ccollections\nOrderedDict\n)R](" + tower(200) + b"N\x86eb.",
    "an object of a class": b"\x80\x02ctorch\nSize\n)\x81.",
    "a long program": b"\x80\x02" + b"]0" * 3_000_000 + b".",
    "many lists": b"\x80\x02" + b"]" * 3_000_000 + b".",
    "an expanded tensor": named(a=tensor(storage(2), (2**40,), (0,))),
    "a number that is expanded": named(a=tensor(storage(2), (3,), (0,))),
    "an expanded row": named(a=tensor(storage(2), (2**20, 2), (0, 1))),
    "a tensor beyond its storage": named(a=tensor(storage(2), (2,), (1,), offset=1)),
    "a tensor with wide strides": named(a=tensor(storage(2), (2,), (2**40,))),
    "a tensor before its storage": named(a=tensor(storage(2), (2,), (1,), offset=-1)),
    "a negative size": named(a=tensor(storage(2), (-2,))),
    "sizes without strides": named(a=tensor(storage(2), (2,), ())),
    "a storage beyond the file": named(a=tensor(storage(2**40), (2**40,))),
    "a storage beyond its part": named(a=tensor(storage(3), (3,))),
    "a storage of another size": named(a=tensor(storage(1), (1,))),
    "a storage of no part": named(a=tensor(storage(2, key="1"), (2,))),
    "a storage of two types": named(a=tensor(storage(8, kind="Byte"), (8,)), b=tensor(storage(2), (2,))),
    "a storage of a negative size": named(a=tensor(storage(-2), (0,))),
    "no names": b"\x80\x02" + tensor(storage(2), (2,)) + b".",
    "no tensors": named(a=text("b")),
    "names that are numbers": b"\x80\x02}K\x01" + tensor(storage(2), (2,)) + b"s.",
    "nothing": b"",
    "no end": named(a=tensor(storage(2), (2,)))[:-1],
    "an end before the beginning": b"\x80\x02.",
    "a value that is missing": b"\x80\x02}Ns.",
    "memory that is missing": b"\x80\x02h\x07.",
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_pickles_that_cost_or_claim_too_much_are_refused(program, tmp_path):
    path = zipped(tmp_path / "x.ckpt", program)
    with memory(2**29):
        refusal(read_state, path)
        refusal(read_header, path)


OLD = {
    "storage beyond the file": (named(a=tensor(storage(2**40, end=b"N"), (2**40,))), ("0",)),
    "tensor a little beyond its storage": (named(a=tensor(storage(2, end=b"N"), (3,))), ("0",)),
    "tensor beyond its storage": (named(a=tensor(storage(2, end=b"N"), (2**30,))), ("0",)),
    "storage that is never filled": (named(a=tensor(storage(2, end=b"N"), (2,))), ()),
    "storage that is a part of another": (named(a=tensor(storage(2, end=text("v") + b"K\x00K\x01\x87"), (1,))), ("0",)),
    "more in the list": (named(a=tensor(storage(2, end=b"N"), (2,))), ("0", "1")),
    "tower": (PROGRAMS["a name that takes years to hash"], ("0",)),
}


@pytest.mark.parametrize(("program", "keys"), OLD.values(), ids=OLD)
def test_old_pickles_that_cost_or_claim_too_much_are_refused(program, keys, tmp_path):
    path = old(tmp_path / "x.ckpt", program, keys)
    with memory(2**28):
        refusal(read_state, path)


def test_many_views_of_one_storage_do_not_multiply_it(tmp_path):
    """Each of them is a tensor of its own as soon as its dtype is changed."""
    program = named(**{f"a{i}": tensor(storage(10_000), (10_000,)) for i in range(100)})
    assert "claim more than the file holds" in refusal(read_state, zipped(tmp_path / "x.pt", program, bytes(40_000)))


GOOD = named(a=tensor(storage(2), (2,)))


def test_compressed_zips_are_refused_before_they_are_unpacked(tmp_path):
    path = zipped(tmp_path / "x.pt", GOOD, b"\0" * 2**27, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**20
    with memory(2**26):
        assert "compressed" in refusal(read_state, path)


def test_parts_that_claim_more_than_the_file_are_refused(tmp_path):
    path = zipped(tmp_path / "x.pt", GOOD)
    raw = bytearray(path.read_bytes())
    at = raw.index(b"PK\1\2")
    raw[at + 20 : at + 28] = struct.pack("<2L", 2**31, 2**31)
    path.write_bytes(raw)
    assert "claim more than the file holds" in refusal(read_state, path)


@pytest.mark.parametrize("name", ["x/data.pkl", "X/DATA.pkl"])
def test_a_part_that_is_there_twice_is_refused(name, tmp_path):
    path = zipped(tmp_path / "x.pt", GOOD)
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings(action="ignore"):
        archive.writestr(name, GOOD)
    assert "twice" in refusal(read_state, path)


def test_a_large_part_that_is_no_tensor_is_refused(tmp_path):
    path = zipped(tmp_path / "x.pt", named(a=text("b" * 2**26)))
    with memory(2**26):
        assert "no tensors" in refusal(read_state, path)


@pytest.mark.parametrize("change", [lambda raw: raw + b"\0", lambda raw: raw + raw, lambda raw: b"PK\3\4" + raw])
def test_zips_with_something_before_or_behind_are_refused(change, tmp_path):
    path = zipped(tmp_path / "x.pt", GOOD)
    path.write_bytes(change(path.read_bytes()))
    refusal(read_state, path)


@pytest.mark.filterwarnings("ignore")
def test_compiled_models_are_refused(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "x.pt")
    refusal(read_state, tmp_path / "x.pt")


@pytest.mark.filterwarnings("ignore")  # torch's, of damage
@pytest.mark.parametrize("writer", WRITERS)
@given(data=st.data())
@settings(FUZZ, max_examples=150)
def test_damaged_pickles_are_refused_or_read_as_torch_reads_them(writer, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / f"damaged-{writer}.pt"
    WRITERS[writer](OrderedDict(a=torch.ones(2, 3), b=torch.ones(4).half()), path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    path.write_bytes(raw)
    found = expected = outcome(path)
    with contextlib.suppress(Exception):  # of damage in parts that are not needed here
        loaded = torch.load(path, weights_only=True)
        expected = {key: value.detach() for key, value in loaded.items()}
    assert found is None or same(found, expected)


# ---- any file


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("content", [b"", b"P", b"PK\3\4", b"\x80\x02", os.urandom(7), os.urandom(5000), b"\0" * 5000])
def test_files_of_no_weights_are_refused(content, suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    for read in READERS:
        assert "fetch it again" in refusal(read, path)


@pytest.mark.parametrize("writer", WRITERS)
def test_truncated_pickles_are_refused(writer, tmp_path):
    path = tmp_path / "x.pt"
    WRITERS[writer]({"a": torch.ones(2, 3)}, path)
    raw = path.read_bytes()
    for length in range(0, len(raw), 7):
        path.write_bytes(raw[:length])
        refusal(read_state, path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("read", [read_state, read_header, read_safetensors, read_metadata, sha256])
def test_what_is_no_file_is_refused(read, suffix, tmp_path):
    assert "is missing" in refusal(read, tmp_path / f"x{suffix}")
    (tmp_path / f"x{suffix}").mkdir()
    assert "is a folder" in refusal(read, tmp_path / f"x{suffix}")


def test_other_kinds_of_files_are_refused_by_name(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "x.txt")
    assert ".safetensors, .ckpt" in refusal(read_state, tmp_path / "x.txt")
    assert read_safetensors(tmp_path / "x.txt")["a"].tolist() == [1, 1]


FLOATING = [dtype for dtype in DTYPES.values() if dtype.is_floating_point]


@pytest.mark.parametrize("dtype", FLOATING)
def test_numbers_that_are_not_finite_are_found(dtype):
    path, limits = Path("x.pt"), torch.finfo(dtype)
    fine = {
        "extremes": torch.tensor([limits.min, limits.max, limits.tiny, 0.0], dtype=torch.float64).to(dtype),
        "one": torch.ones(()).to(dtype),
    }
    check_finite({**fine, "none": torch.zeros(0, 3).to(dtype), "whole": torch.tensor([2**62])}, path)
    for value in (math.nan, math.inf, -math.inf):
        wrong = torch.zeros(3, 5, dtype=torch.float64)
        wrong[2, 3] = value
        wrong = wrong.to(dtype)
        if wrong.float().isfinite().all():
            assert dtype == torch.float8_e4m3fn  # it has no infinity
            continue
        with pytest.raises(ValueError, match=r"^x\.pt: first holds numbers that are not finite"):
            check_finite({**fine, "first": wrong, "second": wrong}, path)


def test_a_file_is_whole_or_not_there(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "new" / "x.safetensors"
    write_safetensors({"a": torch.ones(2)}, path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with pytest.raises(Exception, match="File too large"):
            write_safetensors({"a": torch.ones(2**20)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [file.name for file in path.parent.iterdir()] == ["x.safetensors"]
    assert path.read_bytes() == before
    path.with_name("x.safetensors.partial").write_bytes(b"left by a crash")
    write_safetensors({"a": torch.zeros(2)}, path)
    assert [file.name for file in path.parent.iterdir()] == ["x.safetensors"]
    assert read_state(path)["a"].tolist() == [0, 0]


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_a_file_has_the_permissions_of_any_new_file(mask, tmp_path):
    before = os.umask(mask)
    try:
        write_safetensors({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == 0o666 & ~mask


def test_sha256_is_that_of_the_bytes(tmp_path):
    raw = os.urandom(3_000_001)
    (tmp_path / "x").write_bytes(raw)
    assert sha256(tmp_path / "x") == hashlib.sha256(raw).hexdigest()
