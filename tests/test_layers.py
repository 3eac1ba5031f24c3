"""Imports point one way: a file imports from its own row or the rows above it, and heavy libraries stay lazy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import animatelcm

ROOT = Path(animatelcm.__file__).parent
ROWS = [
    {"schedule", "solver", "consistency", "losses", "ema", "rng"},
    {"nets", "weights", "data", "video", "images", "streams", "colour", "control_maps", "hub"},
    {
        "config",
        "model_source",
        "request",
        "provenance",
        "prompts",
        "model",
        "building",
        "vae",
        "tokenizer",
        "ldm",
        "fusion",
        "bundle",
        "saving",
        "assembly",
        "adapters",
        "miniature",
        "roles",
    },
    {
        "objectives",
        "feedback",
        "condition",
        "sampling",
        "decoding",
        "memory",
        "windows",
        "evaluate",
        "page",
        "inspection",
        "conversion",
        "pipeline",
        "batch",
    },
    {
        "recipes",
        "checkpoint",
        "counting",
        "planning",
        "processes",
        "stages",
        "sources",
        "training",
        "log",
        "bench",
        "reproduce",
    },
    {"cli", "verbs", "measuring", "evaluating", "terminal", "server", "ui", "cluster", "__main__"},
]


def _row(module: str) -> int:
    (found,) = [i for i, row in enumerate(ROWS) if module in row]
    return found


def _imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    names |= {
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "animatelcm"
        for alias in node.names
    }
    return {name.split(".")[1] for name in names if name.startswith("animatelcm.")} - {"__version__"}


def test_imports_point_one_way():
    wrong = []
    for path in ROOT.rglob("*.py"):
        module = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if module != "__init__":
            wrong += [f"{path.name} -> {name}" for name in _imports(path) if _row(name) > _row(module)]
    assert not wrong


def test_the_mathematics_needs_torch_alone():
    allowed = {
        "torch",
        "animatelcm",
        "__future__",
        "typing",
        "collections",
        "dataclasses",
        "functools",
        "hashlib",
        "math",
    }
    for module in ROWS[0]:
        tree = ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))
        imported = {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
        imported |= {alias.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
        assert imported <= allowed, module


def test_the_command_line_imports_nothing_heavy():
    heavy = ("torch", "numpy", "diffusers", "transformers", "av", "PIL")
    code = f"import sys, animatelcm.cli; print(*(m for m in {heavy} if m in sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.split() == []


def test_a_video_from_the_command_line_needs_torch_alone(tmp_path):
    """What others are there for, adapters and training, is not waited for; nor is torch's compiler."""
    heavy = ("diffusers", "transformers", "accelerate", "peft", "cv2", "scipy", "torch._dynamo", "torch._inductor")
    out = tmp_path / "x.mp4"
    words = ["generate", "a parrot", "--num-frames", "2", "--num-inference-steps", "1", "--out", str(out)]
    code = f"""
import sys
from animatelcm.cli import main
main({words})
print("imported", *(name for name in {heavy} if name in sys.modules))
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.is_file()
    assert shown.splitlines()[-1] == "imported"
