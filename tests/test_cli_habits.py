"""The command line as users of other tools know it: seeds that are drawn, pictures, names that are free, warnings."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from animatelcm import cli, video
from animatelcm.request import SampleRequest
from animatelcm.saving import save
from animatelcm.terminal import step_bar
from animatelcm.verbs import _free
from test_cli import fails


@pytest.fixture(scope="module")
def folder(fresh_folder):
    return str(fresh_folder)


@pytest.fixture
def go(folder, tmp_path, monkeypatch):
    """Runs ``generate`` in an empty folder, a step of two frames where nothing else is said."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> None:
        cli.main(["generate", "--model", folder, "--steps", "1", "--frames", "2", *words])

    return run


def _again(path: str) -> str:
    """Runs the command in a file; what it made."""
    other = "again" + Path(path).suffix
    words = shlex.split(video.read_metadata(path)["command"])[1:]
    dashes = words.index("--") if "--" in words else len(words)
    cli.main([*words[:dashes], "--out", other, *words[dashes:]])
    return other


def test_a_seed_is_drawn_told_and_kept(go, capsys):
    seeds = []
    for name in ("a.webp", "b.webp"):
        go("a fox", "--seed", "-1", "--out", name, "--json")
        seeds.append(json.loads(capsys.readouterr().out)["seed"])
        assert video.read_metadata(name)["seed"] == str(seeds[-1])
    assert seeds[0] != seeds[1]
    assert (video.read("a.webp").frames == video.read(_again("a.webp")).frames).all()


def test_one_frame_is_a_picture_that_says_how_it_was_made(go, capsys):
    go("a fox", "--frames", "1", "--out", "x.png")
    go("a fox", "--frames", "1", "--out", "x.jpg")
    capsys.readouterr()
    cli.main(["inspect", "x.jpg", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert (shown["kind"], shown["frames"], shown["prompt"]) == ("picture", 1, "a fox")
    assert (video.read_image("x.png") == video.read_image(_again("x.png"))).all()
    assert "cannot write 2 frames as 'y.png'" in fails(["generate", "a", "--frames", "2", "--out", "y.png"], capsys)


def test_a_picture_of_a_model_of_videos_is_refused_where_no_length_was_asked_for(folder, tmp_path, capsys):
    words = ["generate", "a fox", "--model", folder, "--steps", "1", "--out", str(tmp_path / "x.png")]
    assert "cannot write 16 frames as 'x.png': ask for one frame" in fails(words, capsys)
    assert not list(tmp_path.iterdir())


def test_a_name_that_nobody_chose_is_one_that_is_free(go, tmp_path, folder, capsys):
    for _ in range(2):
        go("a fox")
    assert {path.name for path in tmp_path.iterdir()} == {"fox.mp4", "fox-2.mp4"}
    assert "--force" in fails(["generate", "a fox", "--model", folder, "--out", "fox.mp4"], capsys)


def test_names_are_free_all_together(tmp_path, monkeypatch):
    def names(*, force: bool = False, **fields) -> list[str]:
        return [path.name for path in _free(SampleRequest(prompt="a fox", **fields), force=force)]

    monkeypatch.chdir(tmp_path)
    assert names() == ["fox.mp4"]
    assert names(num_frames=1) == ["fox.png"]
    assert names(num_videos_per_prompt=2) == ["fox-0.mp4", "fox-1.mp4"]
    for name in ("fox.mp4", "fox-2.mp4", "fox-1.mp4", "fox-2-0.mp4"):
        (tmp_path / name).touch()
    assert names() == ["fox-3.mp4"]
    assert names(num_frames=1) == ["fox.png"]
    assert names(num_videos_per_prompt=2) == ["fox-3-0.mp4", "fox-3-1.mp4"]
    assert names(force=True) == ["fox.mp4"]


def test_names_have_a_length_that_disks_take(go, tmp_path, capsys):
    go("\U0001d49c" * 80)
    (made,) = tmp_path.iterdir()
    assert made.suffix == ".mp4"
    assert 100 < len(made.name.encode()) < video.LONGEST_NAME
    message = fails(["generate", "a", "--model", "nothing-here", "--out", "a" * 210 + ".mp4"], capsys)
    assert "has 214 bytes" in message  # before the model is asked for


def test_what_changes_nothing_is_said(go, capsys):
    go("a fox", "--guidance", "1", "--negative", "a cat", "--strength", "0.3", "--out", "a.webp", "--json")
    shown = capsys.readouterr()
    said = json.loads(shown.out)["warnings"]
    assert [text.split()[0] for text in said] == ["negative_prompt", "strength"]
    assert [line for line in shown.err.splitlines() if "changes nothing" in line] == said
    go("a fox", "--guidance", "2", "--negative", "a cat", "--out", "b.webp", "--json")
    assert json.loads(capsys.readouterr().out)["warnings"] == []


def test_a_file_has_the_speed_that_was_asked_for(go, capsys):
    go("a fox", "--fps", "12.5", "--out", "a.webp")
    go("a fox", "--out", "b.webp")
    assert [float(video.probe(name).fps) for name in ("a.webp", "b.webp")] == [12.5, 8]
    assert (video.read("a.webp").frames == video.read("b.webp").frames).all()
    assert video.probe(_again("a.webp")) == video.probe("a.webp")
    capsys.readouterr()
    cli.main(["inspect", "a.webp", "--json"])
    assert json.loads(capsys.readouterr().out)["fps"] == 12.5


def test_a_control_is_taken_at_the_speed_of_the_file(go, capsys):
    go("a fox", "--frames", "6", "--fps", "12", "--out", "a.webp")
    capsys.readouterr()
    go("a fox", "--fps", "4", "--video", "a.webp", "--out", "b.webp")
    assert "a.webp: frames 0 to 3 of 6 (every 3rd, 4 fps)" in capsys.readouterr().err


def test_a_models_own_speed_is_refused_before_anything_is_sampled(fresh_model, tmp_path, monkeypatch, capsys):
    save(replace(fresh_model, facts=replace(fresh_model.facts, fps=60.0)), tmp_path / "model")
    monkeypatch.setattr("animatelcm.sampling.drafts", lambda *_, **__: pytest.fail("it was sampled"))
    words = ["generate", "a", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "x.gif")]
    assert "fps=60.0, but .gif takes 0 < fps <= 50" in fails(words, capsys)


def test_a_prompt_is_shown_as_it_is(monkeypatch, capsys):
    """Rich's marks in it are letters."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    request = SampleRequest(prompt="a [/b] [red]dog", num_inference_steps=4)
    with step_bar(request, quiet=False):
        pass
    assert "a [/b] [red]dog" in capsys.readouterr().err


def test_a_prompt_may_begin_as_flags_do(go):
    go("--seed", "3", "--out", "a.webp", "--", "-fox")
    assert video.read_metadata("a.webp")["prompt"] == "-fox"
    assert (video.read(_again("a.webp")).frames == video.read("a.webp").frames).all()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_numbers_that_were_computed_with_are_in_the_recipe(go, precision, capsys):
    go("a fox", "--precision", precision, "--out", "a.webp", "--json")
    assert json.loads(capsys.readouterr().out)["precision"] == precision
    said = video.read_metadata("a.webp")
    assert said["precision"] == precision
    assert f"--precision {precision}" in said["command"]
    assert (video.read(_again("a.webp")).frames == video.read("a.webp").frames).all()


def test_home_is_where_a_tilde_points_behind_a_name_too(go, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    go("a fox", "--out", "~/a.webp")
    go("a fox", "--video", "~/a.webp", "--out", "~/b.webp")
    cli.main(["convert", "emoji", "~/motion.safetensors", "--to", "animatediff"])
    cli.main(["fuse", "--model", folder, "--out=~/sum"])
    assert {path.name for path in tmp_path.iterdir()} == {"a.webp", "b.webp", "motion.safetensors", "sum"}
    assert f"{tmp_path}/sum exists" in fails(["convert", "emoji", "~/sum", "--to", "bundle"], capsys)
    for words in (["--lora", "~/c.safetensors:0.5"], ["--adapter", "edge=~/c.safetensors"], ["--motion", "~/c.ckpt"]):
        message = fails(["generate", "a", *words, "--out", "c.webp"], capsys)
        assert f"{tmp_path}/c." in message
        assert "no such file" in message


def test_home_is_where_a_tilde_points_in_training_and_evaluation(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    cli.main(["train", "vae_emoji", "--out=~/runs", "--data.kind", "folder", "--data.path", "~/images", "--dry-run"])
    config = json.loads(capsys.readouterr().out)
    assert (config["out"], config["data"]["path"]) == (f"{tmp_path}/runs", f"{tmp_path}/images")
    assert f"{tmp_path}/none.mp4" in fails(["eval", "stability", "~/none.mp4"], capsys)
    cli.main(["train", "vae_emoji", "--name=a~b", "--dry-run"])
    assert json.loads(capsys.readouterr().out)["name"] == "a~b"


def test_a_batch_takes_what_generate_takes(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("a.csv").write_text("prompt,size,negative\na fox,32x64,a cat\na cat,,\n")
    words = ["batch", "~/a.csv", "--model", folder, "--out", "~/out", "--settings", "frames=1", "steps=1", "guidance=1"]
    cli.main([*words, "--offload", "model", "--compile", "none", "--ext", "webp"])
    assert "negative_prompt changes nothing: guidance_scale is 1 (off); ask for more, such as 2 (1 of 2 rows)" in (
        capsys.readouterr().err.splitlines()
    )
    sizes = [video.read(tmp_path / "out" / f"00000{row}.webp").frames.shape[1:3] for row in range(2)]
    assert sizes == [(64, 32), (64, 64)]
    assert video.read_metadata(tmp_path / "out" / "000000.webp")["precision"] == "fp32"


@pytest.mark.parametrize("where", ["here", "actor"])
def test_a_batch_hands_offload_and_compile_on(where, folder, tmp_path, monkeypatch):
    from animatelcm import cluster
    from animatelcm.batch import engine, read_rows
    from animatelcm.model_source import ModelSource

    def seen(model, request, **options):
        asked.append((model.compile, options["offload"]))
        return made(model, request, **options)

    made, asked = engine.drafts, []
    monkeypatch.setattr(engine, "drafts", seen)
    (tmp_path / "a.txt").write_text("a fox")
    small = ["frames=1", "steps=1"]
    if where == "here":
        words = ["batch", str(tmp_path / "a.txt"), "--model", folder, "--out", str(tmp_path / "out"), "--settings"]
        cli.main([*words, *small, "--offload", "model", "--compile", "none"])
    else:
        worker = cluster.Worker(ModelSource(model=folder), str(tmp_path), "cpu", "fp32", (), "model", "none")
        about = worker.about()
        (row,) = read_rows(tmp_path / "a.txt", settings=small)
        assert row.request
        worker.make(row._replace(request=row.request.resolved(about.facts, about.cell)), ".webp")
    assert asked == [("none", "model")]
