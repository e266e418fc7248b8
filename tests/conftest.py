"""What several test files share: the real data, where it is there, and a run of the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

SHORT = (
    "--dataset synthetic --block_size 32 --per_device_train_batch_size 2 --max_train_steps 3 --logging_steps 1 "
    "--no-save_final"
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


@pytest.fixture(scope="session")
def run_training() -> Callable[..., Run]:
    """Run train_clm.py on `world` gloo processes in `folder`; tiny, synthetic and short where the flags do not say."""

    def run(folder: Path, *flags: object, world: int = 1, from_scratch: bool = True, **env: str) -> Run:
        own = ["--model_name_or_path", "tiny", "--from_scratch"] if from_scratch else []
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
        command += [str(ROOT / "train_clm.py"), *own, *SHORT.split(), "--output_dir", str(folder / "run")]
        code_file = folder / "exit-code"
        code_file.unlink(missing_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CLM_EXIT_CODE_FILE": str(code_file)} | env
        done = subprocess.run(
            [*command, *map(str, flags)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
        )
        code = int(code_file.read_text()) if code_file.exists() else done.returncode
        return Run(code, done.stdout, folder / "run")

    return run


@pytest.fixture
def train(tmp_path: Path, run_training: Callable[..., Run]) -> Callable[..., Run]:
    """`run_training` in a folder of this test's own."""
    return lambda *flags, **options: run_training(tmp_path, *flags, **options)
