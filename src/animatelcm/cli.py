"""The command line: verbs whose flags are the fields of the dataclasses that the library speaks; no logic here."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro
from tyro.conf import AvoidSubcommands, arg

from animatelcm import __version__, recipes
from animatelcm.config import TrainConfig
from animatelcm.evaluating import EvalClipsim, EvalFvd, EvalStability, EvalUcf101, EvalVbench
from animatelcm.measuring import Bench, EvalCompare, EvalEmoji, Report, Reproduce
from animatelcm.terminal import say
from animatelcm.verbs import Batch, Convert, Decode, Fuse, Generate, Inspect


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How to run a recipe, as opposed to what it is."""

    dry_run: bool = False
    """Print the resolved recipe and what a step of it will cost, and stop."""
    resume: bool = False
    """Continue from the newest checkpoint of the run's folder."""
    stop_after: int | None = None
    """Leave after this many steps with a checkpoint, to be resumed."""


def _train(config: TrainConfig, options: RunOptions) -> None:
    """Run a training recipe: animatelcm train RECIPE [--field value]; without a recipe it lists them."""
    if options.dry_run:
        _plan(config)
        return
    from animatelcm.training import train

    model = train(config, resume=options.resume, stop_after=options.stop_after)
    if model is not None:
        say(f"model in {model}")
        return
    say(f"stopped before step {config.steps}; the same line with --resume goes on")
    if options.stop_after is None:
        raise SystemExit(130)  # interrupted: a chain of recipes must not go on


def _plan(config: TrainConfig) -> None:
    """The resolved config as JSON on stdout, what it will cost on stderr."""
    say(config.to_json())
    if config.objective != "autoencoder":
        from animatelcm.planning import plan

        sys.stderr.write(plan(config).text() + "\n")


def main(argv: list[str] | None = None) -> None:
    """Run one verb; a user's error is one sentence on stderr and exit status 2, an interrupt 130."""
    words = sys.argv[1:] if argv is None else argv
    try:
        _run(words)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"animatelcm: {error}\n")
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        sys.stderr.write("animatelcm: interrupted\n")
        raise SystemExit(130) from None


VERBS = {
    "generate": Generate,
    "decode": Decode,
    "batch": Batch,
    "fuse": Fuse,
    "convert": Convert,
    "inspect": Inspect,
    "report": Report,
    "bench": Bench,
    "reproduce": Reproduce,
}
PROTOCOLS = {
    "emoji": EvalEmoji,
    "fvd": EvalFvd,
    "clipsim": EvalClipsim,
    "ucf101": EvalUcf101,
    "vbench": EvalVbench,
    "stability": EvalStability,
    "compare": EvalCompare,
}
"""Of ``eval``; compare measures nothing itself."""


def _run(words: list[str]) -> None:
    if words[:1] == ["--version"]:
        say(f"animatelcm {__version__}")
    elif words[:1] == ["train"]:
        _train_verb(_at_home(words[1:]))
    elif words[:1] == ["eval"]:
        _eval_verb(_at_home(words[1:]))
    elif words[:1] and words[0] in VERBS:
        tyro.cli(VERBS[words[0]], args=words[1:], prog=f"animatelcm {words[0]}").run()
    else:
        tyro.extras.subcommand_cli_from_dict({**VERBS, "eval": _eval, "train": _train}, args=words, prog="animatelcm")


def _eval() -> None:
    """Measure how good videos are: animatelcm eval PROTOCOL (emoji, fvd, clipsim, ucf101, vbench, stability), or eval
    compare."""


def _eval_verb(words: list[str]) -> None:
    """``eval PROTOCOL --flag value``."""
    if words[:1] in (["--help"], ["-h"]):
        said = "Measure how good videos are, each protocol by a command of its own."
        tyro.extras.subcommand_cli_from_dict(PROTOCOLS, args=["--help"], prog="animatelcm eval", description=said)
    if not words or words[0] not in PROTOCOLS:
        raise ValueError(f"eval needs a protocol, got {_given(words)}; protocols: {', '.join(PROTOCOLS)}")
    tyro.cli(PROTOCOLS[words[0]], args=words[1:], prog=f"animatelcm eval {words[0]}").run()


def _train_verb(words: list[str]) -> None:
    """``train RECIPE --field value``: the recipe's config is the flags' default."""
    if not words or words[0] not in recipes.__all__:
        raise ValueError(f"train needs a recipe, got {_given(words)}; recipes: {', '.join(recipes.__all__)}")

    recipe = getattr(recipes, words[0])

    def run(
        config: Annotated[TrainConfig, arg(name="", default=recipe())], options: Annotated[RunOptions, arg(name="")]
    ) -> None:
        _train(config, options)

    run.__annotations__["config"] = Annotated[TrainConfig, arg(name="", default=recipe())]
    tyro.cli(
        run,
        args=words[1:],
        prog=f"animatelcm train {words[0]}",
        description=recipe.__doc__,
        config=(AvoidSubcommands,),
    )


def _at_home(words: list[str]) -> list[str]:
    """Words with somebody's home in place of a path's ``~``, which shells leave alone in ``--flag=~/folder``."""
    split = [re.fullmatch(r"(--[\w.-]+=|)(~.*)", word, re.DOTALL) for word in words]
    return [at[1] + os.path.expanduser(at[2]) if at else word for at, word in zip(split, words, strict=True)]  # noqa: PTH111 - pathlib's raises where nobody has that name


def _given(words: list[str]) -> str:
    """What stands where a name was expected."""
    return "nothing" if not words or words[0].startswith("-") else repr(words[0])
