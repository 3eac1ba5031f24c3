"""What is timed: one request of one model, how ours answers it, and what its calls take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from animatelcm import bundle, decoding, memory
from animatelcm.adapters import IMAGE
from animatelcm.bench.timing import Memory, memory_of
from animatelcm.condition import Condition
from animatelcm.config import AdapterConfig, AdapterKind
from animatelcm.decoding import Draft
from animatelcm.hub import ASSETS
from animatelcm.model import Facts, VideoModel
from animatelcm.model_source import ModelSource
from animatelcm.nets import sd15
from animatelcm.nets.autoencoder import Autoencoder, AutoencoderConfig
from animatelcm.nets.motion import MotionModule
from animatelcm.nets.text_encoder import TextConfig, TextEncoder
from animatelcm.nets.unet import UNetConfig, VideoUNet
from animatelcm.request import SampleRequest
from animatelcm.sampling import drafts
from animatelcm.schedule import NoiseSchedule
from animatelcm.tokenizer import Tokenizer, read_merges

_T = TypeVar("_T")
Subject = Literal["emoji", "sd15-random"]
PROMPT = "a parrot"
RANDOM: dict[str, AdapterKind] = {IMAGE: "image", "edge": "t2i_adapter", "pose": "controlnet"}
"""Adapters that stand beside random weights, by name."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is timed: one request."""

    steps: int = 4
    guidance: float = 1.0
    frames: int = 16
    size: int = 64
    """Height and width in pixels."""
    batch: int = 1
    """Videos of one prompt: ours as many at a time as ``sampling.drafts`` has it, theirs at once."""
    context: int | None = None
    """Frames of a window. Default: all of them in one, as theirs."""
    steer: tuple[str, ...] = ()
    """Adapters, each of which steers a clip of its own: what they cost is measured, of ours alone."""

    def request(self, model: VideoModel) -> SampleRequest:
        """What is asked for, resolved."""
        asked = SampleRequest(
            prompt=PROMPT,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            num_frames=self.frames,
            height=self.size,
            width=self.size,
            num_videos_per_prompt=self.batch,
            context_length=min(self.frames, self.context or self.frames),
            sampler="lcm",
        )
        return asked.resolved(model.facts, model.downscale)


def subject(
    name: Subject, device: str = "cpu", dtype: torch.dtype = torch.float32, *, adapters: bool = False
) -> VideoModel:
    """The embedded model, or one of Stable Diffusion 1.5's size with AnimateDiff's layers and random weights; with
    ``adapters`` all of its own, or those of ``RANDOM``."""
    if name == "emoji":
        own = None if adapters else ()
        return bundle.load("emoji", device=device, dtype=dtype, adapters=own, keep_teacher=False)
    torch.manual_seed(0)
    with torch.device(device):
        unet = VideoUNet(UNetConfig.from_diffusers(sd15.UNET), sd15.MOTION)
        for module in unet.modules():
            if isinstance(module, MotionModule):  # or they would add nothing, and prove nothing
                torch.nn.init.normal_(module.proj_out.weight, std=0.01)
        vae, text = Autoencoder(AutoencoderConfig(**sd15.VAE)), TextEncoder(TextConfig(**sd15.TEXT))
    model = VideoModel(
        unet=unet.to(dtype).eval().requires_grad_(False),
        vae=vae.to(dtype).eval().requires_grad_(False),
        text_encoder=text.to(dtype).eval().requires_grad_(False),
        tokenizer=Tokenizer.from_merges(read_merges(ASSETS / "sd15" / "merges.txt"), sd15.TOKENS),
        schedule=NoiseSchedule(solver_steps=100),
        facts=Facts(name=name, sampler="lcm", num_inference_steps=4, guidance_scale=1.0),
    )
    if adapters:
        model.adapters = {name: random_adapter(name, model).to(dtype) for name in RANDOM}
    return model.to(device)


def random_adapter(name: str, model: VideoModel) -> nn.Module:
    """One of ``RANDOM`` for a model, with random weights."""
    from animatelcm.stages import fresh_adapter  # trainers and their data come with it

    latents, cell = model.vae.config.latent_channels, model.downscale
    config = AdapterConfig(name=name, kind=RANDOM[name])
    network = fresh_adapter(config, model.unet.config, latent_channels=latents, downscale=cell)
    return network.eval().requires_grad_(False)


def described(model: VideoModel, case: Case) -> dict[str, Any]:
    """What is timed, as a report says it."""
    return {
        "model": model.facts.name,
        "case": asdict(case),
        "device": str(model.device),
        "dtype": str(model.unet.dtype).removeprefix("torch."),
    }


def flops(model: VideoModel, case: Case) -> dict[str, int]:
    """Multiplications and additions of matrix products, convolutions and attention; counted on shapes alone."""
    cells, latents = case.size // model.downscale, model.vae.config.latent_channels
    rows = 2 if case.guidance != 1 else 1
    with torch.device("meta"), FlopCounterMode(display=False) as network:
        unet = VideoUNet(model.unet.config, model.unet.motion)
        text = torch.empty(rows, model.tokenizer.model_max_length, model.unet.config.cross_attention_dim)
        x = torch.empty(rows, model.unet.config.in_channels, case.frames, cells, cells)
        unet(x, torch.empty(rows, dtype=torch.long), text)
    with torch.device("meta"), FlopCounterMode(display=False) as decoder:
        Autoencoder(model.vae.config).requires_grad_(False).decode(torch.empty(case.frames, latents, cells, cells))
    return {
        "denoise": network.get_total_flops() * case.steps * case.batch,
        "decode": decoder.get_total_flops() * case.batch,
    }


def denoised(model: VideoModel, case: Case, seen: Condition | None = None) -> list[Tensor]:
    """Latents of a case, from the prompt, and from what else is ``seen``."""
    return [draft.latents for draft in drafts(model, case.request(model), condition=seen)]


def to_frames(model: VideoModel, case: Case) -> list[np.ndarray]:
    """uint8 (F, H, W, 3) of each video of a case, from the prompt."""
    return drawn(model, drafts(model, case.request(model)))


def drawn(model: VideoModel, made: Iterable[Draft]) -> list[np.ndarray]:
    """The same from latents, on a stream of its own, as files are written."""
    return [decoding.whole(model, draft).frames for draft in made]


def to_file(model: VideoModel, case: Case, folder: str) -> None:
    """Each video of a case as a file, from the prompt."""
    for i, draft in enumerate(drafts(model, case.request(model))):
        decoding.write(model, draft, Path(folder) / f"ours-{i}.mp4", source=ModelSource(), overwrite=True)


def in_chunks(model: VideoModel, case: Case) -> None:
    """The tensors of ``to_file`` in one thread, where the CPU's memory can be counted: frames chunk by chunk, the next
    one made before one is let go."""
    for draft in drafts(model, case.request(model)):
        for _chunk in decoding.frames(model, draft):  # held while the next is made
            pass


@contextmanager
def compiled_or_failing(model: VideoModel, *, wanted: bool) -> Iterator[None]:
    """Meanwhile Dynamo raises FailOnRecompileLimitHit where it would go on uncompiled, and would only say so in a log.
    Nothing changes where neither the model nor, if ``wanted``, a rival is compiled: Dynamo is slow to import."""
    if not wanted and model.compile != "full":
        yield
        return
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


def warmup(model: VideoModel) -> int:
    """Calls before those that are timed: of one evaluation each, the second is what records a CUDA graph."""
    return 2 if model.device.type == "cuda" else 1


def fresh_memory(model: VideoModel, call: Callable[[], object]) -> Memory:
    """What a call takes together with the CUDA graphs that it records: to replay one, whose tensors lie in memory of
    its own, allocates next to nothing. Those of the model's earlier calls would be held beside it, and are dropped."""
    model.forget_graphs()

    def calls() -> None:
        for _ in range(warmup(model)):
            call()

    return memory_of(calls, model.device)


def fitting(call: Callable[[], _T]) -> _T | None:
    """What a call returns; None where memory does not suffice for it, on either side."""
    try:
        return call()
    except (RuntimeError, MemoryError, ValueError) as error:
        given_up = isinstance(error, ValueError) and "too little memory" in str(error)  # by ours, which tried all ways
        if not given_up and not memory._of_memory(error):
            raise
    torch.cuda.empty_cache()  # out here, since the error held on to all that the call had made
    return None


def weights(networks: Iterable[nn.Module]) -> int:
    """Bytes of parameters and buffers, those that several share once."""
    tensors = (tensor for network in networks for tensor in (*network.parameters(), *network.buffers()))
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def networks(model: VideoModel) -> list[nn.Module]:
    """All that is loaded, a decoder in place of the model's own too."""
    return [*model.networks.values(), *([] if model.decoder is None else [model.decoder])]
