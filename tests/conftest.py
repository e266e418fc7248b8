"""What several test files share: the real data, where it is there, and a run of the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

SHORT = (
    "--dataset synthetic --block_size 32 --per_device_train_batch_size 2 --max_train_steps 3 --logging_steps 1 "
    "--no-save_final --save_strategy no"
)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real Netflix and WikiText files and the OPT tokenizer (`CLM_TEST_DATA`)."""
    folder = Path(os.environ.get("CLM_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data: set CLM_TEST_DATA ({folder} is not there)")
    return folder


@dataclass(frozen=True)
class Run:
    """A finished command: its exit code, what it printed, and its results."""

    code: int
    output: str
    folder: Path

    @property
    def result(self) -> dict[str, Any]:
        return json.loads((self.folder / "result.json").read_text())

    @property
    def losses(self) -> list[float]:
        return [loss for _, loss in self.result["train_loss"]]


def torchrun(script: Path, world: int, *arguments: object, **env: str) -> tuple[int, str]:
    """Return exit code and output of a script on `world` gloo processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", str(script)]
    done = subprocess.run(
        [*command, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    return done.returncode, done.stdout


def command_line(folder: Path, flags: Sequence[object], *, from_scratch: bool = True) -> list[str]:
    """Return train_clm.py's arguments; tiny, synthetic and short where the flags do not say."""
    own = ["--model_name_or_path", "tiny", "--from_scratch"] if from_scratch else []
    return [*own, *SHORT.split(), "--output_dir", str(folder), *map(str, flags)]


@pytest.fixture(scope="session")
def run_training() -> Callable[..., Run]:
    """Run train_clm.py as a user does, with its results in `folder`/run."""

    def run(folder: Path, *flags: object, world: int = 1, from_scratch: bool = True, **env: str) -> Run:
        code_file = folder / "exit-code"
        code_file.unlink(missing_ok=True)
        arguments = command_line(folder / "run", flags, from_scratch=from_scratch)
        code, output = torchrun(ROOT / "train_clm.py", world, *arguments, CLM_EXIT_CODE_FILE=str(code_file), **env)
        return Run(int(code_file.read_text()) if code_file.exists() else code, output, folder / "run")

    return run


@pytest.fixture(scope="session")
def run_many() -> Callable[..., dict[str, Run]]:
    """Run several command lines, by name, in the processes of one torchrun; results in `folder`/<name>."""

    def run(folder: Path, flags: Mapping[str, Sequence[object]], *, world: int, **options: bool) -> dict[str, Run]:
        commands, answer = folder / "commands.json", folder / "answer.json"
        commands.write_text(json.dumps([command_line(folder / name, flags[name], **options) for name in flags]))
        code, output = torchrun(ROOT / "tests" / "worker.py", world, commands, answer)
        assert code == 0, output
        done = json.loads(answer.read_text())
        return {name: Run(code, text, folder / name) for name, (code, text) in zip(flags, done, strict=True)}

    return run


@pytest.fixture
def train(tmp_path: Path, run_training: Callable[..., Run]) -> Callable[..., Run]:
    """`run_training` in a folder of this test's own."""
    return lambda *flags, **options: run_training(tmp_path, *flags, **options)
