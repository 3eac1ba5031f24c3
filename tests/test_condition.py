"""Pictures, layouts and videos that steer: what adapters are shown, when, and how often."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from animatelcm import Pipeline, condition, control_maps, images, video
from animatelcm.condition import Condition, Control, read, steering, with_pixels
from animatelcm.model import VideoModel
from animatelcm.nets.adapters import Hints, begin_as_copy, controlnet, t2i_adapter
from animatelcm.nets.image_encoder import ImageEncoder, ImageEncoderConfig
from animatelcm.request import SampleRequest
from animatelcm.sampling import sample


def beside(model: VideoModel, *names: str) -> VideoModel:
    """The model with adapters that act: "edge" is a T2I-Adapter, "pose" a ControlNet, "i2v" an image encoder."""
    config = model.unet.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        control = controlnet(config, (8, 16, 24, config.block_out_channels[0]))
        begin_as_copy(control, model.unet.state_dict())
        shape = ImageEncoderConfig(channels=config.block_out_channels, in_channels=model.vae.config.latent_channels)
        found = {"edge": t2i_adapter(config, model.downscale), "pose": control, "i2v": ImageEncoder(shape)}
        for network in found.values():
            network.eval().requires_grad_(False)
            for parameter in network.parameters():
                if parameter.ndim > 1 and not parameter.any():
                    parameter.copy_(torch.randn(parameter.shape) / parameter[0].numel() ** 0.5)
    return replace(model, adapters={name: found[name] for name in names or found})


@pytest.fixture(scope="module")
def model(fresh_model):
    return beside(fresh_model)


def clip(frames: int = 4, height: int = 64, width: int = 64, seed: int = 0) -> np.ndarray:
    """Frames of a square that moves over a colour."""
    found = np.full((frames, height, width, 3), (40, 90, 160), np.uint8)
    for i, frame in enumerate(found):
        frame[8 + seed : 24 + seed, 4 * i : 4 * i + 16] = 250, 200, 10
    return found


def asked(**fields) -> SampleRequest:
    known = {"prompt": "a parrot", "num_frames": 4, "num_inference_steps": 2, "guidance_scale": 1.0, "sampler": "lcm"}
    return SampleRequest(**known | {"width": 64, "height": 64} | fields)


# What is read


def test_files_are_read_at_the_requests_size_and_what_is_taken_is_told(model, tmp_path, caplog):
    picture, footage = clip(1, 90, 120)[0], clip(40, 48, 64)
    images.write_image(picture, tmp_path / "a.png")
    video.write(footage, tmp_path / "a.webp", fps=16, quality=100)
    request = asked(
        image=str(tmp_path / "a.png"),
        fit="pad",
        control=(f"edge={tmp_path / 'a.webp'}:0.5@0.25-0.75", f"pose=map:{tmp_path / 'a.webp'}"),
        video=str(tmp_path / "a.webp"),
    )
    with caplog.at_level(logging.INFO, logger="animatelcm"):
        found = read(request.resolved(model.facts), model)
    assert (found.image == images.fitted(picture, 64, 64, "pad")).all()
    taken, inside = footage[:8:2], slice(8, 56)  # of 48 rows
    edges, poses = found.controls
    assert edges[0] == "edge"
    assert edges[2:] == (0.5, 0.25, 0.75)
    assert (edges.maps[:, inside] == control_maps.made("edge", taken)).all()
    assert poses[2:] == (1.0, 0.0, 1.0)
    assert (poses.maps[:, inside] == taken).all()
    assert not edges.maps[:, :8].any()
    assert not poses.maps[:, 56:].any()
    assert (found.video == np.stack([images.fitted(frame, 64, 64, "pad") for frame in taken])).all()
    assert caplog.text.count("a.webp: frames 0 to 6 of 40 (every 2nd, 8 fps)") == 3


def test_what_the_model_has_no_adapter_for_is_said_before_a_file_is_opened(fresh_model, model):
    with pytest.raises(ValueError, match=r"image encoder \(i2v\).* none; add one with --adapter i2v=PLACE"):
        read(asked(image="nowhere.png"), fresh_model)
    with pytest.raises(ValueError, match=r"depth maps.* edge, i2v, pose; add"):
        read(asked(control=("depth=map:nowhere.mp4",)), model)
    for steers in (Condition(image=clip()[0]), Condition(controls=(Control("edge", clip()),))):
        with pytest.raises(ValueError, match="add one with --adapter"):
            steering(fresh_model, asked(), steers)


@pytest.mark.parametrize(("grid", "steps"), [(50, 4), (50, 29), (100, 7), (200, 4), (7, 7)])
def test_a_strength_that_leaves_too_few_timesteps_names_the_least_that_does_not(model, grid, steps):
    small = replace(model, schedule=replace(model.schedule, solver_steps=grid))
    with pytest.raises(ValueError, match=r"strength=0\.01 leaves \d+ of the .* take fewer steps, or") as caught:
        steering(small, asked(num_inference_steps=steps, strength=0.01), Condition(video=clip()))
    least = float(str(caught.value).split("strength of ")[1].split()[0])
    assert len(small.schedule.lcm_timesteps(steps, least)) == steps
    if least < 1:
        with pytest.raises(ValueError, match="steps="):
            small.schedule.lcm_timesteps(steps, least - 0.002)
    steering(small, asked(num_inference_steps=steps, strength=0.01, sampler="ddim"), Condition(video=clip()))
    steering(small, asked(num_inference_steps=steps, strength=0.01), Condition())


@pytest.mark.parametrize(
    ("steers", "named"),
    [
        (Condition(image=clip(1, 64, 32)[0]), "the picture"),
        (Condition(image=clip()), "the picture"),
        (Condition(video=clip(3)), "the video to begin from"),
        (Condition(controls=(Control("edge", clip(5)),)), "control edge"),
        (Condition(controls=(Control("edge", clip().astype(np.float32)),)), "control edge is float32"),
    ],
)
def test_pixels_of_another_size_are_refused(model, steers, named):
    with pytest.raises(ValueError, match=named):
        steering(model, asked(), steers)


# What adapters are shown, and when


class Stub:
    """Stands for every adapter, and keeps what it was asked."""

    calls: list[tuple] = []  # noqa: RUF012 - reset by the fixture
    steady = False
    pooled = False

    def __init__(self, network, *, motion_scale):
        self.motion_scale = motion_scale

    def eval(self):
        return self

    def __call__(self, x, t, text, clues):
        self.calls.append((self.motion_scale, x, t, text, clues))
        return Hints(mid_residual=torch.full((len(x), 160, 4, 4, 4), 2.0))


@pytest.fixture
def calls(monkeypatch):
    Stub.calls = []
    monkeypatch.setattr(condition, "Adapter", Stub)
    return Stub.calls


def _inputs(batch: int = 1):
    x = torch.randn(batch, 16, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return x, torch.full((batch,), 500), torch.zeros(batch, 32, 128)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 10, 25, 50])
def test_a_control_acts_in_the_steps_in_which_diffusers_acts(model, calls, steps):
    parts = [(0, 1), (0, 0.5), (0.5, 1), (0.25, 0.75), (0, 0.3), (0.1, 0.7), (0.9, 1), (0.33, 0.34), (0, 0.999)]
    for start, end in parts:
        calls.clear()
        steer = steering(model, asked(), Condition(controls=(Control("pose", clip(), 1.0, start, end),)))
        acted = [bool(steer(*_inputs(), i / steps, (i + 1) / steps).mid_residual is not None) for i in range(steps)]
        # diffusers' pipelines: controlnet_keep
        keep = [1.0 - float(i / steps < start or (i + 1) / steps > end) for i in range(steps)]
        assert acted == [bool(kept) for kept in keep]
        assert len(calls) == sum(acted)


@pytest.mark.parametrize(
    ("fields", "steers", "acts"),
    [
        ({"sampler": "ddim"}, {}, 4),
        ({"sampler": "dpm++"}, {}, 4),
        ({"sampler": "lcm"}, {}, 4),
        ({"sampler": "ddim", "guidance_scale": 3.0}, {}, 4),
        ({"sampler": "ddim", "strength": 0.5}, {"video": clip()}, 2),  # of four steps that are walked
        ({"sampler": "lcm", "strength": 0.5}, {"video": clip()}, 4),
    ],
)
def test_steps_are_counted_as_they_are_walked(model, calls, fields, steers, acts):
    request = asked(num_inference_steps=8, **fields)
    made = sample(model, request, condition=Condition(controls=(Control("pose", clip(), 1.0, 0.0, 0.5),), **steers))
    assert len(calls) == acts
    assert {len(x) for _, x, *_ in calls} == {2 if request.guidance_scale != 1 else 1}
    assert made[0].frames.shape == (4, 64, 64, 3)


def test_an_adapter_is_shown_what_it_was_made_to_see(model, calls):
    picture, maps = clip()[0], clip(seed=3)
    request = asked(motion_scale=0.3)
    steer = steering(model, request, Condition(image=picture, controls=(Control("pose", maps, 0.5),)))
    hints = steer(*_inputs(2), 0.0, 1.0)
    (motion, *_, picture_clues), (*_, map_clues) = calls
    assert motion == 0.3
    shown = torch.from_numpy(picture).permute(2, 0, 1).float() / 127.5 - 1
    latent = model.encode(shown[None, :, None])[:, :, 0]
    for i in range(2):  # both halves of a guided batch
        torch.testing.assert_close(picture_clues.pixels[i], shown)
        torch.testing.assert_close(picture_clues.image[i : i + 1], latent)
        expected = torch.from_numpy(maps).permute(3, 0, 1, 2).float() / 255
        torch.testing.assert_close(map_clues.maps[i], expected, atol=1e-6, rtol=0)
    assert picture_clues.maps is None
    assert map_clues.image is None
    assert (hints.mid_residual == 2 + 0.5 * 2).all()


def test_what_no_step_changes_is_computed_once(model):
    steers = Condition(image=clip()[0], controls=(Control("edge", clip(), 0.7), Control("pose", clip())))
    counts = dict.fromkeys(model.adapters, 0)
    hooks = [
        network.register_forward_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))
        for name, network in model.adapters.items()
    ]
    sample(model, asked(num_inference_steps=3, guidance_scale=2.0), condition=steers)
    for hook in hooks:
        hook.remove()
    assert counts == {"edge": 1, "pose": 3, "i2v": 1}


def test_hints_of_a_guided_batch_are_those_of_each_half(model):
    steers = Condition(image=clip()[0], controls=(Control("edge", clip(), 0.7), Control("pose", clip(), 2.0)))
    (x, t, _), text = _inputs(2), torch.randn(2, 32, 128)
    both = steering(model, asked(), steers)(x, t, text, 0.0, 1.0)
    for i in range(2):
        one = steering(model, asked(), steers)(x[i : i + 1], t[i : i + 1], text[i : i + 1], 0.0, 1.0)
        for part, whole in zip((*one[0], *one[1], one[2]), (*both[0], *both[1], both[2]), strict=True):
            torch.testing.assert_close(whole[i : i + 1], part, atol=1e-4, rtol=1e-4)


def test_a_shuffle_controlnet_acts_on_the_guided_half_alone(model):
    """As diffusers' pipelines have it: ``guess_mode or global_pool_conditions`` leaves the other half without."""
    pooled = copy.deepcopy(model.adapters["pose"])
    pooled.register_to_config(global_pool_conditions=True)
    shuffles = replace(model, adapters={"pose": pooled})
    (x, t, _), text = _inputs(2), torch.randn(2, 32, 128, generator=torch.Generator().manual_seed(1))
    steers = Condition(controls=(Control("pose", clip(), 0.5),))
    request = asked(guidance_scale=3.0, sampler="ddim")
    hints = steering(shuffles, request, steers)(x, t, text, 0.0, 1.0)
    frames = x[1:].transpose(1, 2).flatten(0, 1)
    maps = torch.from_numpy(clip()).permute(0, 3, 1, 2).float() / 255
    options = {"controlnet_cond": maps, "conditioning_scale": 0.5, "return_dict": False}
    skips, mid = pooled(frames, t[1:].expand(4), encoder_hidden_states=text[1:].expand(4, -1, -1), **options)
    for ours, theirs in zip((*hints.skip_residuals, hints.mid_residual), (*skips, mid), strict=True):
        assert not ours[0].any()
        torch.testing.assert_close(
            ours[1].transpose(0, 1), theirs.expand_as(ours[1].transpose(0, 1)), atol=1e-4, rtol=0
        )
    plain = steering(shuffles, asked(), steers)(x, t, text, 0.0, 1.0)  # two videos without guidance: both act
    assert all(part.flatten(1).any(1).all() for part in plain.skip_residuals)
    other = steering(model, request, steers)(x, t, text, 0.0, 1.0)  # one that tells where things are: both halves
    assert other.mid_residual[0].any()


@pytest.mark.parametrize(
    "part", [(float("nan"), 0, 1), (-1, 0, 1), (11, 0, 1), (1, 0.7, 0.2), (1, 0, 1.5), (1, 0.5, 0.5)]
)
def test_a_control_that_cannot_act_is_refused(model, part):
    with pytest.raises(ValueError, match=r"control edge: give a scale of 0\.\.10 and a part of the steps within 0-1"):
        steering(model, asked(), Condition(controls=(Control("edge", clip(), *part),)))


def test_what_is_kept_of_a_control_does_not_grow_with_the_video(model, monkeypatch):
    """Features and maps of each window of a long video are made anew, and the same as those of a short one."""
    monkeypatch.setattr(condition, "KEPT", 4)
    long, made = clip(12), []
    hook = model.adapters["edge"].register_forward_hook(lambda _, given, __: made.append(len(given[0])))
    (x, t, text), spans = _inputs(), [range(4), range(4, 8), range(8, 12)]
    steer = steering(model, asked(num_frames=12), Condition(controls=(Control("edge", long),)))
    short = [steering(model, asked(), Condition(controls=(Control("edge", long[s.start : s.stop]),))) for s in spans]
    wanted = [one(x, t, text, 0.0, 1.0) for one in short]
    made.clear()
    for _ in range(2):  # steps
        for span, one in zip(spans, wanted, strict=True):
            found = steer(x, t, text, 0.0, 1.0, [span])
            for ours, theirs in zip(found.features, one.features, strict=True):
                torch.testing.assert_close(ours, theirs)
    hook.remove()
    assert made == [4] * 6


# Pixels of no file


def test_pixels_make_the_video_that_their_files_make(model, tmp_path):
    picture, footage = clip(1, 90, 120)[0], clip(4, 80, 96)
    images.write_image(picture, tmp_path / "a.png")
    video.write(footage, tmp_path / "maps", fps=8)
    pipe = Pipeline(model)
    given = {"num_frames": 4, "num_inference_steps": 2, "guidance_scale": 1.0, "sampler": "ddim", "strength": 1.0}
    maps = str(tmp_path / "maps")
    files = pipe("a fox", image=tmp_path / "a.png", control=[f"edge={maps}", f"pose=map:{maps}"], video=maps, **given)
    pixels = pipe("a fox", image=picture, control={"edge": footage, "pose": footage}, video=footage, **given)
    ready = control_maps.read(maps, "edge", ready=False, num_frames=4, fps=8, height=64, width=64)[0]
    parts = [Control("edge", ready), f"pose=map:{maps}"]
    mixed = pipe("a fox", image=Image.fromarray(picture), control=parts, video=footage, **given)
    assert (files[0].frames == mixed[0].frames).all()
    assert (files[0].frames == pixels[0].frames).all()
    assert (files[0].frames != pipe("a fox", **given)[0].frames).any()
    assert (files[0].request.image, pixels[0].request.image) == (str(tmp_path / "a.png"), "")


def test_frames_in_memory_are_cut_fitted_and_held(model):
    request = asked().resolved(model.facts)
    nothing = with_pixels(Condition(), request)
    assert (nothing.image, nothing.controls, nothing.video) == (None, (), None)
    found = with_pixels(Condition(), request, video=clip(9, 64, 64), control=[Control("edge", clip(2), 0.5)])
    assert (found.video == clip(9)[:4]).all()
    assert (found.controls[0].maps == clip(2)[[0, 1, 1, 1]]).all()
    assert found.controls[0].scale == 0.5


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_a_layout_is_fitted_as_the_picture_beside_it(model, tmp_path, fit):
    """From files and from memory: what lies somewhere in the one lies there in the other."""
    footage, place = clip(4, 48, 96), tmp_path / "clip"
    video.write(footage, place, fps=8)
    images.write_image(footage[0], tmp_path / "a.png")
    given = asked(
        image=str(tmp_path / "a.png"), fit=fit, control=(f"edge={place}", f"pose=map:{place}"), video=str(place)
    )
    read_from = read(given.resolved(model.facts), model)
    options = {"control": [Control("pose", footage)], "video": footage}
    held = with_pixels(Condition(), asked(fit=fit).resolved(model.facts), image=footage[0], **options)
    made = with_pixels(Condition(), asked(fit=fit).resolved(model.facts), control={"edge": footage})
    assert (read_from.image == images.fitted(footage[0], 64, 64, fit)).all()
    assert (read_from.video[0] == read_from.image).all()
    assert (read_from.video == held.video).all()
    assert [(part.name, part.maps.tolist()) for part in read_from.controls] == [
        (part.name, part.maps.tolist()) for part in (*made.controls, *held.controls)
    ]
    inside = np.abs(read_from.controls[1].maps[0].astype(int) - read_from.image).max(axis=(1, 2)) == 0
    assert inside.sum() == (32 if fit == "pad" else 64)  # a ready map has black borders, a picture its colour
    if fit == "pad":
        assert not read_from.controls[0].maps[:, ~inside].any()  # and no edge along them


def test_a_picture_of_pillow_is_taken_the_right_way_up(model):
    picture = Image.fromarray(clip(1)[0]).convert("RGBA")
    exif = picture.getexif()
    exif[0x0112] = 3  # upside down
    picture.info["exif"] = exif.tobytes()
    found = with_pixels(Condition(), asked(), image=picture)
    assert (found.image == clip(1)[0, ::-1, ::-1]).all()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"image": clip()}, "uint8"),
        ({"image": clip()[0] / 255}, "float64"),
        ({"video": clip()[0]}, "uint8"),
        ({"control": {"edge": clip().astype(int)}}, "int64"),
        ({"control": {"sketch": clip()}}, "sketch"),
        ({"control": {"i2v": clip()}}, "i2v"),
        ({"control": "edge=clip.mp4"}, "is not KIND=FILE"),
        ({"image": "nowhere.png"}, r"nowhere\.png"),
    ],
)
def test_pixels_that_cannot_be_are_a_sentence(model, given, named):
    with pytest.raises(ValueError, match=named):
        Pipeline(model)("a fox", num_frames=2, num_inference_steps=1, **given)


def test_an_unknown_keyword_is_still_an_error(model):
    with pytest.raises(TypeError, match="picture"):
        Pipeline(model)("a fox", picture=clip()[0])


def test_adapters_of_all_kinds_are_the_same_in_half_precision_and_at_odd_sizes(fresh_model):
    """Guided, in windows, all at once, against float64: what bfloat16 rounds is a share of what they add."""
    (x, t, _), text = _inputs(2), torch.randn(4, 32, 128, generator=torch.Generator().manual_seed(2))
    x = torch.randn(4, 16, 4, 9, 13, generator=torch.Generator().manual_seed(1))  # two windows, of each guidance's half
    t = t[:1].expand(4)
    frames = clip(6, 72, 104)
    steers = Condition(image=frames[0], controls=(Control("edge", frames, 0.7), Control("pose", frames)))
    request = asked(num_frames=6, height=72, width=104, guidance_scale=2.0, sampler="ddim")
    found = {}
    for dtype in (torch.float64, torch.bfloat16):
        model = copy.deepcopy(beside(fresh_model))
        for network in model.networks.values():
            network.to(dtype)
        with torch.inference_mode():
            steer = steering(model, request, steers)
            words = text.to(dtype)
            hints = steer(x.to(dtype), t, words, 0.0, 1.0, [range(4), range(2, 6)]).arguments(words)
            plain = model.unet(x.to(dtype), t, words).double()
            found[dtype] = model.unet(x.to(dtype), t, **hints).double(), plain
    (exact, without), (half, _) = found.values()
    added = (exact - without).std()
    assert added > 0.05 * without.std()
    assert (half - exact).std() < 0.1 * added
