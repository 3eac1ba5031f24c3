"""What an adapter of maps hears of the frames that it led to (ControlNet++'s consistency feedback)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from animatelcm import objectives, recipes
from animatelcm.config import ConsistencyConfig
from animatelcm.consistency import consistency_function
from animatelcm.control_maps import made
from animatelcm.data.batches import ClipBatch, to_pixels
from animatelcm.feedback import disagreement, edge_agreement, found, off_centre
from animatelcm.rng import generator
from animatelcm.roles import Roles

DRAW = partial(generator, 0, 0, 0)


def frames(seed: int = 0) -> np.ndarray:
    """Noise of all contrasts, a plain frame and a step: uint8 (6, 24, 32, 3)."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 24, 32, 3), dtype=np.uint8)
    noise[1] //= 2
    noise[2] = 100 + noise[2] // 16
    plain = np.full((2, 24, 32, 3), 77, np.uint8)
    plain[1, :, 16:] = 200
    return np.concatenate([noise, plain])


def tensors(clip: np.ndarray) -> Tensor:
    """(F, 3, H, W) in [-1, 1]."""
    return to_pixels([clip])[0].transpose(0, 1)


@pytest.mark.parametrize(("kind", "bound"), [("edge", 0.6), ("tile", 1e-4)])
def test_maps_are_those_of_opencv_but_for_rounding(kind, bound):
    wanted = made(kind, frames()).astype(float)
    seen = 255 * found(tensors(frames()), kind).permute(0, 2, 3, 1).double().numpy()
    assert np.abs(seen - wanted).max() <= bound


def test_edges_are_found_in_float32_where_half_precision_is_the_rule():
    wanted = found(tensors(frames()), "edge")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(found(tensors(frames()), "edge"), wanted)


@pytest.mark.parametrize("kind", ["canny", "depth", "pose"])
def test_maps_without_a_gradient_are_refused(kind):
    with pytest.raises(ValueError, match=f"{kind} maps are not found by a function with a gradient"):
        found(tensors(frames()), kind)


def test_edges_have_the_gradient_of_finite_differences_and_a_finite_one_where_nothing_is():
    clip = tensors(frames()[:3, :6, :6]).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: found(x, "edge").mean((1, 2, 3)), clip, eps=1e-6, atol=1e-6)
    plain = torch.zeros(1, 3, 6, 6, requires_grad=True)
    found(plain, "edge").sum().backward()
    assert torch.equal(plain.grad, torch.zeros_like(plain))


def test_edges_agree_by_the_f1_of_what_is_within_a_pixel():
    """Of lines of one pixel, whose neighbourhoods are all alike, shares of pixels, diagonal neighbours included."""

    def drawn(*rows: int, width: int = 20) -> Tensor:
        maps = torch.zeros(1, 3, 16, 20)
        maps[:, :, list(rows), :width] = 1
        return maps

    assert edge_agreement(drawn(4), drawn(4)).item() == pytest.approx(1, abs=1e-3)
    assert edge_agreement(drawn(4), drawn(5)).item() == pytest.approx(1, abs=1e-3)
    assert edge_agreement(drawn(4), drawn(6)).item() == pytest.approx(0, abs=2e-3)
    assert edge_agreement(drawn(4), drawn(4, 10)).item() == pytest.approx(2 / 3, abs=2e-3)  # precise, half recalled
    assert edge_agreement(drawn(4, 10), drawn(4)).item() == pytest.approx(2 / 3, abs=2e-3)
    assert edge_agreement(drawn(4, width=10), drawn(4)).item() == pytest.approx(2 * 0.55 / 1.55, abs=0.01)
    assert edge_agreement(drawn(), drawn()).item() == 1
    faint, clear = 0.08 / 0.13, 0.8 / 0.85  # above the mean of five lines of five, of which it is one
    recall = faint / clear
    assert edge_agreement(0.1 * drawn(4), drawn(4)).item() == pytest.approx(2 * recall / (1 + recall), abs=2e-3)
    blur = torch.nn.functional.avg_pool2d(drawn(4), 3, stride=1, padding=1, count_include_pad=False)
    assert edge_agreement(blur, drawn(4)).item() < 0.9
    assert edge_agreement(torch.full((1, 3, 16, 20), 0.4), drawn(4)).item() == pytest.approx(0, abs=2e-3)


def test_a_thing_off_its_dot_is_so_far_off_and_is_drawn_to_it():
    cells = (torch.arange(64) + 0.5) / 32 - 1

    def disc(x: float, y: float, radius: float) -> Tensor:
        return torch.hypot(cells[None] - x, cells[:, None] - y) <= radius

    frames = torch.full((3, 3, 64, 64), -0.2)
    for frame, (x, y) in zip(frames, [(0.1, 0.2), (-0.3, 0.0), (0.0, 0.0)], strict=True):
        frame[:, disc(x, y, 0.4)] = 0.7
    maps = torch.zeros(3, 3, 64, 64)
    maps[0, 0, disc(0.4, 0.6, 0.1)] = 1
    maps[1, 0, disc(-0.3, 0.0, 0.1)] = 1  # and none in the last: nothing was asked
    assert torch.allclose(off_centre(frames, maps), torch.tensor([0.5, 0.0, 0.0]), atol=0.01)
    frames.requires_grad_()
    off_centre(frames, maps).sum().backward()
    assert torch.isfinite(frames.grad).all()
    assert frames.grad[0].abs().max() == 0  # clearly there or clearly not: a thing moves by its rim
    soft = torch.nn.functional.avg_pool2d(frames.detach(), 9, stride=1, padding=4, count_include_pad=False)
    soft.requires_grad_()
    off_centre(soft, maps).sum().backward()
    toward, away = soft.grad[0].sum(0)[disc(0.35, 0.55, 0.2)], soft.grad[0].sum(0)[disc(-0.15, -0.15, 0.2)]
    assert toward.sum() < 0 < away.sum()
    assert soft.grad[2].abs().max() == 0


def test_a_clip_agrees_with_its_own_maps_alone(fresh_model):
    latents = torch.randn(2, 16, 3, 4, 4, generator=DRAW("clip"))
    with torch.no_grad():
        shown = fresh_model.vae.decode(latents.transpose(1, 2).flatten(0, 1) / fresh_model.vae.config.scaling_factor)
    for kind in ("edge", "tile"):
        with torch.no_grad():
            own = found(shown, kind).unflatten(0, (2, 3)).transpose(1, 2)
            other = torch.stack([own[0], own[1].roll(7, -1)])
            assert disagreement(fresh_model, latents, own, kind).max() < 1e-5
            away = disagreement(fresh_model, latents, other, kind)
        assert away[0] < 1e-5
        assert away[1] > 1e-3
        if kind == "tile":
            assert away[1] == pytest.approx((own[1] - other[1]).abs().mean().item(), rel=1e-4)


@pytest.mark.parametrize("count", [2, 99])
@pytest.mark.parametrize("seed", range(6))
def test_the_loss_grows_by_what_the_sampler_makes_of_noise(fresh_model, seed, count):
    """By the disagreement of what lcm steps of the role make, left after one of them; no other evaluation has a
    gradient, and the consistency loss stays what it is."""
    x_0 = torch.randn(3, 16, 5, 4, 4, generator=DRAW("clip"))
    maps = torch.rand(3, 3, 5, 32, 32, generator=DRAW("maps"))
    batch, draw = ClipBatch(captions=("", "", ""), latents=x_0, maps=maps), partial(generator, seed, 0, 0)
    strength, asked = torch.nn.Parameter(torch.tensor(0.3)), []

    def student(x, t, text, *, motion, clues):
        asked.append((int(t[0]), torch.is_grad_enabled()))
        return strength * x

    def told(feedback: float) -> objectives.Terms:
        asked.clear()
        config = ConsistencyConfig(earlier="noise", k=300, feedback=feedback, feedback_frames=count)
        roles = Roles(student, student, None)
        return objectives.consistency(fresh_model, roles, batch, draw, config=config, control="tile")

    plain, fed = told(0.0), told(7.0)
    walk = asked[2:]
    assert [t for t, _ in walk] == [999, 759, 499, 259][: len(walk)]
    assert [gradient for _, gradient in walk] == [False] * (len(walk) - 1) + [True]

    source = draw("feedback")
    chosen = torch.randperm(5, generator=source)[:count]
    assert int(torch.randint(4, (1,), generator=source)) == len(walk) - 1
    with torch.no_grad():
        x = torch.randn(x_0.shape, generator=source)
        for step, (t, _) in enumerate(walk):
            t_b = torch.full((3,), t)
            made_of = consistency_function(x, strength * x, t_b, fresh_model.schedule)
            if step + 1 < len(walk):
                fresh, later = torch.randn(x_0.shape, generator=source), torch.full((3,), walk[step + 1][0])
                x = fresh_model.schedule.add_noise(made_of, fresh, later)
        away = disagreement(fresh_model, made_of[:, :, chosen], maps[:, :, chosen], "tile")
    assert len(chosen) == min(count, 5)
    assert torch.allclose(fed.loss - plain.loss, 7 * away, rtol=1e-4)
    assert fed.logs["feedback"].item() == pytest.approx(away.mean().item(), rel=1e-5)
    assert "feedback" not in plain.logs
    (gradient,) = torch.autograd.grad(fed.loss.sum() - plain.loss.sum(), strength)
    assert gradient.abs() > 0


def test_its_gradient_alone_brings_predictions_to_the_maps(fresh_model):
    wanted = tensors(made("edge", frames(1)[:3]))[:, :, :24, :24].add(1).div(2)[None].transpose(1, 2)
    latents = torch.zeros(1, 16, 3, 3, 3, requires_grad=True)
    optimiser, heard = torch.optim.Adam([latents], 0.1), []
    for _ in range(15):
        away = disagreement(fresh_model, latents, wanted, "edge").sum()
        optimiser.zero_grad()
        away.backward()
        optimiser.step()
        heard.append(away.item())
    assert heard[-1] < 0.9 * heard[0]


def test_feedback_that_nothing_could_give_is_refused():
    edge = recipes.t2i_adapter_lora_emoji()
    fed = replace(edge.consistency, feedback=1.0)
    assert replace(edge, consistency=fed).consistency.feedback == 1
    for other in (recipes.i2v_emoji(), recipes.image_lcm_emoji()):
        with pytest.raises(ValueError, match="feedback is for adapters of edge, tile, pose, whose maps"):
            replace(other, consistency=replace(other.consistency, feedback=1.0))
    pose = recipes.controlnet_lora_emoji()
    with pytest.raises(ValueError, match="plain backgrounds alone"):
        replace(pose, data=replace(pose.data, kind="folder", path="clips"))
    for wrong in ({"feedback": -1.0}, {"feedback_frames": 0}, {"feedback_steps": 0}, {"feedback_steps": 51}):
        with pytest.raises(ValueError, match="feedback_frames"):
            ConsistencyConfig(**wrong)
