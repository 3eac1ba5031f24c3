"""Where weights lie: the embedded bundle, a path, or the Hugging Face hub and its local cache."""

from __future__ import annotations

import os
import re
from pathlib import Path

from animatelcm.weights.files import PICKLES, WEIGHT_SUFFIXES

ASSETS = Path(__file__).parent / "assets"
FOLDERS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "motion_adapter*", "loras", "styles", "adapters")
MODEL_FILES = ["*.json", *(f"{folder}/*" for folder in FOLDERS)]
MOTION_FILES = ["config.json", "diffusion_pytorch_model*"]
ADAPTER_FILES = ["config.json", "diffusion_pytorch_model*"]
LORA_FILES = ["pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"]
OTHER_COPIES = ["*.non_ema.*", "*.msgpack", "*.onnx*", "*.h5", "*.xml"]
HALVES = ["*.fp16.*"]
EMBEDDED = {"model": "'emoji', "}
PAGES = ("models", "datasets", "spaces")
"""The hub's own, whose names no owner of a repository has."""
SITES = ("https://huggingface.co/", "https://hf.co/")


def find(source: str | Path, files: list[str] = MODEL_FILES, what: str = "model") -> Path:
    """The folder or file of a source, fetched into the local cache if need be (``HF_HUB_OFFLINE`` is honoured).

    A source is "emoji" (embedded), a path (``~`` is home), a hub id ``owner/name`` (the repository's ``files``,
    safetensors where it has them), or one file of a repository: ``owner/name/path/file.safetensors``, or its page's
    address. What begins with a folder that is here, or as only paths do, is never looked for on the hub. Raises
    ValueError naming ``what`` is missing: the file, or the id.
    """
    text = os.path.expanduser(str(source))  # noqa: PTH111 - pathlib's raises where nobody has that name
    if text == "emoji":
        return ASSETS / "emoji" / "model"
    if Path(text).exists():
        return Path(text)
    site = next((site for site in SITES if text.startswith(site)), "")
    owner, _, rest = text.removeprefix(site).partition("?")[0].partition("/")
    name, _, path = rest.partition("/")
    revision = "main"
    if site and path.startswith(("blob/", "resolve/")) and path.count("/") > 1:
        _, revision, path = path.split("/", 2)
    if not site and _is_path(text):
        raise ValueError(f"{what} {text!r}: there is no such file or folder; give one that exists")
    whole = owner and name and not name.endswith(WEIGHT_SUFFIXES)
    if not whole or (path and not path.endswith(WEIGHT_SUFFIXES)):
        raise ValueError(
            f"no {what} {text!r}: give {EMBEDDED.get(what, '')}an existing file or folder, a hub id such as "
            "'owner/name', or a file there such as 'owner/name/file.safetensors'"
        )
    return _file(f"{owner}/{name}", path, revision) if path else _repository(f"{owner}/{name}", files, what)


def _is_path(text: str) -> bool:
    """Whether it can only be a path: of the hub's names none begins so, nor has such letters."""
    owner, slash, rest = text.partition("/")
    names = f"{owner}/{rest.partition('/')[0]}"
    strange = bool(slash) and not re.fullmatch(r"[\w.-]+/[\w.-]*", names, re.ASCII)
    return text.startswith((".", "/", "~")) or strange or (bool(slash) and (owner in PAGES or Path(owner).is_dir()))


def _file(repository: str, path: str, revision: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, path, revision=revision))
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise ValueError(
            f"there is no file {repository}/{path} here; on the hub, {path} of {repository!r} is neither in the local "
            f"cache nor reachable: check both names and the network ({_first_line(error)})"
        ) from error


def _repository(repository: str, files: list[str], what: str) -> Path:
    """A repository's files: full-precision safetensors where each of its folders has them, else all that it has."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    pickles = [f"*{suffix}" for suffix in PICKLES]
    try:
        for others in (OTHER_COPIES + HALVES + pickles, OTHER_COPIES + pickles, OTHER_COPIES):
            folder = Path(snapshot_download(repository, allow_patterns=files, ignore_patterns=others))
            if _complete(folder):
                break
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise ValueError(
            f"{what} {repository!r} is neither a folder, nor in the local cache, nor reachable ({_first_line(error)})"
        ) from error
    return folder


def _complete(folder: Path) -> bool:
    """Whether every network's folder that has settings has weights too."""
    places = [path.parent for path in folder.rglob("config.json")] or [folder]
    return all(any(place.glob("*.safetensors")) for place in places)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
