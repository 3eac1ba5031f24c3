"""Pickles from strangers: weights are read as torch reads them, nothing is run, all others are a ValueError."""

from __future__ import annotations

import contextlib
import pickle
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from animatelcm.weights.files import (
    TensorInfo,
    read_header,
    read_metadata,
    read_safetensors,
    read_state,
)
from weight_files import FUZZ, PICKLES, SUFFIXES, everything, filled, memory, outcome, refusal, same


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


@pytest.mark.parametrize("writer", WRITERS)
def test_truncated_pickles_are_refused(writer, tmp_path):
    path = tmp_path / "x.pt"
    WRITERS[writer]({"a": torch.ones(2, 3)}, path)
    raw = path.read_bytes()
    for length in range(0, len(raw), 7):
        path.write_bytes(raw[:length])
        refusal(read_state, path)
