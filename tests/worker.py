"""Runs several command lines of train_clm.py one after the other in the processes of one torchrun.

Importing torch and ColossalAI takes a rank longer than training `tiny`. Usage: worker.py COMMANDS.json OUTPUT.json
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

import runtime
import train_clm
from args import ConfigError, parse_args


def run(argv: list[str], process: runtime.Runtime) -> tuple[int, str]:
    """Return exit code and output of one command line."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        runtime.start_logging(process)
        try:
            code = train_clm.run(parse_args(argv), process)
        except ConfigError as error:
            print(error)
            code = runtime.EXIT_CONFIG
    return code, output.getvalue()


def main(commands: Path, answer: Path) -> None:
    """Run every command line of `commands` and write rank 0's codes and outputs."""
    process = runtime.current_runtime()
    done = [run(argv, process) for argv in json.loads(commands.read_text())]
    if process.is_main:
        answer.write_text(json.dumps(done))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
