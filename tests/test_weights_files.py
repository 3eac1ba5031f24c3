"""Weight files of any kind: what is none is refused by name; what is written is whole or not there."""

from __future__ import annotations

import hashlib
import math
import os
import random
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from animatelcm.weights.files import (
    DTYPES,
    check_finite,
    read_header,
    read_metadata,
    read_safetensors,
    read_state,
    sha256,
    write_safetensors,
)
from weight_files import READERS, SUFFIXES, refusal

NOISE = random.Random(0).randbytes(5000)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("content", [b"", b"P", b"PK\3\4", b"\x80\x02", NOISE[:7], NOISE, b"\0" * 5000])
def test_files_of_no_weights_are_refused(content, suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    for read in READERS:
        assert "fetch it again" in refusal(read, path)


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
