"""What several test files share: the real data, where it is there, and a run of the command line."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
# For processes of their own: the project, and where the libraries lie if that is no environment of Python's.
MODULE_PATH = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])

MINI = ROOT / "tests" / "mini"  # `tiny` with 512 tokens: its 50,272 are most of the time that a step of it takes
SHORT = (
    "--dataset synthetic --block_size 32 --per_device_train_batch_size 2 --max_train_steps 3 --logging_steps 1 "
    "--no-save_final --save_strategy no"
)


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from tests that need none: what they count is a CPU's ranks, threads and bytes. Hubs are their own."""
    os.environ.pop("HF_HUB_OFFLINE", None)
    if "gpu" not in re.sub(r"not (multi_)?gpu", "", config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


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
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": MODULE_PATH} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    return done.returncode, done.stdout


def command_line(folder: Path, flags: Sequence[object], *, from_scratch: bool = True) -> list[str]:
    """Return train_clm.py's arguments; mini, synthetic and short where the flags do not say."""
    own = ["--model_name_or_path", str(MINI), "--from_scratch", "--learning_rate", "1e-3"] if from_scratch else []
    return [*own, *SHORT.split(), "--output_dir", str(folder), *map(str, flags)]


@pytest.fixture(scope="session")
def run_training() -> Callable[..., Run]:
    """Run train_clm.py as a user does, with its results in `folder`/run."""

    def run(folder: Path, *flags: object, world: int = 1, from_scratch: bool = True, **env: str) -> Run:
        folder.mkdir(parents=True, exist_ok=True)
        code_file = folder / "exit-code"
        for left in folder.glob("exit-code*"):
            left.unlink()
        arguments = command_line(folder / "run", flags, from_scratch=from_scratch)
        code, output = torchrun(ROOT / "train_clm.py", world, *arguments, CLM_EXIT_CODE_FILE=str(code_file), **env)
        return Run(int(code_file.read_text()) if code_file.exists() else code, output, folder / "run")

    return run


@pytest.fixture(scope="session")
def worker() -> Iterator[subprocess.Popen[str]]:
    """tests/worker.py, which has imported everything and forks ranks on order."""
    environment = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": MODULE_PATH,
        # NVML counts the GPUs: CUDA's own answer would keep forked ranks from using them.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        # Newer instructions sum products of 16-bit numbers in another order, and losses differ in the fifth digit.
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
    }
    command = [sys.executable, str(ROOT / "tests" / "worker.py")]
    with subprocess.Popen(
        command, env=os.environ | environment, stdin=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        yield process
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def order(
    worker: subprocess.Popen[str], world: int, commands: Path, answer: Path, *, casts: bool, timeout_s: float = 240
) -> Any:
    """Return the worker's answer to an order."""
    assert worker.stdin is not None
    worker.stdin.write(json.dumps([world, str(commands), str(answer), casts]) + "\n")
    worker.stdin.flush()
    end = time.monotonic() + timeout_s
    while not answer.exists():
        assert worker.poll() is None and time.monotonic() < end, "the worker ended, or does not answer"
        time.sleep(0.02)
    return json.loads(answer.read_text())


@pytest.fixture(scope="session")
def run_many(worker: subprocess.Popen[str]) -> Callable[..., dict[str, Run]]:
    """Run several command lines, by name, one after the other in the same ranks; results in `folder`/<name>.

    With `casts` random weights are cast as they are drawn.
    """

    def run(
        folder: Path, flags: Mapping[str, Sequence[object]], *, world: int, casts: bool = False, **options: bool
    ) -> dict[str, Run]:
        commands, answer = folder / "commands.json", folder / "answer.json"
        commands.write_text(json.dumps([command_line(folder / name, flags[name], **options) for name in flags]))
        answer.unlink(missing_ok=True)
        done = order(worker, world, commands, answer, casts=casts)
        assert not isinstance(done, str), done
        return {name: Run(code, text, folder / name) for name, (code, text) in zip(flags, done, strict=True)}

    return run


@pytest.fixture
def train(tmp_path: Path, run_training: Callable[..., Run]) -> Callable[..., Run]:
    """`run_training` in a folder of this test's own."""
    return lambda *flags, **options: run_training(tmp_path, *flags, **options)
