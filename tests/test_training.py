from __future__ import annotations

import json
import signal
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from animatelcm import recipes
from animatelcm.config import DataConfig
from animatelcm.data.sprites import PACK
from animatelcm.sources import open_dataset, open_source
from animatelcm.stages import named_trainable
from animatelcm.training import learning_rate, train


def _tiny(recipe, out, **changes):
    data = {"length": 8} | changes.pop("data", {})
    base = replace(recipe(), model="new", out=out, batch_size=2, save_every=1000, sample_prompts=(), log_every=5)
    return replace(base, data=replace(base.data, **data), **changes)


def _run(config, **options):
    train(config, **options)
    (last,) = sorted((config.folder / "checkpoints").iterdir())[-1:]
    return {name: load_file(last / f"{name}.safetensors") for name in ("weights", "ema", "optimizer")}


def _equal(one, two):
    return all(one[p].keys() == two[p].keys() and all(torch.equal(one[p][k], two[p][k]) for k in one[p]) for p in one)


@pytest.mark.parametrize(("recipe", "count"), [(recipes.base_emoji, 1), (recipes.vae_emoji, 2)])
def test_five_steps_are_two_and_three_bit_for_bit(recipe, count, tmp_path):
    """Two times and a bit through the data, stopped on the way through it; also where a step takes two batches."""
    config = _tiny(recipe, tmp_path / "whole", steps=5, gradient_accumulation_steps=count, data={"length": 4 * count})
    whole = _run(config)
    parts = replace(config, out=tmp_path / "parts")
    first = _run(parts, stop_after=2)
    assert _equal(_run(parts, resume=True), whole)
    assert not _equal(first, whole)
    assert not _equal(_run(replace(config, out=tmp_path / "other", seed=1), stop_after=2), first)


def test_a_step_of_several_batches_has_the_mean_of_their_gradients(tmp_path):
    """The gradients g of two steps that leave the weights as they are show in Adam's first moment, m = 0.1 g_0 at first
    and 0.1 (0.9 g_0 + g_1) then; one step of both batches has m = 0.1 (g_0 + g_1) / 2."""
    still = {"learning_rate": 1e-30, "weight_decay": 0.0, "max_grad_norm": 1e9}
    one, two, both = (
        _run(_tiny(recipes.base_emoji, tmp_path / name, steps=steps, gradient_accumulation_steps=count, **still))
        for name, steps, count in (("one", 1, 1), ("two", 2, 1), ("both", 1, 2))
    )
    assert all(torch.allclose(one["weights"][name], value, atol=1e-20) for name, value in two["weights"].items())
    moments = [name for name in both["optimizer"] if name.endswith("exp_avg")]
    assert any(both["optimizer"][name].abs().max() > 0 for name in moments)
    for name in moments:
        first, second, mean = (run["optimizer"][name].double() for run in (one, two, both))
        wanted = (second + 0.1 * first) / 2
        assert (mean - wanted).norm() <= 1e-5 * wanted.norm() + 1e-12
    done = json.loads((tmp_path / "both" / "base_emoji" / "model" / "animatelcm.json").read_text())
    assert done["trained"]["base_emoji"]["clips"] == 4


def test_an_interrupt_leaves_a_checkpoint(tmp_path, monkeypatch):
    config, before = _tiny(recipes.base_emoji, tmp_path, steps=30), signal.getsignal(signal.SIGINT)
    from animatelcm import training

    ordinary = training._after_step

    def interrupting(*arguments):
        ordinary(*arguments)
        if arguments[2].step == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(training, "_after_step", interrupting)
    train(config)
    (saved,) = (config.folder / "checkpoints").iterdir()
    assert json.loads((saved / "manifest.json").read_text())["step"] == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_only_what_a_recipe_names_is_trained(tmp_path):
    base, teacher = tmp_path / "base", tmp_path / "teacher"
    config = _tiny(recipes.base_emoji, base, steps=1)
    train(config)
    motion = _tiny(recipes.teacher_emoji, teacher, steps=1, data={"length": 2})
    motion = replace(motion, model=str(config.folder / "model"))
    train(motion)
    from animatelcm.bundle import load

    before, after = load(config.folder / "model"), load(motion.folder / "model")
    for part in ("vae", "text_encoder", "unet"):
        old, new = before.networks[part].state_dict(), after.networks[part].state_dict()
        assert all(torch.equal(old[key], new[key]) for key in old)
    assert any(
        value.abs().max() > 0
        for key, value in after.unet.state_dict().items()
        if "motion_modules" in key and "proj_out" in key and "transformer" not in key
    )
    assert set(after.facts.trained) == {"base_emoji", "teacher_emoji"}


def test_trainable_parts_do_not_overlap_and_cover_everything(fresh_model):
    parts = [
        {name for name, _ in named_trainable(fresh_model, recipe())}
        for recipe in (recipes.vae_emoji, recipes.base_emoji, recipes.teacher_emoji)
    ]
    everything = {f"{part}.{name}" for part, net in fresh_model.networks.items() for name, _ in net.named_parameters()}
    assert sum(map(len, parts)) == len(everything)
    assert set.union(*parts) == everything


def test_a_decoder_that_trains_alone_reads_the_same_latents(fresh_model, tmp_path):
    config = _tiny(recipes.vae_decoder_emoji, tmp_path, steps=2, learning_rate=1e-2, seed=1)
    train(config)
    from animatelcm.bundle import load

    model, start = load(config.folder / "model"), fresh_model.vae
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        mean, begun = model.vae.encode(pixels).mean, start.encode(pixels).mean
        torch.testing.assert_close(mean, begun, atol=5e-3, rtol=0)  # but for float16
        assert (model.vae.decode(begun) - start.decode(begun)).abs().mean() > 0.05


def test_the_rate_warms_up_and_comes_down():
    config = replace(recipes.base_emoji(), steps=1000, warmup_steps=100, learning_rate=1.0, lr_schedule="onecycle")
    rates = [learning_rate(config, step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[99] == pytest.approx(1.0)
    assert rates.index(max(rates)) in (99, 100)
    assert rates[999] == pytest.approx(0.01, abs=1e-4)
    assert all(a >= b for a, b in pairwise(rates[100:]))


def test_a_run_is_not_started_over_by_accident(tmp_path):
    config = _tiny(recipes.base_emoji, tmp_path, steps=1)
    train(config)
    with pytest.raises(ValueError, match="resume"):
        train(config)


def test_cached_latents_are_those_of_the_pixels(fresh_model, tmp_path):
    config = _tiny(recipes.base_emoji, tmp_path)
    cached = open_source(config, fresh_model).batches([3, 1])
    fresh = open_source(replace(config, data=replace(config.data, cache=False)), fresh_model).batches([3, 1])
    assert cached.captions == fresh.captions
    with torch.no_grad():
        wanted = fresh_model.encode(fresh.pixels)
    assert torch.allclose(cached.latents, wanted, atol=2e-3 * wanted.abs().max().item())  # kept in fp16
    (made,) = (tmp_path / "cache").iterdir()
    stamp = made.stat().st_mtime_ns
    open_source(config, fresh_model)
    assert made.stat().st_mtime_ns == stamp
    open_source(replace(config, data=DataConfig(length=8, seed=9)), fresh_model)
    assert len(list((tmp_path / "cache").iterdir())) == 2  # other data, other file


def test_a_style_may_be_a_sheet_of_ones_own(tmp_path):
    mine = tmp_path / "mine.webp"
    mine.write_bytes((PACK / "twemoji.webp").read_bytes())
    clip, twin = (open_dataset(DataConfig(length=5, styles=(style,)))[3] for style in (str(mine), "twemoji"))
    assert clip.caption == twin.caption
    assert (clip.frames == twin.frames).all()


def test_lines_of_the_log_are_means_of_the_steps_since_the_last(tmp_path):
    each, third = (
        _tiny(recipes.base_emoji, tmp_path / str(every), steps=6, log_every=every, learning_rate=1e-4)
        for every in (1, 3)
    )
    lines = []
    for config in (each, third):
        train(config)
        lines.append([json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()])
    single, means = lines
    assert [line["step"] for line in means] == [3, 6]
    for name in ("loss", "mse", "words", "grad_norm"):
        values = [line[name] for line in single]
        assert [line[name] for line in means] == pytest.approx([sum(values[:3]) / 3, sum(values[3:]) / 3], rel=1e-5)
        assert len(set(values)) == 6


@pytest.mark.parametrize("recipe", [recipes.base_emoji, recipes.image_lcm_emoji])
def test_no_step_waits_for_a_number_from_the_device(recipe, tmp_path, monkeypatch):
    """None is read between lines of the log; each of those reads its figures."""
    asked = []

    class Asked(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
                asked.append(func)
            return func(*args, **(kwargs or {}))

    from animatelcm import training

    step, update = training.gradients, training.update

    def watched(call):
        def inner(*arguments):
            with Asked():
                return call(*arguments)

        return inner

    monkeypatch.setattr(training, "gradients", watched(step))
    monkeypatch.setattr(training, "update", watched(update))
    train(replace(_tiny(recipe, tmp_path, steps=3), model="new" if recipe is recipes.base_emoji else "emoji"))
    assert not asked
    with Asked():
        torch.ones(1).item()
    assert asked


def test_samples_on_the_way_record_no_graphs(fresh_model, tmp_path, monkeypatch):
    from animatelcm import training

    calls, ordinary = [], training.sample
    monkeypatch.setattr(training, "sample", lambda model, request: calls.append(model) or ordinary(model, request))
    config = _tiny(recipes.base_emoji, tmp_path, steps=1)
    config = replace(config, sample_prompts=("a parrot", "a fox"))
    config.folder.mkdir(parents=True)
    training.write_samples(config, fresh_model, 1)
    assert [model.compile for model in calls] == ["none", "none"]
    assert all(model.unet is fresh_model.unet for model in calls)
    assert fresh_model.compile == "auto"


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = _tiny(recipes.base_emoji, tmp_path, steps=1)
    with pytest.raises(ValueError, match=r"2 processes .*ACCELERATE_USE_CPU=true .*accelerate launch"):
        train(config)
    assert not config.folder.exists()


def test_a_run_keeps_its_config_and_metrics(tmp_path):
    config = _tiny(recipes.base_emoji, tmp_path, steps=4, log_every=2, sample_every=4)
    config = replace(config, sample_prompts=("a parrot",))
    train(config)
    from animatelcm.config import TrainConfig

    assert TrainConfig.from_json((config.folder / "config.json").read_text()) == config
    lines = [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert all(line["loss"] > 0 for line in lines)
    assert list((config.folder / "tensorboard").iterdir())
    assert [p.name for p in (config.folder / "samples").iterdir()] == ["step-00000004.png"]


def test_a_folder_of_ones_own_pictures_trains(tmp_path):
    from animatelcm import video
    from animatelcm.data.emoji import EmojiImages

    images = EmojiImages(length=4)
    (tmp_path / "mine").mkdir()
    for i in range(4):
        video.write_image(images[i].frames[0], tmp_path / "mine" / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": images[i].caption}) for i in range(4)]
    (tmp_path / "mine" / "metadata.jsonl").write_text("\n".join(lines))
    config = _tiny(recipes.base_emoji, tmp_path / "out", steps=1)
    config = replace(config, data=DataConfig(kind="folder", path=tmp_path / "mine", num_frames=1))
    assert (train(config) / "animatelcm.json").is_file()


@pytest.mark.slow
def test_a_compiled_run_learns_the_same_and_compiles_nothing_for_its_samples(tmp_path, monkeypatch):
    """Through Dynamo, without the compiler behind it, which takes minutes."""
    seen, compiled = [], torch.nn.Module.compile

    def graph(module, examples):
        seen.append(len(examples))
        return module.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled(self, backend=graph, **options))
    config = replace(recipes.video_lcm_emoji(), model="emoji", steps=2, batch_size=1, warmup_steps=1, sample_every=1)
    config = replace(config, sample_prompts=("a fox",), data=replace(config.data, length=4, cache=False))
    plain, fused = (_run(replace(config, out=tmp_path / str(how), compile=how)) for how in (False, True))
    assert len(seen) == 3  # student, target and teacher, for both steps and all samples
    moments = [name for name in plain["optimizer"] if name.endswith("exp_avg")]
    learned, found = (torch.cat([run["optimizer"][name].flatten() for name in moments]) for run in (plain, fused))
    assert (found - learned).norm() < 1e-3 * learned.norm() > 0
