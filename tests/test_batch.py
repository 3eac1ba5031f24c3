from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from animatelcm import batch, cli, decoding, images, video
from animatelcm.bundle import save
from animatelcm.request import ModelSource, SampleRequest
from animatelcm.sampling import drafts
from test_condition import beside, clip

SMALL = ("frames=2", "steps=1", "guidance=1")
SOURCE = ModelSource()


def _lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / batch.MANIFEST).read_text().splitlines()]


def _hashes(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("0*")}


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a parrot\na fox\n\na cat\na dog\na robot\na ghost\n")
    return path


@pytest.fixture(scope="module")
def about(fresh_model):
    return batch.about(fresh_model)


@pytest.fixture
def go(fresh_model, about, tmp_path):
    """Run the rows of a file into tmp_path/out."""

    def run(path: Path, *settings: str, seed: int = 0, out: Path = tmp_path / "out", **options) -> batch.Counts:
        rows = batch.read_rows(path, seed=seed, settings=(*SMALL, *settings))
        options = {"about": about, "engine": batch.here(fresh_model, SOURCE), "suffix": ".webp"} | options
        return batch.run(rows, out, **options)

    return run


# Rows


def test_three_formats_say_the_same(tmp_path):
    (tmp_path / "a.txt").write_text("a fox, running\r\n\n  a cat \n")
    (tmp_path / "a.csv").write_text('\ufeffprompt,steps\n"a fox, running",\na cat,\n')
    (tmp_path / "a.jsonl").write_text('{"prompt": "a fox, running"}\n\n{"prompt": "a cat", "steps": null}\n')
    rows = [batch.read_rows(tmp_path / f"a.{kind}", seed=7) for kind in ("txt", "csv", "jsonl")]
    assert rows[0] == rows[1] == rows[2]
    assert [row.request for row in rows[0]] == [
        SampleRequest(prompt="a fox, running", seed=7),
        SampleRequest(prompt="a cat", seed=8),
    ]


def test_a_row_sets_any_field_and_comes_before_what_holds_for_all(tmp_path):
    wanted = SampleRequest(
        prompt="a fox",
        num_inference_steps=3,
        guidance_scale=2.0,
        seed=9,
        sampler="ddim",
        control=("edge=a b.mp4:0.5", "pose=map:c.mp4"),
    )
    (tmp_path / "a.csv").write_text(
        "prompt,steps,guidance_scale,seed,sampler,control\n"
        "a fox,3,2,9,ddim,\"'edge=a b.mp4:0.5' pose=map:c.mp4\"\na cat,,,,,\n"
    )
    fields = {"prompt": "a fox", "num_inference_steps": 3, "guidance": 2, "seed": 9, "sampler": "ddim"}
    fields["control"] = ["edge=a b.mp4:0.5", "pose=map:c.mp4"]
    (tmp_path / "a.jsonl").write_text(json.dumps(fields) + '\n{"prompt": "a cat"}\n')
    for kind in ("csv", "jsonl"):
        first, second = batch.read_rows(tmp_path / f"a.{kind}", settings=("steps=5", "spacing=trailing"))
        assert first.request == replace(wanted, spacing="trailing")
        assert second.request == SampleRequest(prompt="a cat", num_inference_steps=5, spacing="trailing", seed=1)


@pytest.mark.parametrize(
    ("name", "text", "settings", "named"),
    [
        ("a.csv", "prompt,stpes\na fox,3\n", (), "column 'stpes' is no setting"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "a", "sede": 1}', (), "column 'sede' is no setting"),
        ("a.txt", "a fox", ("stpes=3",), "'stpes=' is not NAME=VALUE"),
        ("a.txt", "a fox", ("steps",), "'steps' is not NAME=VALUE"),
        ("a.txt", "a fox", ("steps=0",), "num_inference_steps=0"),
        ("a.txt", "a fox", ("steps=few",), "steps='few' is not a whole number"),
        ("a.txt", "\n \n", (), "holds no prompts"),
        ("a.md", "a fox", (), "no file of prompts"),
        ("a.txt", b"\xff\xfe", (), "as UTF-8 txt"),
    ],
)
def test_what_is_wrong_with_all_rows_is_a_sentence(name, text, settings, named, tmp_path):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=re.escape(named)):
        batch.read_rows(path, settings=settings)


def test_a_bad_row_is_recorded_and_stops_no_other(go, tmp_path):
    bad = [
        ('{"prompt": "a", "steps": 0}', "num_inference_steps=0"),
        ('{"prompt": "a", "steps": "four"}', "steps='four' is not a whole number"),
        ('{"prompt": "a", "steps": 1.5}', "steps=1.5 is not a whole number"),
        ('{"prompt": "a", "steps": true}', "steps=True is not a whole number"),
        ('{"prompt": "a", "steps": 1, "num_inference_steps": 2}', "are one setting"),
        ('{"prompt": 3}', "prompt=3 is not text"),
        ('{"prompt": "a", "control": "nonsense"}', "'nonsense' is not KIND=FILE"),
        ('{"prompt": "a", "width": 60}', "width=60 is not a multiple"),
        ('{"prompt": "a", "n": 2}', "a row is one video"),
        ('{"prompt": "a", "image": "nowhere.png"}', "image encoder (i2v) is needed"),
        ('{"prompt": ""}', "no prompt"),
        ("{}", "no prompt"),
        ("[1]", "no JSON object"),
        ('{"prompt": "a"', "no JSON object"),
    ]
    good = '{"prompt": "a fox"}'
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([good, *(line for line, _ in bad), good]))
    counts = go(path)
    assert (counts.made, counts.failed, counts.done_before) == (2, len(bad), 0)
    lines = _lines(tmp_path / "out")
    errors = {line["row"]: line["error"] for line in lines if "error" in line}
    assert sorted(errors) == list(range(1, len(bad) + 1))
    for number, (_, named) in enumerate(bad, 1):
        assert named in errors[number], number
    assert sorted(_hashes(tmp_path / "out")) == ["000000.webp", f"{len(bad) + 1:06}.webp"]
    again = go(path)
    assert (again.made, again.failed, again.done_before) == (0, len(bad), 2)
    assert _lines(tmp_path / "out") == lines  # nothing new is to be said
    (tmp_path / "b.csv").write_text("prompt,steps\na fox, running,1\na cat,1\n")
    assert go(tmp_path / "b.csv", out=tmp_path / "b").failed == 1


# What is made


def test_each_row_is_what_generate_makes_of_it(go, prompts, fresh_model, tmp_path):
    assert go(prompts, seed=40).made == 6
    request = SampleRequest(prompt="a dog", num_frames=2, num_inference_steps=1, guidance_scale=1.0, seed=43)
    (draft,) = drafts(fresh_model, request)
    decoding.write(fresh_model, draft, tmp_path / "one.webp", source=SOURCE)
    assert (tmp_path / "out" / "000003.webp").read_bytes() == (tmp_path / "one.webp").read_bytes()
    line = {line["row"]: line for line in _lines(tmp_path / "out")}[3]
    assert line["prompt"] == "a dog"
    assert line["seed"] == line["settings"]["seed"] == 43
    assert line["settings"]["height"] == 64
    assert line["sha256"] == _hashes(tmp_path / "out")["000003.webp"]
    assert line["seconds"].keys() == {"denoise", "decode"}
    assert line["host"].endswith(f":{os.getpid()}")
    assert len({line["hash"] for line in _lines(tmp_path / "out")}) == 6


def test_order_does_not_matter(go, prompts, fresh_model, tmp_path):
    def backwards(rows, suffix, done):
        batch.here(fresh_model, SOURCE)(rows[::-1], suffix, done)

    go(prompts)
    go(prompts, engine=backwards, out=tmp_path / "other")
    assert [line["row"] for line in _lines(tmp_path / "other")] == [5, 4, 3, 2, 1, 0]
    assert _hashes(tmp_path / "other") == _hashes(tmp_path / "out")


def test_a_long_clip_goes_to_its_encoder_in_chunks(go, tmp_path):
    (tmp_path / "a.txt").write_text("a fox")
    assert go(tmp_path / "a.txt", "frames=70", suffix=".mp4").made == 1
    assert video.probe(tmp_path / "out" / "000000.mp4").num_frames == 70


@pytest.mark.parametrize("where", ["decoder", "encoder"])
def test_what_fails_between_decoder_and_encoder_fails_one_row(where, go, prompts, tmp_path, monkeypatch):
    def frames(model, draft):
        for i in range(20):
            if where == "decoder" and draft.request.seed == 2 and i == 7:
                raise RuntimeError("no frame")
            yield np.zeros((1, 8, 8, 3), np.uint8)

    def write(chunks, path, **options):
        if where == "encoder" and options["metadata"]["seed"] == "2":
            next(chunks)
            raise ValueError("no file")
        for _ in chunks:
            pass
        path.write_bytes(b"video")

    monkeypatch.setattr(decoding, "frames", frames)
    monkeypatch.setattr(video, "write", write)
    counts = go(prompts)
    assert (counts.made, counts.failed) == (5, 1)
    (error,) = [line["error"] for line in _lines(tmp_path / "out") if "error" in line]
    assert error == {"decoder": "RuntimeError: no frame", "encoder": "no file"}[where]


def test_the_fingerprint_is_of_every_weight(fresh_model, about):
    assert batch.about(fresh_model) == about
    with torch.no_grad():
        for network in fresh_model.networks.values():
            weight = next(network.parameters())
            first = (0,) * weight.ndim
            before = weight[first].item()
            weight[first] = before + 1
            assert batch.about(fresh_model).fingerprint != about.fingerprint
            weight[first] = before
    assert batch.about(fresh_model) == about
    other = replace(fresh_model, schedule=replace(fresh_model.schedule, beta_start=1e-3))
    assert batch.about(other).fingerprint != about.fingerprint
    half = replace(fresh_model, vae=type(fresh_model.vae)(fresh_model.vae.config).bfloat16())
    assert batch.about(half).fingerprint != about.fingerprint


# Once more


def test_a_second_run_makes_what_is_missing_or_has_changed(go, prompts, about, tmp_path):
    out = tmp_path / "out"
    assert go(prompts).made == 6
    first, stamp = _hashes(out), (out / "000000.webp").stat().st_mtime_ns
    assert go(prompts)[:3] == (0, 0, 6)
    prompts.write_text(prompts.read_text().replace("a cat", "a tree") + "a bird\n")  # one other, one more
    assert go(prompts)[:3] == (2, 0, 5)
    (out / "000001.webp").unlink()
    (out / "000004.webp").write_bytes(b"half a vid")
    assert go(prompts)[:3] == (2, 0, 5)
    second = _hashes(out)
    assert (out / "000000.webp").stat().st_mtime_ns == stamp
    assert {name for name in second if second[name] != first.get(name)} == {"000002.webp", "000006.webp"}
    assert go(prompts, "steps=2")[:3] == (7, 0, 0)
    assert go(prompts, "steps=2", seed=1)[:3] == (7, 0, 0)
    assert go(prompts, "steps=2", seed=1, about=about._replace(fingerprint="other"))[:3] == (7, 0, 0)


def test_a_row_is_made_again_where_what_steers_it_has_changed(fresh_model, tmp_path):
    model, picture, path = beside(fresh_model), tmp_path / "a.png", tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "a fox", "image": str(picture)}) + '\n{"prompt": "a cat"}\n')
    for number, wanted in ((0, (2, 0, 0)), (0, (0, 0, 2)), (1, (1, 0, 1))):
        images.write_image(clip(2, 64, 64)[number], picture, overwrite=True)
        rows = batch.read_rows(path, settings=SMALL)
        assert batch.run(rows, tmp_path / "out", batch.about(model), batch.here(model, SOURCE))[:3] == wanted


@pytest.mark.parametrize("torn", [b'{"row": 5, "file": "00', b"\xff\xfe", b"[]\n{}\nnull\n{"])
def test_a_torn_manifest_loses_its_last_line_alone(torn, go, prompts, tmp_path):
    go(prompts)
    manifest = tmp_path / "out" / batch.MANIFEST
    lines = manifest.read_bytes().splitlines(keepends=True)
    manifest.write_bytes(b"".join(lines[:-1]) + torn)
    (tmp_path / "out" / ".000005.webp.0123abcd.new").write_bytes(b"half")
    assert go(prompts)[:3] == (1, 0, 5)
    assert manifest.read_bytes().splitlines()[-1].startswith(b'{"row": 5, ')
    assert not list((tmp_path / "out").glob(".*"))


def test_a_killed_run_loses_at_most_what_was_in_flight(tmp_path):
    out, words = tmp_path / "out", [sys.executable, "-m", "animatelcm", "batch", str(tmp_path / "a.txt")]
    (tmp_path / "a.txt").write_text("a parrot\n" * 12)
    words += ["--settings", "frames=2", "steps=2", "--ext", "webp", "--out", str(out)]
    running = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    while running.poll() is None and not (out / "000002.webp").exists():
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    whole = (out / batch.MANIFEST).read_bytes().rpartition(b"\n")[0].splitlines()
    kept, there = [json.loads(line) for line in whole], _hashes(out)
    assert 2 <= len(kept) < 12
    assert len(there) - len(kept) <= 2
    assert all(there[line["file"]] == line["sha256"] for line in kept)
    said = json.loads(subprocess.run([*words, "--json"], capture_output=True, check=True).stdout)
    assert (said["made"], said["failed"], said["done_before"]) == (12 - len(kept), 0, len(kept))
    assert _hashes(out).keys() == {f"{i:06}.webp" for i in range(12)}
    assert there.items() <= _hashes(out).items()
    assert sorted(line["row"] for line in _lines(out)) == list(range(12))


def test_one_run_a_folder_and_nobody_elses_videos(go, prompts, about, tmp_path):
    def nested(rows, suffix, done):
        with pytest.raises(ValueError, match="another run works on"):
            go(prompts)

    go(prompts, engine=nested)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "000003.webp").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"holds 000003\.webp and no manifest"):
        go(prompts, out=tmp_path / "mine")
    assert (tmp_path / "mine" / "000003.webp").read_bytes() == b"precious"
    assert go(prompts, out=tmp_path / "mine", force=True).made == 6


# A full disk


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_stops_the_run_in_a_sentence(number, go, prompts, tmp_path, monkeypatch):
    def full(data, path, save=batch._save):
        if len(_hashes(tmp_path / "out")) == 2:
            raise OSError(number, os.strerror(number), str(path))
        save(data, path)

    with monkeypatch.context() as patch:
        patch.setattr(batch, "_save", full)
        with pytest.raises(ValueError, match=r"the disk is full .* after 2 of 6 rows; make room"):
            go(prompts)
    assert len(_lines(tmp_path / "out")) == 2
    assert go(prompts)[:3] == (4, 0, 2)


def test_a_disk_that_is_full_while_a_clip_is_encoded_is_no_rows_fault(go, prompts, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(video, "write", full)
    with pytest.raises(ValueError, match="the disk is full"):
        go(prompts)
    assert _lines(tmp_path / "out") == []


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
        done = _lines(disk)
        assert len(done) < 6
        assert {line["file"]: line["sha256"] for line in done}.items() <= _hashes(disk).items()
        assert not list(disk.glob(".*"))
        assert not done or (disk / batch.MANIFEST).read_bytes().endswith(b"\n")
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        assert go(prompts, out=disk)[:3] == (6 - len(done), 0, len(done))
        go(prompts)
        assert _hashes(disk) == _hashes(tmp_path / "out")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# The command line


def test_the_verb_counts_and_ends_with_status_1_where_a_row_failed(fresh_model, tmp_path, capsys):
    save(fresh_model, tmp_path / "model", dtype=torch.float32)
    (tmp_path / "a.csv").write_text("prompt,steps\na fox,1\na cat,0\n")
    words = ["batch", str(tmp_path / "a.csv"), "--model", str(tmp_path / "model"), "--settings", "frames=2"]
    words += ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 1
    shown = capsys.readouterr()
    assert "out: 1 made in" in shown.out
    assert "0 done before, 1 failed" in shown.out
    assert "row 1: num_inference_steps=0 is out of range" in shown.err
    (tmp_path / "a.csv").write_text("prompt,steps\na fox,1\na cat,1\n")
    cli.main([*words, "--json", "--seed", "0"])
    said = json.loads(capsys.readouterr().out)
    assert (said["made"], said["failed"], said["done_before"]) == (1, 0, 1)
    assert video.read_metadata(tmp_path / "out" / "000001.mp4")["prompt"] == "a cat"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["nowhere.txt"], "nowhere.txt"),
        (["a.txt", "--model", "nothing-here"], "nothing-here"),
        (["a.txt", "--actors", "0", "--engine", "ray"], "actors=0"),
        (["a.txt", "--engine", "spark"], "spark"),
    ],
)
def test_the_verb_refuses_in_a_sentence(words, named, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a fox")
    with pytest.raises(SystemExit) as caught:
        cli.main(["batch", *words, "--out", "out"])
    assert caught.value.code == 2
    assert named in capsys.readouterr().err
    assert not Path("out").exists()
