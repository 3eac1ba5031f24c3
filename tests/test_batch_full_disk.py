"""A disk that is full is no row's fault: the run ends in a sentence, and the next one goes on."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from animatelcm import batch, video
from animatelcm.batch import running
from batch_runs import hashes, lines, runner, six_prompts


@pytest.fixture
def prompts(tmp_path):
    return six_prompts(tmp_path)


@pytest.fixture(scope="module")
def about(fresh_model):
    return batch.about(fresh_model)


@pytest.fixture
def go(fresh_model, about, tmp_path):
    return runner(fresh_model, about, tmp_path / "out")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_stops_the_run_in_a_sentence(number, go, prompts, tmp_path, monkeypatch):
    def full(data, path, save=running._save):
        if len(hashes(tmp_path / "out")) == 2:
            raise OSError(number, os.strerror(number), str(path))
        save(data, path)

    with monkeypatch.context() as patch:
        patch.setattr(running, "_save", full)
        with pytest.raises(ValueError, match=r"the disk is full .* after 2 of 6 rows; make room"):
            go(prompts)
    assert len(lines(tmp_path / "out")) == 2
    assert go(prompts)[:3] == (4, 0, 2)


def test_a_disk_that_is_full_while_a_clip_is_encoded_is_no_rows_fault(go, prompts, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(video, "write", full)
    with pytest.raises(ValueError, match="the disk is full"):
        go(prompts)
    assert lines(tmp_path / "out") == []


@pytest.mark.parametrize("kilobytes", [16, 24, 28])
def test_a_disk_that_is_really_full(kilobytes, go, prompts, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk may be mounted here")
    try:
        with pytest.raises(ValueError, match="the disk is full"):
            go(prompts, out=disk)
        done = lines(disk)
        assert len(done) < 6
        assert {line["file"]: line["sha256"] for line in done}.items() <= hashes(disk).items()
        assert not list(disk.glob(".*"))
        assert not done or (disk / batch.MANIFEST).read_bytes().endswith(b"\n")
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        assert go(prompts, out=disk)[:3] == (6 - len(done), 0, len(done))
        go(prompts)
        assert hashes(disk) == hashes(tmp_path / "out")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
