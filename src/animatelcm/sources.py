"""The data of a run: clips by its config, as pixels or as latents encoded once, with what its adapter looks at."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from animatelcm.config import DataConfig, TrainConfig
from animatelcm.data import latents, looks, texts
from animatelcm.data.batches import Batches, ClipDataset, pixel_batches, with_first, with_maps
from animatelcm.data.clips import FolderDataset, visible
from animatelcm.data.emoji import EmojiClips, EmojiImages
from animatelcm.data.sprites import SMALL_CONCEPTS, SpritePack
from animatelcm.memory import attempt
from animatelcm.model import VideoModel

FRAMES = 32
"""What goes through the autoencoder at a time, where memory suffices."""
_ENDS = 2**16  # bytes: how much of each end of a file tells it from others of its name and size


class Source(NamedTuple):
    """The data of a run: the clips, batches of them by index, and how many threads may make these ahead."""

    dataset: ClipDataset
    batches: Batches
    workers: int = 0


def open_source(config: TrainConfig, model: VideoModel, rank: int = 0, processes: int = 1) -> Source:
    """The data of a run, batches being on the model's device if that is CUDA: as pixels, or as latents that all
    processes encode together, once, and keep in ``<out>/cache``.

    Raises ValueError, before anything is encoded, where the adapter's maps are missing or cannot be made.
    """
    data, adapter = config.data, config.adapter
    dataset = open_dataset(data)
    if config.trainable == "motion" and isinstance(dataset, FolderDataset) and dataset.stills:
        raise ValueError(f"{data.path} holds images, and temporal layers learn from clips; give a folder of videos")
    maps = _maps(config, dataset)
    batches = _kept(config, model, dataset, rank, processes) if data.cache else pixel_batches(dataset)
    sees_pixels = adapter is not None and not adapter.reads_maps and adapter.sees == "pixels"
    if maps is not None:
        batches = with_maps(batches, maps)
    elif sees_pixels:
        batches = with_first(batches, dataset)
    decodes = data.kind == "folder" and (not data.cache or maps is not None or sees_pixels)
    workers = (2 if decodes else 0) if data.workers is None else data.workers
    return Source(dataset, lambda indices: batches(indices).to(model.device), workers)


def open_dataset(data: DataConfig) -> ClipDataset:
    """The clips that a data config describes."""
    if data.path is not None:
        return FolderDataset(
            data.path,
            num_frames=data.num_frames,
            frame_stride=None if data.fps is not None else data.frame_stride,
            fps=data.fps,
            size=(data.height, data.width),
            caption_column=data.caption_column,
            seed=data.seed if data.window == "random" else None,
            repeats=data.repeats,
        )
    sheets = {Path(style).stem: Path(style) for style in data.styles if style.endswith(".webp")}
    styles = tuple(Path(style).stem if style.endswith(".webp") else style for style in data.styles)
    pack = SpritePack(extra_styles=sheets)
    concepts = SMALL_CONCEPTS if data.concepts == "small" else tuple(pack.concepts)
    common = {"length": data.length, "seed": data.seed, "concepts": concepts, "styles": styles, "pack": pack}
    if data.kind == "emoji-images":
        return EmojiImages(**common, moments=data.moments)
    return EmojiClips(**common, degrade=data.degrade)


def _maps(config: TrainConfig, dataset: ClipDataset) -> looks.Maps | None:
    """What gives a run's control maps, if its adapter reads some; checked now."""
    if config.adapter is None or not config.adapter.reads_maps:
        if config.data.maps is not None:
            raise ValueError(
                f"data.maps={config.data.maps}, but {config.name} trains nothing that reads maps; leave it out"
            )
        return None
    if config.data.maps is not None:
        assert isinstance(dataset, FolderDataset)  # as the config was checked
        return looks.ready(dataset, config.data.maps)
    looks.check(dataset, config.adapter.name)
    return partial(looks.control, dataset, config.adapter.name)


# Latents and text embeddings that are kept


def _kept(config: TrainConfig, model: VideoModel, dataset: ClipDataset, rank: int, processes: int) -> Batches:
    folder, kind = config.out / "cache", config.data.kind
    with torch.no_grad(), _bar(shown=rank == 0) as progress:
        paths = latents.encode_pieces(
            dataset,
            _thrifty(model),
            latents.place(folder, kind, f"{described(config.data)}/{_reading(model)}"),
            at_a_time=max(1, FRAMES // len(dataset[0].frames)),
            workers=2 if config.data.workers is None and kind == "folder" else config.data.workers or 0,
            rank=rank,
            processes=processes,
            progress=progress,
        )
        batches = latents.kept_batches(paths)
        if config.trainable != "image":  # else the text encoder trains too
            captions = [latents.captions(path) for path in paths]
            place = latents.place(folder, "texts", f"{captions}/{model.fingerprint('text_encoder')}")
            said = texts.embed_pieces(paths, model.embed, place, rank=rank, processes=processes)
            batches = texts.with_text(batches, said)
    if isinstance(dataset, FolderDataset):
        dataset.notice(latents.sources(paths))
    return batches


def _thrifty(model: VideoModel) -> Callable[[Tensor], Tensor]:
    """``model.encode``; from where memory does not suffice on, half as many frames at a time."""
    chunks = [FRAMES]

    def encode(pixels: Tensor) -> Tensor:
        while (found := attempt(lambda: model.encode(pixels, chunks[-1]))) is None:
            if chunks[-1] == 1:
                raise ValueError(
                    f"{model.device} has too little memory to encode one frame; choose a smaller data.width"
                )
            chunks.append(chunks[-1] // 2)
        return found

    return encode


def described(data: DataConfig) -> str:
    """What clips depend on, wherever they lie: the fields that choose them, and of a folder names, sizes and contents,
    of captions the whole and of other files both ends."""
    if data.path is None:
        names = ("kind", "length", "seed", "concepts", "moments", "degrade")
        content = [_digest(Path(style)) if style.endswith(".webp") else style for style in data.styles]
    else:
        names = ("kind", "num_frames", "frame_stride", "fps", "window", "repeats", "caption_column", "width", "height")
        names += ("seed",) if data.window == "random" else ()
        root, files = data.path, sorted(visible(data.path))
        with ThreadPoolExecutor(8) as pool:
            content = list(zip(files, pool.map(lambda name: _digest(root / name), files), strict=True))
    return f"{[(name, getattr(data, name)) for name in names]}/{content}"


def _digest(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    with path.open("rb") as file:
        if size <= 2 * _ENDS or path.suffix in (".txt", ".csv", ".jsonl"):
            digest.update(file.read())
        else:
            digest.update(file.read(_ENDS))
            file.seek(-_ENDS, 2)
            digest.update(file.read())
    return digest.hexdigest()


def _reading(model: VideoModel) -> str:
    """A hash of what latents depend on in an autoencoder; its decoder may learn on."""
    digest = hashlib.blake2b(str(model.vae.config.scaling_factor).encode(), digest_size=8)
    for name, value in sorted(model.vae.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(name.encode() + value.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _bar(*, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr of (done, total) clips; a line at each tenth where stderr is no terminal."""
    console, tenths = Console(stderr=True, quiet=not shown), 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, speed_estimate_period=300) as bar:
        task = bar.add_task("encoding clips", visible=False)

        def show(done: int, total: int) -> None:
            nonlocal tenths
            bar.update(task, completed=done, total=total, visible=done < total)
            if not console.is_terminal and done < total and 10 * done // total > tenths:
                tenths = 10 * done // total
                console.print(f"encoded {done} of {total} clips")

        yield show
