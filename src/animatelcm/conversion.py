"""Files of one community's format into another's: motion modules, LoRAs, and whole models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import date
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import get_args

import torch

from animatelcm.adapters import IMAGE
from animatelcm.building import empty_weights, read_json, read_part
from animatelcm.bundle import ADAPTERS, IMAGE_LORA, load, read_facts_file
from animatelcm.hub import find
from animatelcm.ldm import is_checkpoint, write_checkpoint
from animatelcm.model import VideoModel
from animatelcm.model_source import Target
from animatelcm.nets import emoji, sd15
from animatelcm.nets.text_encoder import TextConfig, TextEncoder
from animatelcm.nets.unet import UNetConfig, VideoUNet
from animatelcm.saving import check_folder, new_folder, save, scheduler_of, write_json
from animatelcm.schedule import NoiseSchedule
from animatelcm.weights.facts import IMAGE_ENCODER, MOTION, NOISE, SAMPLING, MotionFacts, read_facts
from animatelcm.weights.families import family_of
from animatelcm.weights.files import State, read_header, read_metadata, sha256
from animatelcm.weights.fuse import check
from animatelcm.weights.identify import identify
from animatelcm.weights.lora import Lora, modelspec, plain, read_lora, write_lora
from animatelcm.weights.motion import Layout, MotionFile, motion_modelspec, read_motion, weights_file, write_motion
from animatelcm.weights.motion import config as motion_settings

LORA_KINDS = ("lora", "motion_lora")
V1, V3 = (24, False), (32, False)
"""Positions of a motion module, and whether it has a middle block, by which other tools know AnimateDiff's versions.
v2 has 32 positions as well; of other numbers sd-webui-animatediff reads none."""
OF_THE_FILE = ("format", "lora_adapter_metadata", "modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
"""Metadata that are true of one file only."""


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What was written: a file with its hash, or a folder."""

    path: Path
    kind: str
    """What it is, for people to read."""
    sha256: str = ""


def convert(
    source: str | Path,
    out: Path,
    *,
    to: Target,
    dtype: torch.dtype = torch.float16,
    part: str = "",
    vae: str | Path = "",
) -> Converted:
    """Write what a source is (``hub.find``) in the format ``to``: a file, or a folder that appears whole or not at all.

    ==================  =================================================================================
    source              formats
    ==================  =================================================================================
    model, checkpoint   "bundle", "diffusers": a model folder; "checkpoint": its base in one file, as CompVis',
                        with nothing beside it; "animatediff": its motion module; "kohya", "peft": its image
                        acceleration, or the style that ``part`` names
    motion module       "animatediff": a file as AnimateDiff's, or AnimateLCM's; "diffusers": a
                        MotionAdapter's folder
    LoRA                "kohya", "peft"; of temporal layers "animatediff" too
    ==================  =================================================================================

    ``part``: of a model "teacher" (the teacher's motion module), "i2v" (its motion module with its image encoder, one
    file as AnimateLCM's image-to-video) or a style's name. ``vae``: an autoencoder in place of the model's own
    (``bundle.load``). Raises ValueError where a source has no such form, naming those it has.
    """
    out = Path(out)
    if to not in get_args(Target):
        raise ValueError(f"to={to!r} is not one of {', '.join(get_args(Target))}")
    place = find(source)
    header = {} if place.is_dir() else read_header(place)
    if (place / "unet").is_dir() or is_checkpoint(header):
        return _from_model(place, out, to, dtype, part, vae)
    _refuse_part(place, part, to)
    _refuse_vae(vae, str(place))
    if place.is_dir():
        return _from_motion(place, out, to, dtype)
    kind = identify(header)
    if kind.kind in LORA_KINDS:
        return _from_lora(place, out, to, dtype)
    if kind.kind == "motion":
        return _from_motion(place, out, to, dtype)
    raise ValueError(f"{place} is {kind}, which converts into nothing; give a model, a motion module or a LoRA")


def _from_model(place: Path, out: Path, to: Target, dtype: torch.dtype, part: str, vae: str | Path) -> Converted:
    """A model's folder or checkpoint: as a folder or one file, or one of its parts as a file."""
    if to in ("bundle", "diffusers"):
        _refuse_part(place, part, to)
        check_folder(out)
        model = load(place, dtype=dtype, image_scale=0.0, vae=vae)
        save(model, out, dtype, scheduler=scheduler_of(model) if to == "diffusers" else "DDIMScheduler")
        return Converted(path=out, kind=f"model folder ({to})")
    if to == "checkpoint":
        _refuse_part(place, part, to)
        _check_file(out)
        model = load(place, dtype=dtype, image_scale=0.0, adapters=(), keep_teacher=False, vae=vae)
        write_checkpoint(model, out, dtype)
        return Converted(path=out, kind=f"checkpoint (LDM's keys){_left_out(model, place)}", sha256=sha256(out))
    _refuse_vae(vae, repr(to))
    if to == "animatediff":
        return _motion_of_model(place, out, dtype, part)
    file = place / (Path("styles") / f"{part}.safetensors" if part else IMAGE_LORA)
    if not file.is_file():
        styles = sorted(path.stem for path in (place / "styles").glob("*.safetensors"))
        wanted = f"style {part!r}" if part else "image acceleration"
        fused = "" if styles else " (what was fused is in its weights: --to checkpoint)"
        raise ValueError(f"{place} has no {wanted}; its styles are: {', '.join(styles) or 'none'}{fused}")
    return _from_lora(file, out, to, dtype)


def _left_out(model: VideoModel, place: Path) -> str:
    """What of a model is not in its checkpoint, and how it becomes a file of its own: the end of a sentence."""
    adapters = {path.parent.name for path in (place / ADAPTERS).glob("*/config.json")}
    parts = {
        "temporal layers (--to animatediff)": model.unet.motion is not None,
        "image acceleration (--to kohya)": bool(model.image_lora),
        "styles (--to kohya --part NAME)": bool(model.styles),
        f"image encoder (--to animatediff --part {IMAGE})": IMAGE in adapters,
        f"adapters (in {ADAPTERS}/)": bool(adapters - {IMAGE}),
    }
    left = [name for name, there in parts.items() if there]
    return f" without {', '.join(left)}" if left else ""


def _motion_of_model(place: Path, out: Path, dtype: torch.dtype, part: str) -> Converted:
    """A model folder's motion module in AnimateDiff's keys, with its noise and settings in the header."""
    if part not in ("", "teacher", IMAGE):
        raise ValueError(f"{place}: part {part!r} does not go with 'animatediff'; choose 'teacher' or {IMAGE!r}")
    folder = place / ("motion_adapter_teacher" if part == "teacher" else "motion_adapter")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{place} has no {folder.name}; take a model that has temporal layers")
    found, encoder = read_motion(folder), {}
    if part == IMAGE:
        state, encoder = _image_encoder(place)
        found = replace(found, image_encoder=state)
    schedule = NoiseSchedule.from_diffusers(read_json(place / "scheduler" / "scheduler_config.json"))
    facts = read_facts_file(place, str(place))
    facts = facts.of_teacher() if part == "teacher" else facts
    said = MotionFacts(
        motion={key: value for key, value in motion_settings(found).items() if key in MOTION},
        noise={key: getattr(schedule, key) for key in NOISE},
        sampling={key: getattr(facts, key) for key in SAMPLING},
        image_encoder=encoder,
        positions=facts.sampler != "lcm",
    )
    return _write_motion_file(out, found, dtype, said)


def _image_encoder(place: Path) -> tuple[State, dict[str, float]]:
    """A model folder's image encoder, if it is of AnimateLCM's kind, of which such a file's tensors say nothing else,
    and what its header says."""
    folder = place / ADAPTERS / IMAGE
    if not (folder / "config.json").is_file():
        raise ValueError(f"{place} has no image encoder ({ADAPTERS}/{IMAGE}); leave part={IMAGE!r} out, or train one")
    config = read_json(folder / "config.json")
    kind = [config.get("_class_name"), config.get("sees", "latent"), config.get("spread", "repeat")]
    if kind != ["ImageEncoder", "latent", "repeat"]:
        raise ValueError(
            f"{folder} is of another kind than AnimateLCM's (a latent at every frame), which a file of motion modules "
            "cannot say; keep it in its folder"
        )
    said = {key: config[key] for key in IMAGE_ENCODER if key in config}
    return read_part(folder, "diffusion_pytorch_model"), said


def _from_motion(place: Path, out: Path, to: Target, dtype: torch.dtype) -> Converted:
    """A motion module in either of its two layouts, with what is known of it in the header."""
    found = read_motion(place)
    said = read_facts(weights_file(place)) or _facts_of_family(found, place)
    if to == "animatediff":
        return _write_motion_file(out, found, dtype, said)
    if to != "diffusers":
        raise ValueError(f"{place} is a motion module, which has no form {to!r}; choose animatediff or diffusers")
    check_folder(out)
    config = motion_settings(found) | dict(said.motion)
    with new_folder(out) as unfinished:
        write_motion(
            found.state,
            unfinished / "diffusion_pytorch_model.safetensors",
            layout="diffusers",
            dtype=dtype,
            rows=int(config["motion_max_seq_length"]),
            image_encoder=found.image_encoder,
            metadata=_modelspec(out, found, "diffusers") | said.to_metadata(),
        )
        write_json(unfinished / "config.json", {**config, "_class_name": "MotionAdapter"})
    return Converted(path=out, kind="MotionAdapter's folder")


def _facts_of_family(found: MotionFile, place: Path) -> MotionFacts:
    """What a community file's family says, for the layout that cannot show it."""
    name = identify(read_header(weights_file(place))).family
    if not name:
        return MotionFacts(positions=found.rows is not None)
    family = family_of(name)
    return MotionFacts(
        noise={key: getattr(family, key) for key in NOISE},
        sampling={key: getattr(family, key) for key in SAMPLING},
        positions=found.rows is not None,
    )


def _write_motion_file(out: Path, found: MotionFile, dtype: torch.dtype, said: MotionFacts) -> Converted:
    """In AnimateDiff's layout; without positions where the module is an AnimateLCM, which is known by that and by its
    middle block. How many frames it takes, if other tools could not read as many positions, is in the header."""
    _check_file(out)
    # With positions other tools look for no encoder; without them and a middle block sd-webui-animatediff fails.
    positions = not found.image_encoder and (said.positions or not found.mid_block)
    known = found.rows == V3[0] or ((found.rows, found.mid_block) == V1 and said.sampling.get("sampler") != "lcm")
    rows = None if not positions else found.rows if known else V3[0]
    taken = {} if found.rows in (None, rows) else {"motion_max_seq_length": found.rows}
    said = replace(said, motion={**taken, **said.motion}, positions=positions)
    metadata = _modelspec(out, found, "animatediff") | said.to_metadata()
    encoder = found.image_encoder
    write_motion(
        found.state, out, layout="animatediff", dtype=dtype, rows=rows, image_encoder=encoder, metadata=metadata
    )
    return Converted(path=out, kind="motion module (AnimateDiff's keys)", sha256=sha256(out))


def _modelspec(out: Path, found: MotionFile, layout: Layout) -> dict[str, str]:
    base = "emoji" if found.channels == emoji.UNET["block_out_channels"] else "stable-diffusion-v1"
    return motion_modelspec(title=out.stem, base=base, layout=layout, date=date.today().isoformat())


def _from_lora(place: Path, out: Path, to: Target, dtype: torch.dtype) -> Converted:
    """A LoRA in another layout, with all that it says of itself; its hashes are those of the new file."""
    if to not in ("kohya", "peft", "animatediff"):
        raise ValueError(f"{place} is a LoRA, which has no form {to!r}; choose kohya, peft or animatediff")
    _check_file(out)
    lora, base = _read_any_lora(place)
    layer = next(iter(plain(lora, place).values()))
    said = {key: text for key, text in read_metadata(place).items() if key not in OF_THE_FILE}
    facts = modelspec(
        title=said.get("modelspec.title", place.stem),
        kind=said.get("modelspec.category", "style"),
        base=base,
        rank=layer.rank,
        alpha=layer.alpha,
        date=said.get("modelspec.date", date.today().isoformat()),
    )
    write_lora(lora, out, metadata=facts | said, dtype=dtype, layout=to)
    return Converted(path=out, kind=f"LoRA ({to})", sha256=sha256(out))


def _read_any_lora(place: Path) -> tuple[Lora, str]:
    """A LoRA of Stable Diffusion 1.5 or of the miniature, and which. Raises ValueError as for the former."""
    first: ValueError | None = None
    for base, shapes in {"stable-diffusion-v1": sd15, "emoji": emoji}.items():
        weights = _weights(shapes)
        try:
            lora = read_lora(place, [key.removesuffix(".weight") for key in weights])
            check(weights, [(lora, 1.0)])
        except ValueError as error:
            first = first or error
        else:
            return lora, base
    assert first is not None
    raise first


@cache
def _weights(shapes: ModuleType) -> State:
    """Maps and convolutions of a known architecture by ``<part>.<name>``, with temporal layers, without numbers."""
    with empty_weights():
        parts = {
            "unet": VideoUNet(UNetConfig.from_diffusers(shapes.UNET), shapes.MOTION),
            "text_encoder": TextEncoder(TextConfig(**shapes.TEXT)),
        }
    return {
        f"{part}.{key}": value
        for part, network in parts.items()
        for key, value in network.state_dict().items()
        if key.endswith(".weight") and value.ndim > 1
    }


def _check_file(out: Path) -> None:
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: a file of weights is written as .safetensors; name it so")


def _refuse_part(place: Path, part: str, to: str) -> None:
    if part:
        raise ValueError(f"{place}: part {part!r} does not go with {to!r}")


def _refuse_vae(vae: str | Path, other: str) -> None:
    if vae:
        raise ValueError(
            f"an autoencoder ({vae}) goes into a model that is written as bundle, diffusers or checkpoint, not into "
            f"{other}; leave it out"
        )
