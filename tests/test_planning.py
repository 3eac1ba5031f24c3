from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from animatelcm import checkpoint, counting, recipes, stages, training
from animatelcm.config import ConsistencyConfig, LoraConfig
from animatelcm.nets import lean, lora
from animatelcm.nets.blocks import Stage
from animatelcm.planning import GIB
from animatelcm.planning import plan as counted
from animatelcm.saving import save

pytest.importorskip("peft")
plan = cache(counted)


def _both(objective: str, kind: str):
    """A LoRA on the miniature's clips or images, trained by this objective."""
    config = recipes.style_lora_emoji()
    return replace(config, objective=objective, batch_size=2, data=replace(config.data, kind=kind))


def _inputs(frames: int, batch: int = 1) -> tuple[torch.Tensor, ...]:
    return torch.randn(batch, 16, frames, 8, 8), torch.full((batch,), 500), torch.randn(batch, 32, 128)


@pytest.mark.parametrize(("kind", "frames"), [("emoji-images", 1), ("emoji-clips", 16)])
def test_a_distillation_adds_three_evaluations(fresh_model, kind, frames):
    """The target's, and the teacher's with and without text, as counted on real tensors: each as the student's, though
    frozen factors are added to weights then, which takes less the more there is to multiply."""
    config = _both("consistency", kind)
    unet = copy.deepcopy(fresh_model.unet)
    lora.inject(unet, rank=config.lora.rank, alpha=1.0, targets=config.lora.targets)
    for a, b, _ in lora.factors(unet).values():
        a.requires_grad_(), b.requires_grad_()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        unet(*_inputs(frames), motion=frames > 1)
    found = plan(config).flops - plan(_both("diffusion", kind)).flops
    assert found == 3 * config.batch_size * counter.get_total_flops()


def test_operations_are_counted_as_torch_counts_them(monkeypatch):
    class Theirs(FlopCounterMode):
        total = property(FlopCounterMode.get_total_flops)

    config = replace(recipes.teacher_emoji(), batch_size=1, gradient_checkpointing=True)
    ours = counted(config)
    monkeypatch.setattr(counting, "_Flops", lambda: Theirs(display=False))
    assert counted(config) == ours


def test_activations_are_what_the_forward_pass_keeps(fresh_model, monkeypatch):
    """Of a GPU's operations; a CPU's norms keep less (``lean.norm_silu``)."""
    monkeypatch.setattr(lean, "casts", lambda _: True)
    config = replace(recipes.teacher_emoji(), batch_size=2)
    unet = copy.deepcopy(fresh_model.unet)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_("motion_modules" in name)
    weights = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = unet(*_inputs(16, batch=2))
    expected = sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in weights)
    assert result.requires_grad
    assert plan(config).activations_gib * GIB == pytest.approx(expected, rel=0.03)


def test_checkpointing_trades_memory_for_computation():
    config = recipes.teacher_emoji()
    plain, checkpointed = plan(config), plan(replace(config, gradient_checkpointing=True))
    assert checkpointed.activations_gib < 0.3 * plain.activations_gib
    assert plain.flops < checkpointed.flops < 1.5 * plain.flops
    assert checkpointed.weights_gib == plain.weights_gib


def test_costs_grow_with_the_batch_and_halve_with_the_precision():
    config = recipes.teacher_emoji()
    one, two = (plan(replace(config, batch_size=size)) for size in (1, 2))
    assert two.flops == 2 * one.flops
    assert two.activations_gib == pytest.approx(2 * one.activations_gib, rel=1e-3)
    half = plan(replace(config, batch_size=2, mixed_precision="bf16"))
    assert half.activations_gib == pytest.approx(two.activations_gib / 2, rel=1e-6)


def test_what_trains_is_what_the_recipe_says(fresh_model):
    sizes = {name: parameter.numel() for name, parameter in fresh_model.unet.named_parameters()}
    motion = sum(size for name, size in sizes.items() if "motion_modules" in name)
    spatial = sum(sizes.values()) - motion
    assert plan(recipes.base_emoji()).trainable == plan(recipes.base_emoji()).parameters == spatial
    teacher, style = plan(recipes.teacher_emoji()), plan(recipes.style_lora_emoji())
    assert (teacher.trainable, teacher.parameters) == (motion, spatial + motion)
    assert style.parameters == spatial + style.trainable
    stage_1, stage_2 = plan(recipes.image_lcm_emoji()), plan(recipes.video_lcm_emoji())
    assert stage_1.trainable == style.trainable  # of the same rank
    assert (stage_2.trainable, stage_2.parameters) == (motion, spatial + motion + stage_1.trainable)


def test_memory_of_weights_by_hand():
    stage_1, stage_2 = plan(recipes.image_lcm_emoji()), plan(recipes.video_lcm_emoji())
    base, motion = plan(recipes.base_emoji()), stage_2.trainable
    assert base.weights_gib * GIB == pytest.approx(4 * 5 * base.parameters)  # itself, gradient, two moments, average
    assert stage_1.weights_gib * GIB == pytest.approx(4 * (stage_1.parameters + 5 * stage_1.trainable))  # and a target
    assert stage_2.weights_gib * GIB == pytest.approx(4 * (stage_2.parameters + 6 * motion))  # and the teacher's
    coupled = replace(
        recipes.video_lcm_emoji(), consistency=ConsistencyConfig(decouple=False), lora=LoraConfig(rank=16)
    )
    both = plan(coupled)
    assert both.trainable == motion + stage_1.trainable
    assert both.weights_gib * GIB == pytest.approx(4 * (both.parameters + 5 * both.trainable + motion))


def test_adapters_without_a_teacher_take_less_memory_than_stage_2_as_their_recipes_are():
    most = plan(recipes.video_lcm_emoji()).memory_gib_at_least
    for recipe in (recipes.i2v_emoji, recipes.t2i_adapter_lora_emoji, recipes.controlnet_lora_emoji):
        assert plan(recipe()).memory_gib_at_least < most, recipe.__name__


@pytest.mark.parametrize(
    ("adapter", "temporal"),
    [(recipes.i2v_emoji, recipes.video_lcm_emoji), (recipes.i2v_sd15, recipes.video_lcm_sd15)],
    ids=["emoji", "sd15"],
)
def test_an_adapter_without_a_teacher_costs_less_than_temporal_layers_with_one(adapter, temporal):
    taught = replace(temporal(), gradient_checkpointing=False, mixed_precision="no")
    free = replace(adapter(), batch_size=taught.batch_size, data=taught.data)
    free = replace(free, gradient_checkpointing=False, mixed_precision="no")
    ours, theirs = plan(free), plan(taught)
    assert ours.trainable < theirs.trainable
    assert ours.weights_gib < theirs.weights_gib
    assert ours.weights_gib * GIB == pytest.approx(4 * (ours.parameters + 5 * ours.trainable))  # nothing of a teacher's
    assert ours.flops < theirs.flops


def test_feedback_costs_half_a_sampler_and_a_decoder(fresh_model):
    def planned(**changes):
        config = recipes.t2i_adapter_lora_emoji()
        return plan(replace(config, consistency=replace(config.consistency, **{"earlier": "noise", **changes})))

    none, one, three = planned(), planned(feedback=1.0, feedback_steps=1), planned(feedback=1.0, feedback_steps=3)
    forward = (planned(earlier="guided-noise").flops - none.flops) // 2
    assert three.flops - one.flops == forward  # one to three evaluations are two on average
    frames = torch.zeros(4 * 4, 16, 8, 8, requires_grad=True)  # of four clips
    with FlopCounterMode(display=False) as decoding:
        copy.deepcopy(fresh_model.vae).requires_grad_(False).decode(frames).sum().backward()
    backward = none.flops - 2 * forward
    # But for the decoder's one attention, whose backward pass is counted there as if it were spelled out.
    assert one.flops - none.flops - forward - backward == pytest.approx(decoding.get_total_flops(), rel=1e-3)
    assert one.activations_gib > 2 * none.activations_gib
    assert one.weights_gib == none.weights_gib


def test_adapters_train_what_a_run_trains(fresh_model, tmp_path):
    """Counted in the models that both runs begin with: a fresh T2I-Adapter, LoRA layers on a ControlNet."""
    widths, channels = fresh_model.unet.config, fresh_model.vae.config.latent_channels
    shape = recipes.controlnet_emoji().adapter
    pose = stages.fresh_adapter(shape, widths, latent_channels=channels, downscale=fresh_model.downscale)
    save(replace(fresh_model, adapters={"pose": pose}), tmp_path / "model")
    for recipe in (recipes.t2i_adapter_emoji, recipes.controlnet_lora_emoji):
        alone = replace(recipe().consistency, earlier="noise")  # a guide needs an acceleration to be without
        config = replace(recipe(), model=str(tmp_path / "model"), consistency=alone)
        model = stages.starting_model(config)
        trained = dict(stages.named_trainable(model, config))
        assert trained
        assert all(parameter.requires_grad for parameter in trained.values())
        assert plan(recipe()).trainable == sum(parameter.numel() for parameter in trained.values())
    every = sum(parameter.numel() for parameter in pose.parameters())
    assert plan(recipes.controlnet_emoji()).trainable == every
    pairs = lora.factors(model.adapters["pose"]).values()
    assert plan(recipes.controlnet_lora_emoji()).trainable == sum(a.numel() + b.numel() for a, b, _ in pairs) < every


def test_processes_share_a_step_and_add_up_their_clips(monkeypatch):
    config = replace(recipes.teacher_emoji(), gradient_accumulation_steps=3)
    one, eight = plan(config), plan(config, processes=8)
    assert one.global_batch == 3 * config.batch_size
    assert eight.global_batch == 8 * one.global_batch
    assert (one.clips, eight.clips) == (config.steps * one.global_batch, config.steps * eight.global_batch)
    assert (one.flops, one.memory_gib_at_least) == (eight.flops, eight.memory_gib_at_least)  # of each device
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert counted(config) == eight


def test_what_lies_beside_the_unet_counts_too(fresh_model):
    config = recipes.teacher_emoji()
    networks = (fresh_model.vae, fresh_model.text_encoder)
    held = sum(value.untyped_storage().nbytes() for net in networks for value in net.parameters())
    assert plan(config).beside_gib * GIB == pytest.approx(held)
    one = plan(config)
    parts = (one.weights_gib, one.activations_gib, one.recomputed_gib, one.beside_gib)
    assert one.memory_gib_at_least == pytest.approx(sum(parts))
    half, spared = (
        plan(replace(config, mixed_precision="bf16", gradient_checkpointing=wanted)) for wanted in (False, True)
    )
    ends = ("conv_in", "conv_out", "time_embedding")
    matrices = {name: p.numel() for name, p in fresh_model.unet.named_parameters() if p.ndim > 1}
    frozen = sum(size for name, size in matrices.items() if "motion" not in name and not name.startswith(ends))
    assert (one.weights_gib - half.weights_gib) * GIB == pytest.approx(2 * frozen)
    assert (half.beside_gib - one.beside_gib) * GIB == pytest.approx(2 * (one.parameters - frozen))
    assert (spared.beside_gib - one.beside_gib) * GIB == pytest.approx(2 * one.trainable)


def test_checkpointing_computes_one_layer_again(fresh_model):
    """All layers keep together nearly what the network keeps, so the largest keeps the mean of them or more."""
    config = recipes.teacher_emoji()
    plain, spared = plan(config), plan(replace(config, gradient_checkpointing=True))
    layers = sum(len(stage.resnets) for stage in fresh_model.unet.modules() if isinstance(stage, Stage))
    assert plain.recomputed_gib == 0
    assert 0.8 * plain.activations_gib / layers < spared.recomputed_gib < plain.activations_gib / 2
    twice = plan(replace(config, gradient_checkpointing=True, batch_size=2 * config.batch_size))
    assert twice.recomputed_gib == pytest.approx(2 * spared.recomputed_gib, rel=1e-2)
    assert spared.memory_gib_at_least < plain.memory_gib_at_least


def test_a_checkpoint_is_as_large_as_the_plan_says(fresh_folder, tmp_path):
    config = replace(recipes.image_lcm_emoji(), model=str(fresh_folder))
    state = training._fresh_state(config, stages.starting_model(config))
    for parameter in state.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    path = checkpoint.save(state, tmp_path, config.to_json())
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    assert plan(config).checkpoint_gib * GIB == pytest.approx(size, rel=0.03)  # names and single numbers beside


def test_latents_on_disk_by_hand(tmp_path):
    config, pixels = recipes.teacher_emoji(), replace(recipes.teacher_emoji().data, cache=False)
    clip = (16 * 16 * 8 * 8 + 32 * 128) * 2  # (channels, frames, cells; tokens, width), bytes
    assert plan(config).cache_gib_per_1000 * GIB == pytest.approx(1000 * clip)
    assert plan(config).cache_gib * GIB == pytest.approx(config.data.length * clip)
    unkept = plan(replace(config, data=pixels))
    assert (unkept.cache_gib_per_1000, unkept.cache_gib) == (0, 0)
    base = recipes.base_emoji()  # whose text encoder trains
    assert plan(base).cache_gib_per_1000 * GIB == pytest.approx(1000 * 16 * 8 * 8 * 2)
    away = replace(recipes.video_lcm_sd15(), gradient_checkpointing=False)
    away = plan(replace(away, data=replace(away.data, path=tmp_path / "nowhere", width=64, height=64)))
    assert away.cache_gib_per_1000 * GIB == pytest.approx(1000 * (4 * 16 * 8 * 8 + 77 * 768) * 2)
    assert away.cache_gib is None
    assert "cache_gib_per_1000" in away.text()
    assert "cache_gib " not in away.text()


def test_an_autoencoder_has_no_plan():
    with pytest.raises(ValueError, match="vae_emoji trains an autoencoder"):
        plan(recipes.vae_emoji())
