"""Runs that train an adapter without a teacher: who is asked, what learns, what is left; with and without a guide."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from animatelcm import objectives, recipes, stages
from animatelcm.bundle import load
from animatelcm.config import ConsistencyConfig
from animatelcm.data.batches import ClipBatch
from animatelcm.ema import Ema
from animatelcm.nets import lora
from animatelcm.nets.adapters import Adapter, Clues, Hints
from animatelcm.nets.image_encoder import ImageEncoder, ImageEncoderConfig
from animatelcm.rng import generator
from animatelcm.roles import Roles, adapter_roles
from animatelcm.saving import save
from animatelcm.schedule import NoiseSchedule
from animatelcm.training import train
from animatelcm.weights.fuse import fused
from animatelcm.weights.lora import LoraLayer
from networks import shaken

DRAW = partial(generator, 0, 0, 0)

# The miniature made narrow: who is asked, what learns, what a run leaves.


@pytest.fixture(scope="module")
def bundle(narrow_folder, tmp_path_factory):
    """A distilled model whose teacher's folder is gone."""
    folder = tmp_path_factory.mktemp("base") / "model"
    return shutil.copytree(narrow_folder, folder, ignore=shutil.ignore_patterns("motion_adapter_teacher"))


def _config(recipe, bundle, out, **changes):
    config = replace(recipe(), model=str(bundle), out=out, batch_size=1, save_every=1000, log_every=1, **changes)
    return replace(config, data=replace(config.data, length=3, cache=False))


def _batch(size: int = 2, frames: int = 3) -> ClipBatch:
    source = torch.Generator().manual_seed(0)
    return ClipBatch(
        captions=("a fox", "a parrot")[:size],
        latents=torch.randn(size, 16, frames, 8, 8, generator=source),
        first=torch.rand(size, 3, 64, 64, generator=source) * 2 - 1,
        maps=torch.rand(size, 3, frames, 64, 64, generator=source),
    )


def _i2v(**changes):
    """Image-to-video from an encoder that has learned nothing yet."""
    config = recipes.i2v_emoji()
    return replace(config, adapter=replace(config.adapter, start="fresh", **changes))


ADAPTERS = {
    "latents": _i2v,
    "pixels": partial(_i2v, sees="pixels"),
    "tokens": partial(_i2v, kind="image_tokens"),
    "t2i lora": recipes.t2i_adapter_lora_emoji,
    "controlnet lora": recipes.controlnet_lora_emoji,
}


def _step(config, model, state, monkeypatch) -> tuple[Roles, list[int]]:
    """The gradients of one step; who took part, and the sizes of the batches that the network was asked."""
    met, asked, method = [], [], objectives.consistency
    monkeypatch.setattr(
        objectives,
        "consistency",
        lambda model, roles, *rest, **named: met.append(roles) or method(model, roles, *rest, **named),
    )
    hook = model.unet.register_forward_pre_hook(lambda _, inputs: asked.append(len(inputs[0])))
    terms = stages.objective(config, model, state)(_batch(), DRAW)
    hook.remove()
    terms.loss.mean().backward()
    return met[0], asked


@pytest.mark.parametrize("recipe", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_nobody_teaches_and_all_of_the_adapter_learns_and_nothing_else(recipe, bundle, tmp_path, monkeypatch):
    config = _config(recipe, bundle, tmp_path)
    model = stages.starting_model(config)
    assert not model.teacher_motion
    shaken(model.adapters[config.adapter.name])
    live = dict(stages.named_trainable(model, config))
    assert all((".lora_" in name) == (config.lora is not None) for name in live)
    state = SimpleNamespace(step=0, target=Ema(config.consistency.mu, live))
    roles, asked = _step(config, model, state, monkeypatch)
    assert roles.teacher is None
    walked = asked[2 if config.consistency.earlier == "noise" else 3 :]
    assert asked[: len(asked) - len(walked)] == ([2, 2] if config.consistency.earlier == "noise" else [2, 4, 2])
    fed = config.consistency.feedback > 0  # by frames of some evaluations more; else student, target, maybe a guide
    assert walked == [2] * len(walked)
    assert len(walked) in (range(1, 5) if fed else [0])
    for part, network in model.networks.items():
        for name, parameter in network.named_parameters():
            if f"{part}.{name}" in live:
                assert parameter.grad.abs().max() > 0, name
            else:
                assert parameter.grad is None, name


@pytest.mark.parametrize("with_lora", [False, True])
def test_the_target_sees_the_average_and_not_the_live_adapter(bundle, with_lora):
    model = load(bundle)
    network = ImageEncoder(ImageEncoderConfig(channels=(16, 32), in_channels=16))
    if with_lora:
        lora.inject(network, rank=2, alpha=2.0, targets=("block1", "block2"))
    adapter, x_0 = Adapter(shaken(network)), _batch().latents
    names = [name for name, _ in adapter.named_parameters() if not with_lora or ".lora_" in name]
    other = shaken(deepcopy(adapter), seed=1)
    average = {name: value.detach() for name, value in other.named_parameters() if name in names}
    by_hand = deepcopy(adapter)
    by_hand.load_state_dict(average, strict=False)
    config = ConsistencyConfig(earlier="noise")
    roles = adapter_roles(model.unet, adapter, config, average=average, teacher_motion={})
    text, t, clues = model.embed(["a fox", "a parrot"]), torch.tensor([40, 900]), Clues(image=x_0[:, :, 0])
    with torch.no_grad():
        student, target = (role(x_0, t, text, motion=True, clues=clues) for role in (roles.student, roles.target))
        wanted = model.unet(x_0, t, motion=True, **by_hand(x_0, t, text, clues).arguments(text))
        assert torch.equal(target, wanted)
        assert (student - target).abs().max() > 1e-3
        shaken(adapter, seed=2)
        assert torch.equal(roles.target(x_0, t, text, motion=True, clues=clues), target) == (not with_lora)
        for name, parameter in adapter.named_parameters():  # a LoRA's own layers are frozen and shared
            parameter.copy_(by_hand.get_parameter(name) if name not in names else parameter)
        assert torch.equal(roles.target(x_0, t, text, motion=True, clues=clues), target)
        assert not torch.equal(roles.student(x_0, t, text, motion=True, clues=clues), student)
    online = adapter_roles(model.unet, adapter, replace(config, target="online"), average=average, teacher_motion={})
    assert online.target is online.student


@pytest.fixture(scope="module")
def run(bundle, tmp_path_factory):
    """Four steps of image-to-video in one go, from a bundle without a teacher."""
    config = _config(_i2v, bundle, tmp_path_factory.mktemp("run"), steps=4)
    train(config)
    return config


def _checkpoint(config) -> dict[str, dict[str, Tensor]]:
    last = config.folder / "checkpoints" / "step-00000004"
    return {path.stem: load_file(path) for path in sorted(last.glob("*.safetensors"))}


def test_two_steps_and_two_more_are_four_bit_for_bit(run, bundle, tmp_path):
    config = _config(_i2v, bundle, tmp_path, steps=4)
    assert train(config, stop_after=2) is None
    train(config, resume=True)
    ours, theirs = _checkpoint(config), _checkpoint(run)
    assert ours.keys() == theirs.keys() == {"weights", "ema", "target", "optimizer"}
    for part in theirs:
        assert ours[part].keys() == theirs[part].keys()
        assert all(torch.equal(ours[part][name], value) for name, value in theirs[part].items()), part


def test_a_run_moves_the_encoder_keeps_the_bundle_and_adds_to_it(run, bundle):
    losses = [json.loads(line)["loss"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 4
    assert all(loss > 0 for loss in losses)
    before, after = load(bundle), load(run.folder / "model")
    assert before.adapters.keys() == {"edge", "pose"}
    assert after.adapters.keys() == {"edge", "i2v", "pose"}
    for part, network in before.networks.items():
        ours = after.networks[part].state_dict()
        assert all(torch.allclose(ours[key], value, atol=1e-6) for key, value in network.state_dict().items()), part
    for base in ((load(folder, image_scale=0.0) for folder in (bundle, run.folder / "model")),):
        first, last = (model.unet.state_dict() for model in base)
        assert all(torch.equal(last[key], value) for key, value in first.items())
    assert not after.teacher_motion
    assert after.image_lora.keys() == before.image_lora.keys()
    assert after.facts.num_inference_steps == before.facts.num_inference_steps
    averages = _checkpoint(run)["ema"]
    ours = after.adapters["i2v"].state_dict()
    assert all(torch.equal(ours[name.removeprefix("adapter_i2v.")], value) for name, value in averages.items())
    start = stages.starting_model(run).adapters["i2v"].state_dict()
    assert any(not torch.equal(start[name], value) for name, value in ours.items())


@pytest.mark.parametrize(
    "recipe", [recipes.t2i_adapter_lora_emoji, recipes.controlnet_lora_emoji], ids=["t2i_adapter", "controlnet"]
)
def test_a_merged_lora_is_the_adapter_with_the_live_one(recipe, bundle, tmp_path):
    config = _config(recipe, bundle, tmp_path)
    model, name, batch = stages.starting_model(config), config.adapter.name, _batch()
    network, x, t = model.adapters[name], batch.latents, torch.tensor([40, 900])
    text, clues = model.embed(batch.captions), Clues(maps=batch.maps)

    def hints(network) -> list[Tensor]:
        found: Hints = Adapter(deepcopy(network).double())(x, t, text, clues)
        return [*found.features, *found.skip_residuals, *([] if found.mid_residual is None else [found.mid_residual])]

    with torch.no_grad():
        plain = hints(network)
        for _, b, _ in lora.factors(network).values():
            nn.init.normal_(b, std=0.05)
        live = hints(network)
        merged = stages.result(config, model).adapters[name]
        base = load(bundle).adapters[name]
        state = {f"{name}.{key}": value for key, value in base.state_dict().items()}
        file = load_file(config.folder / f"{config.name}.safetensors")
        alpha, downs = config.lora.alpha, [key for key in file if ".lora_A." in key]
        kept = {
            key.partition(".lora_A.")[0]: LoraLayer(file[key], file[key.replace("lora_A", "lora_B")], alpha)
            for key in downs
        }
        read = {key.removeprefix(f"{name}."): value for key, value in fused(state, [(kept, 1.0)]).items()}
        base.load_state_dict(read, strict=False)
        pairs = list(zip(live, hints(merged), plain, hints(base), strict=True))
    assert all((ours - theirs).norm() <= 1e-6 * ours.norm() for ours, theirs, _, _ in pairs)
    assert all((ours - halved).norm() <= 1e-3 * ours.norm() for ours, _, _, halved in pairs)  # the file is fp16
    assert all((ours - bare).norm() > 0.05 * bare.norm() for ours, _, bare, _ in pairs[1:])


# The image model's guidance in the clip's own noise.


def _guided(x_0: Tensor, low: float, high: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_t, t, x_s, what the guide was asked): with a guide that says 0.5 x with a text, and -0.25 x without."""
    heard = {}

    def role(name, x, t, text, *, motion, clues):
        heard.setdefault(name, []).append((x, t, motion))
        return torch.zeros_like(x)

    def guide(x, t, text, *, motion, clues):
        heard["guide"] = motion
        return torch.cat([-0.25 * part if i == 0 else 0.5 * part for i, part in enumerate(x.chunk(2))])

    model = SimpleNamespace(
        schedule=NoiseSchedule(), device=torch.device("cpu"), embed=lambda texts: torch.zeros(len(texts), 1, 1)
    )
    config = ConsistencyConfig(earlier="guided-noise", w_min=low, w_max=high, k=100)
    batch = ClipBatch(captions=("",) * len(x_0), latents=x_0)
    roles = Roles(partial(role, "student"), partial(role, "target"), None, guide)
    objectives.consistency(model, roles, batch, DRAW, config=config)
    assert heard["guide"] is False  # frame by frame
    ((x_t, t, motion),), ((x_s, _, _),) = heard["student"], heard["target"]
    assert motion
    return x_t, t, x_s, torch.randn(x_0.shape, generator=DRAW("noise"))


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (1.5, 1.5), (2.0, 6.0)])
def test_the_earlier_point_is_the_ddim_point_of_the_noise_that_guidance_has_moved(low, high):
    schedule, x_0 = NoiseSchedule(), _batch(frames=4).latents.repeat(16, 1, 1, 1, 1)
    x_t, t, x_s, eps = _guided(x_0, low, high)
    w = (torch.rand(len(x_0), generator=DRAW("guidance")) * (high - low) + low).double().reshape(-1, 1, 1, 1, 1)
    moved = eps.double() + w * 0.75 * x_t.double()
    s = (t - 100).clamp(min=0)
    a, b = (schedule.alphas_cumprod[i].double().reshape(-1, 1, 1, 1, 1) for i in (t, s))
    wanted = b.sqrt() * (x_t.double() - (1 - a).sqrt() * moved) / a.sqrt() + (1 - b).sqrt() * moved
    assert ((x_s - wanted).flatten(1).norm(dim=1) <= 1e-5 * wanted.flatten(1).norm(dim=1)).all()
    if high == 0:
        plain = b.sqrt() * x_0.double() + (1 - b).sqrt() * eps.double()
        assert ((x_s - plain).flatten(1).norm(dim=1) <= 1e-5 * plain.flatten(1).norm(dim=1)).all()


def test_the_guide_is_the_image_model_and_the_student_the_few_step_one(bundle, tmp_path, monkeypatch):
    config = _config(recipes.t2i_adapter_lora_emoji, bundle, tmp_path)
    config = replace(config, consistency=replace(config.consistency, earlier="guided-noise", w_min=1.0, w_max=3.0))
    model, batch = stages.starting_model(config), _batch()
    state = SimpleNamespace(step=0, target=Ema(config.consistency.mu, dict(stages.named_trainable(model, config))))
    roles, asked = _step(config, model, state, monkeypatch)
    assert asked == [2, 4, 2]  # student; guide, without and with text; target
    learned = {name for name, p in model.adapters["edge"].named_parameters() if p.grad is not None}
    assert learned
    assert all(".lora_" in name for name in learned)
    assert all(parameter.grad is None for parameter in model.unet.parameters())
    text, t, clues = model.embed(batch.captions), torch.tensor([40, 900]), Clues(maps=batch.maps)
    with torch.no_grad():
        said = roles.guide(batch.latents, t, text, motion=False, clues=clues)
        base = load(bundle, image_scale=0.0).unet
        assert torch.allclose(said, base(batch.latents, t, text, motion=False), atol=1e-5)
        fast = load(bundle)
        hints = Adapter(fast.adapters["edge"])(batch.latents, t, text, clues)  # a fresh LoRA changes nothing
        wanted = fast.unet(batch.latents, t, motion=True, **hints.arguments(text))
        assert torch.allclose(roles.student(batch.latents, t, text, motion=True, clues=clues), wanted, atol=1e-4)
        assert (said - wanted).abs().max() > 1e-2


def test_a_model_without_an_acceleration_has_no_image_model_to_guide(fresh_model, bundle, tmp_path):
    model = load(bundle)
    folder = tmp_path / "plain"
    save(replace(model, image_lora={}, kept={}), folder, dtype=torch.float32)
    config = _config(recipes.t2i_adapter_lora_emoji, folder, tmp_path)
    config = replace(config, consistency=replace(config.consistency, earlier="guided-noise"))
    with pytest.raises(ValueError, match="has no image acceleration"):
        stages.starting_model(config)
