"""Videos of a batch: each row is what ``generate`` makes of it, made once, and no run loses more than is in flight."""

from __future__ import annotations

import json
import os
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
from animatelcm.request import SampleRequest
from animatelcm.sampling import drafts
from animatelcm.saving import save
from batch_runs import SMALL, SOURCE, hashes, lines, runner, six_prompts
from test_condition import beside, clip


@pytest.fixture
def prompts(tmp_path):
    return six_prompts(tmp_path)


@pytest.fixture(scope="module")
def about(fresh_model):
    return batch.about(fresh_model)


@pytest.fixture
def go(fresh_model, about, tmp_path):
    return runner(fresh_model, about, tmp_path / "out")


# What is made


def test_each_row_is_what_generate_makes_of_it(go, prompts, fresh_model, tmp_path):
    assert go(prompts, seed=40).made == 6
    request = SampleRequest(prompt="a dog", num_frames=2, num_inference_steps=1, guidance_scale=1.0, seed=43)
    (draft,) = drafts(fresh_model, request)
    decoding.write(fresh_model, draft, tmp_path / "one.webp", source=SOURCE)
    assert (tmp_path / "out" / "000003.webp").read_bytes() == (tmp_path / "one.webp").read_bytes()
    line = {line["row"]: line for line in lines(tmp_path / "out")}[3]
    assert line["prompt"] == "a dog"
    assert line["seed"] == line["settings"]["seed"] == 43
    assert line["settings"]["height"] == 64
    assert line["sha256"] == hashes(tmp_path / "out")["000003.webp"]
    assert line["seconds"].keys() == {"denoise", "decode"}
    assert line["host"].endswith(f":{os.getpid()}")
    assert len({line["hash"] for line in lines(tmp_path / "out")}) == 6


def test_order_does_not_matter(go, prompts, fresh_model, tmp_path):
    def backwards(rows, suffix, done):
        batch.here(fresh_model, SOURCE)(rows[::-1], suffix, done)

    go(prompts)
    go(prompts, engine=backwards, out=tmp_path / "other")
    assert [line["row"] for line in lines(tmp_path / "other")] == [5, 4, 3, 2, 1, 0]
    assert hashes(tmp_path / "other") == hashes(tmp_path / "out")


def test_a_long_clip_goes_to_its_encoder_in_chunks(go, tmp_path):
    (tmp_path / "a.txt").write_text("a fox")
    assert go(tmp_path / "a.txt", "frames=70", suffix=".mp4").made == 1
    assert video.probe(tmp_path / "out" / "000000.mp4").num_frames == 70


@pytest.mark.parametrize("where", ["decoder", "encoder"])
def test_what_fails_between_decoder_and_encoder_fails_one_row(where, go, prompts, fresh_model, tmp_path):
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

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "frames", frames)
        patch.setattr(video, "write", write)
        counts = go(prompts)
    assert (counts.made, counts.failed) == (5, 1)
    (error,) = [line["error"] for line in lines(tmp_path / "out") if "error" in line]
    latents = tmp_path / "out" / "000002.latents.safetensors"
    assert error.startswith({"decoder": "RuntimeError: no frame; ", "encoder": "no file; "}[where])
    goes_on = f"animatelcm decode {latents} --model emoji --out {latents.with_name('000002.webp')}"
    assert error.endswith(f"its latents are in {latents}; this goes on from there: {goes_on}")

    (draft,) = drafts(fresh_model, batch.read_rows(prompts, settings=SMALL)[2].request)
    kept = decoding.load(latents, fresh_model)
    assert torch.equal(kept.latents, draft.latents)
    assert kept.request == draft.request
    assert go(prompts).made == 1
    assert not latents.exists()


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
    first, stamp = hashes(out), (out / "000000.webp").stat().st_mtime_ns
    assert go(prompts)[:3] == (0, 0, 6)
    prompts.write_text(prompts.read_text().replace("a cat", "a tree") + "a bird\n")  # one other, one more
    assert go(prompts)[:3] == (2, 0, 5)
    (out / "000001.webp").unlink()
    (out / "000004.webp").write_bytes(b"half a vid")
    assert go(prompts)[:3] == (2, 0, 5)
    second = hashes(out)
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
    whole = manifest.read_bytes().splitlines(keepends=True)
    manifest.write_bytes(b"".join(whole[:-1]) + torn)
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
    kept, there = [json.loads(line) for line in whole], hashes(out)
    assert 2 <= len(kept) < 12
    assert len(there) - len(kept) <= 2
    assert all(there[line["file"]] == line["sha256"] for line in kept)
    said = json.loads(subprocess.run([*words, "--json"], capture_output=True, check=True).stdout)
    assert (said["made"], said["failed"], said["done_before"]) == (12 - len(kept), 0, len(kept))
    assert hashes(out).keys() == {f"{i:06}.webp" for i in range(12)}
    assert there.items() <= hashes(out).items()
    assert sorted(line["row"] for line in lines(out)) == list(range(12))


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
