"""Runs command lines of train_clm.py in ranks that it forks: importing the libraries takes longer than training `tiny`.

Reads orders from stdin, a line of JSON each: [world size, COMMANDS.json, ANSWER.json, whether random weights are cast as
they are drawn]. The answer is rank 0's exit code and output of each command line, or the text of what went wrong.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from transformers import PretrainedConfig

import model
import planner
import runtime
import train_clm
from args import ConfigError, parse_args
from benchmarks.forks import fork_ranks

# Through them torch and ColossalAI; and what transformers only imports when it is asked for a model.
LIBRARIES = (
    "recorder",
    "strategy",
    "colossal_ext",
    "transformers.models.opt.modeling_opt",
    "transformers.optimization",
)


def run(argv: list[str], process: runtime.Runtime) -> tuple[int, str]:
    """Return exit code and output of one command line."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        runtime.start_logging(process)
        try:
            code = train_clm.run(parse_args(argv), process)
        except ConfigError as error:
            print(error.lines)
            code = runtime.EXIT_CONFIG
    return code, output.getvalue()


@contextlib.contextmanager
def cast_as_drawn() -> Iterator[None]:
    """Draw random weights module by module, each cast at once, as those of a large model are on GPUs."""

    def draw(config: PretrainedConfig, device: torch.device, place: Callable[[nn.Module], Any] | None) -> nn.Module:
        return model.draw_weights(model.without_weights(config), device, place)

    with patch.object(model, "_random_weights", draw), patch.object(planner, "weights_place", return_value="cast"):
        yield


def run_rank(commands: str, answer: Path, casts: bool) -> None:
    """Run every command line of `commands` as torchrun's rank would, and let rank 0 write the answer."""
    process = runtime.current_runtime()
    done = []
    with cast_as_drawn() if casts else contextlib.nullcontext():
        for argv in json.loads(Path(commands).read_text()):
            done.append(run(argv, process))
            # A rank far ahead could hold the next folder's lock when the others look whether it is free.
            if dist.is_initialized():
                dist.barrier()
    if process.is_main:
        write(answer, done)
    os._exit(0)  # ColossalAI's process groups complain when the interpreter ends


def write(answer: Path, content: object) -> None:
    """Write a file that whoever waits for it finds whole."""
    half = answer.with_suffix(".half")
    half.write_text(json.dumps(content))
    half.rename(answer)


def main() -> None:
    """Import everything once, then carry out the orders."""
    runtime.quiet_third_parties(runtime.current_runtime())
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()  # what is imported stays: no collection of a rank's needs to look at it
    for line in sys.stdin:
        world, commands, answer, casts = json.loads(line)
        try:
            fork_ranks(run_rank, world, commands, Path(answer), casts)
        except Exception:
            write(Path(answer), traceback.format_exc())


if __name__ == "__main__":
    main()
