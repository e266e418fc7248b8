"""The launchers, under a fake torchrun that records what it was called with, and three times under the real one."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT

LAUNCHERS = ("run_clm.sh", "run_clm_synthetic.sh", "run_demo.sh")

FAKE_TORCHRUN = """#!/usr/bin/env bash
printf '%s\\0' "$@" >"$FAKE_FOLDER/argv"
env -0 >"$FAKE_FOLDER/env"
printf '%s' "${FAKE_CODE_FILE:-}" >"$CLM_EXIT_CODE_FILE"
exit "${FAKE_EXIT:-0}"
"""

# Stands for torchrun before it has ranks: it is told itself.
FAKE_TORCHRUN_THAT_WAITS = """
import os, pathlib, signal, sys, time
def end(number, frame):
    folder.joinpath("signal").write_text(str(number))
    sys.exit(1)
folder = pathlib.Path(os.environ["FAKE_FOLDER"])
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGINT, end)
folder.joinpath("ready").touch()
time.sleep(60)
"""

FAKE_NVIDIA_SMI = """#!/usr/bin/env bash
echo 'GPU 0: NVIDIA Fake (UUID: GPU-0)'
"""

# Stands for train_clm.py under the real torchrun. Rank 0 writes the exit code, as `runtime` does.
STUB_TRAINING = """
import os, pathlib, signal, sys, time
def end(code):
    time.sleep(0.5)  # as a checkpoint would take
    if os.environ["RANK"] == "0":
        pathlib.Path(os.environ["CLM_EXIT_CODE_FILE"]).write_text(str(code))
    pathlib.Path("ended-" + os.environ["RANK"]).touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, lambda number, frame: end(143))
if "--crash" in sys.argv:
    sys.exit(1)
if "--not_finite" in sys.argv:
    end(4)
pathlib.Path("ready-" + os.environ["RANK"]).touch()
time.sleep(60)
"""


@dataclass(frozen=True)
class Launch:
    """A finished launcher, and what the fake torchrun saw of it (None: it was never called)."""

    exit_code: int
    stdout: str
    stderr: str
    argv: list[str] | None
    env: dict[str, str]

    @property
    def torchrun_flags(self) -> list[str]:
        assert self.argv is not None, self.stderr
        return self.argv[: self._script]

    @property
    def flags(self) -> list[str]:
        """Everything after train_clm.py."""
        assert self.argv is not None, self.stderr
        return self.argv[self._script + 1 :]

    @property
    def _script(self) -> int:
        assert self.argv is not None
        return next(i for i, word in enumerate(self.argv) if Path(word).name == "train_clm.py")

    def value(self, flag: str) -> str | None:
        """What argparse would take: the last value of `flag`."""
        places = [i for i, word in enumerate(self.flags) if word == flag]
        return self.flags[places[-1] + 1] if places else None


Launcher = Callable[..., Launch]
Starter = Callable[..., subprocess.Popen[str]]


def python_program(path: Path, *arguments: str | Path) -> Path:
    """Write a program that is this Python with `arguments`: one file, whatever spaces the paths have."""
    command = shlex.join(map(str, (sys.executable, *arguments)))
    return write_program(path, f'#!/usr/bin/env bash\nexec {command} "$@"\n')


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def clean_env(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine without a GPU, whose torchrun is the fake one."""
    fake = write_program(tmp_path / "fake" / "torchrun", FAKE_TORCHRUN)
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH") if name in os.environ}
    return kept | {"CUDA_VISIBLE_DEVICES": "", "TORCHRUN": str(fake), "FAKE_FOLDER": str(tmp_path)}


@pytest.fixture
def with_gpu(clean_env: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Variables that make the machine look as if it had one GPU."""
    write_program(tmp_path / "bin" / "nvidia-smi", FAKE_NVIDIA_SMI)
    return {"CUDA_VISIBLE_DEVICES": "0", "PATH": f"{tmp_path / 'bin'}:{clean_env['PATH']}"}


@pytest.fixture
def launch(clean_env: dict[str, str], tmp_path: Path) -> Launcher:
    """A function (script, *arguments, **environment) -> Launch. `None` unsets a variable."""

    def run(script: str, *arguments: str, **environment: str | None) -> Launch:
        env = {name: value for name, value in (clean_env | environment).items() if value is not None}
        done = subprocess.run(
            ["bash", ROOT / script, *arguments], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        seen = [
            (tmp_path / name).read_text().split("\0")[:-1] if (tmp_path / name).exists() else None
            for name in ("argv", "env")
        ]
        variables = dict(line.split("=", 1) for line in seen[1] or [])
        return Launch(done.returncode, done.stdout, done.stderr, seen[0], variables)

    return run


# --- arguments -------------------------------------------------------------------------------------------------------


def test_with_a_gpu_the_defaults_are_batch_16_no_cap_and_opt_6_7b_on_one_gpu(launch: Launcher, with_gpu: Any) -> None:
    done = launch("run_clm.sh", **with_gpu)
    assert done.flags == [
        *("--per_device_train_batch_size", "16"),
        *("--mem_cap", "0"),
        *("--model_name_or_path", "6.7b"),
    ]
    assert done.torchrun_flags == ["--standalone", "--nproc_per_node", "1"]


def test_the_synthetic_launcher_trains_125m_from_random_weights_on_random_tokens(
    launch: Launcher, with_gpu: Any
) -> None:
    done = launch("run_clm_synthetic.sh", **with_gpu)
    assert (done.value("--model_name_or_path"), done.value("--dataset")) == ("125m", "synthetic")
    assert "--from_scratch" in done.flags


@pytest.mark.parametrize("script", ["run_clm.sh", "run_clm_synthetic.sh"])
def test_the_four_positions_are_batch_cap_model_and_processes(launch: Launcher, script: str) -> None:
    done = launch(script, "4", "12.5", "tiny", "2")
    assert done.value("--per_device_train_batch_size") == "4"
    assert done.value("--mem_cap") == "12.5"
    assert done.value("--model_name_or_path") == "tiny"
    assert done.torchrun_flags[-2:] == ["--nproc_per_node", "2"]


def test_positions_left_out_keep_their_documented_defaults_even_without_a_gpu(launch: Launcher) -> None:
    done = launch("run_clm.sh", "4")
    assert done.value("--per_device_train_batch_size") == "4"
    assert done.value("--model_name_or_path") == "6.7b"
    assert "--from_scratch" not in done.flags


def test_flags_may_follow_any_number_of_positions_and_come_last(launch: Launcher) -> None:
    done = launch("run_clm.sh", "4", "0", "--plugin", "gemini", "--mem_cap", "7")
    assert done.flags[-4:] == ["--plugin", "gemini", "--mem_cap", "7"]
    assert done.value("--mem_cap") == "7"


@pytest.mark.parametrize("script", LAUNCHERS)
def test_the_users_flags_come_last_in_every_launcher(launch: Launcher, script: str) -> None:
    assert launch(script, "--plugin", "gemini").flags[-2:] == ["--plugin", "gemini"]


@pytest.mark.parametrize("script", LAUNCHERS)
def test_spaces_quotes_and_empty_words_arrive_as_they_were_typed(launch: Launcher, script: str) -> None:
    words = ["--train_file", "my data/it's $HOME *.txt", "--prompt", ""]
    assert launch(script, *words).flags[-4:] == words


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        (["x"], "argument 1"),
        (["0"], "argument 1"),
        (["-1"], "argument 1"),
        (["1.5"], "argument 1"),
        (["4", "much"], "argument 2"),
        (["4", "0", ""], "argument 3"),
        (["4", "0", "tiny", "two"], "argument 4"),
        (["4", "0", "tiny", "2", "gemini"], "argument 5"),
    ],
)
@pytest.mark.parametrize("script", ["run_clm.sh", "run_clm_synthetic.sh"])
def test_a_bad_position_is_one_line_that_names_it_and_exit_2(
    launch: Launcher, script: str, arguments: list[str], place: str
) -> None:
    done = launch(script, *arguments)
    assert (done.exit_code, done.argv) == (2, None)
    assert place in done.stderr
    assert len(done.stderr.splitlines()) == 1


# --- help and dry run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [*LAUNCHERS, "run_benchmark.sh", "setup.sh"])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_prints_the_usage_and_starts_nothing(launch: Launcher, script: str, flag: str) -> None:
    done = launch(script, flag, TORCHRUN=None)
    assert done.exit_code == 0
    assert done.stdout.startswith("usage:")
    assert script in done.stdout


def test_help_after_other_arguments_is_help_too(launch: Launcher) -> None:
    done = launch("run_clm.sh", "4", "0", "tiny", "--help")
    assert done.stdout.startswith("usage:")
    assert done.argv is None


@pytest.mark.parametrize("script", LAUNCHERS)
def test_a_dry_run_prints_a_command_that_a_shell_reads_back_and_starts_nothing(launch: Launcher, script: str) -> None:
    done = launch(script, "--prompt", "it's a b", DRY_RUN="1", TORCHRUN=None, OMP_NUM_THREADS="3")
    words = shlex.split(done.stdout)
    assert done.exit_code == 0
    assert done.argv is None
    assert words[0] == "OMP_NUM_THREADS=3"
    assert words[1:4] == [str(ROOT / ".venv/bin/python"), "-m", "torch.distributed.run"]
    assert words[-2:] == ["--prompt", "it's a b"]


def test_skip_setup_takes_the_python3_on_the_path_or_the_one_named(launch: Launcher) -> None:
    for named, used in ((None, "python3"), ("python9", "python9")):
        done = launch("run_clm.sh", "4", DRY_RUN="1", TORCHRUN=None, SKIP_SETUP="1", PYTHON=named)
        assert shlex.split(done.stdout)[1] == used


# --- machines without a GPU ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["run_clm.sh", "run_clm_synthetic.sh"])
def test_without_a_gpu_and_arguments_a_launcher_says_that_it_rehearses_tiny(launch: Launcher, script: str) -> None:
    done = launch(script)
    assert done.value("--model_name_or_path") == "tiny"
    assert int(done.value("--max_train_steps") or 0) > 0
    assert "--from_scratch" in done.flags
    assert len(done.stderr.splitlines()) == 1
    assert "rehearsing" in done.stderr


@pytest.mark.parametrize("script", ["run_clm.sh", "run_clm_synthetic.sh"])
def test_flags_alone_keep_the_rehearsal_and_win_over_it(launch: Launcher, script: str) -> None:
    done = launch(script, "--max_train_steps", "3")
    assert (done.value("--model_name_or_path"), done.value("--max_train_steps")) == ("tiny", "3")


@pytest.mark.parametrize("flags", [("--model_name_or_path", "RUN/final"), ("--model_name_or_path=RUN/final",)])
def test_who_names_a_model_gets_no_random_weights(launch: Launcher, flags: tuple[str, ...]) -> None:
    done = launch("run_clm.sh", *flags)
    assert "--from_scratch" not in done.flags and "rehearsing" not in done.stderr


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles"])
def test_hidden_gpus_are_no_gpus(launch: Launcher, with_gpu: Any, visible: str) -> None:
    done = launch("run_clm.sh", **with_gpu | {"CUDA_VISIBLE_DEVICES": visible})
    assert done.value("--model_name_or_path") == "tiny"


@pytest.mark.parametrize("visible", [None, "0", "2,3", "GPU-0"])
def test_a_visible_gpu_is_found_by_nvidia_smi(launch: Launcher, with_gpu: Any, visible: str | None) -> None:
    done = launch("run_clm.sh", **with_gpu | {"CUDA_VISIBLE_DEVICES": visible})
    assert done.value("--model_name_or_path") == "6.7b"


def test_an_nvidia_smi_that_finds_no_driver_is_no_gpu(launch: Launcher, with_gpu: Any, tmp_path: Path) -> None:
    write_program(tmp_path / "bin" / "nvidia-smi", "#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert launch("run_clm.sh", **with_gpu).value("--model_name_or_path") == "tiny"


# --- several processes and machines ----------------------------------------------------------------------------------


def test_processes_share_the_cores_unless_the_user_says_otherwise(launch: Launcher) -> None:
    num_cores = len(os.sched_getaffinity(0))
    for num_processes in (1, 2, 1000):
        threads = launch("run_clm.sh", "4", "0", "tiny", str(num_processes)).env["OMP_NUM_THREADS"]
        assert threads == str(max(1, num_cores // num_processes))
    assert launch("run_clm.sh", "4", "0", "tiny", "2", OMP_NUM_THREADS="7").env["OMP_NUM_THREADS"] == "7"


def test_several_machines_meet_at_the_master(launch: Launcher) -> None:
    done = launch("run_clm.sh", "4", "0", "13b", "8", NNODES="2", NODE_RANK="1", MASTER_ADDR="node0")
    assert done.torchrun_flags == [
        *("--nnodes", "2"),
        *("--node_rank", "1"),
        *("--master_addr", "node0"),
        *("--master_port", "29500"),
        *("--nproc_per_node", "8"),
    ]


def test_several_machines_meet_at_a_rendezvous(launch: Launcher) -> None:
    done = launch("run_clm.sh", "4", NNODES="3", RDZV_ENDPOINT="node0:1234", RDZV_ID="job 7")
    assert shlex.join(done.torchrun_flags) == (
        "--nnodes 3 --rdzv_backend c10d --rdzv_id 'job 7' --rdzv_endpoint node0:1234 --nproc_per_node 1"
    )
    assert done.env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"  # a restart finds nothing of the ranks before


def test_restarts_are_torchruns_and_off_unless_asked_for(launch: Launcher) -> None:
    assert "--max_restarts" not in launch("run_clm.sh", "4").torchrun_flags
    assert launch("run_clm.sh", "4", MAX_RESTARTS="3").torchrun_flags[-2:] == ["--max_restarts", "3"]
    done = launch("run_clm.sh", "4", MAX_RESTARTS="often")
    assert done.exit_code == 2 and "MAX_RESTARTS: got 'often'" in done.stderr


def test_one_machine_ignores_the_master_that_a_cluster_exports(launch: Launcher) -> None:
    done = launch("run_clm.sh", "4", NNODES="1", NODE_RANK="0", MASTER_ADDR="node0", MASTER_PORT="1")
    assert done.torchrun_flags[0] == "--standalone"


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"NNODES": "two"}, "NNODES"),
        ({"NNODES": "2"}, "MASTER_ADDR"),
        ({"NNODES": "2", "MASTER_ADDR": "node0"}, "NODE_RANK"),
        ({"NNODES": "2", "MASTER_ADDR": "node0", "NODE_RANK": "2"}, "NODE_RANK=2"),
    ],
)
def test_a_machine_without_its_place_is_one_line_and_exit_2(
    launch: Launcher, environment: dict[str, str], named: str
) -> None:
    done = launch("run_clm.sh", "4", **environment)
    assert (done.exit_code, done.argv) == (2, None)
    assert named in done.stderr
    assert len(done.stderr.splitlines()) == 1


# --- exit codes and signals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", LAUNCHERS)
@pytest.mark.parametrize("code", [2, 3, 4, 130, 143])
def test_the_code_that_training_wrote_is_the_launchers_own(launch: Launcher, script: str, code: int) -> None:
    assert launch(script, FAKE_CODE_FILE=str(code)).exit_code == code


@pytest.mark.parametrize("code", [0, 1, 7])
def test_a_run_that_wrote_no_code_ends_with_that_of_torchrun(launch: Launcher, code: int) -> None:
    assert launch("run_clm.sh", "4", FAKE_EXIT=str(code)).exit_code == code


def test_the_code_that_training_wrote_goes_before_that_of_torchrun(launch: Launcher) -> None:
    assert launch("run_clm.sh", "4", FAKE_EXIT="1", FAKE_CODE_FILE="3").exit_code == 3


def test_the_code_file_is_removed(launch: Launcher) -> None:
    done = launch("run_clm.sh", "4", FAKE_CODE_FILE="3")
    assert not Path(done.env["CLM_EXIT_CODE_FILE"]).exists()


@pytest.fixture
def start(clean_env: dict[str, str], tmp_path: Path) -> Iterator[Starter]:
    """A function (launcher, *arguments, TORCHRUN) -> its running process, which does not outlive the test."""
    processes: list[subprocess.Popen[str]] = []

    def run(launcher: Path, *arguments: str, torchrun: Path) -> subprocess.Popen[str]:
        env = clean_env | {"TORCHRUN": str(torchrun)}
        # A shell cannot trap what it was started to ignore, as SIGINT where the tests run in the background.
        command = ["env", "--default-signal=INT", "bash", str(launcher), *arguments]
        processes.append(subprocess.Popen(command, env=env, cwd=tmp_path, stderr=subprocess.PIPE, text=True))
        return processes[-1]

    yield run
    for process in processes:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=30)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_there_are_ranks_ends_torchrun(
    start: Starter, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    (tmp_path / "waits.py").write_text(FAKE_TORCHRUN_THAT_WAITS)
    launcher = start(ROOT / "run_clm.sh", "4", torchrun=python_program(tmp_path / "waits", tmp_path / "waits.py"))
    wait_for(tmp_path / "ready")
    launcher.send_signal(number)
    assert launcher.communicate(timeout=20)[1] == ""
    assert launcher.returncode == code
    assert (tmp_path / "signal").read_text() == str(int(signal.SIGTERM))


def wait_for(*paths: Path, timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not all(path.exists() for path in paths):
        assert time.monotonic() < end, f"not all of {paths} within {timeout_s} s"
        time.sleep(0.05)


@pytest.fixture
def real_launch(start: Starter, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """A function (*flags) -> run_clm.sh on two ranks of STUB_TRAINING, under the real torchrun."""
    for name in ("launch.sh", "run_clm.sh"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "train_clm.py").write_text(STUB_TRAINING)
    torchrun = python_program(tmp_path / "torchrun", "-m", "torch.distributed.run")

    def run(*flags: str) -> subprocess.Popen[str]:
        return start(tmp_path / "run_clm.sh", "4", "0", "tiny", "2", *flags, torchrun=torchrun)

    return run


def test_under_the_real_torchrun_an_orderly_failure_is_its_code_and_no_word_more(real_launch: Any) -> None:
    launcher = real_launch("--not_finite")
    assert launcher.communicate(timeout=60)[1] == ""
    assert launcher.returncode == 4


def test_under_the_real_torchrun_a_crash_is_exit_1(real_launch: Any) -> None:
    launcher = real_launch("--crash")
    launcher.communicate(timeout=60)
    assert launcher.returncode == 1


def test_under_the_real_torchrun_sigterm_lets_every_rank_end_in_order(real_launch: Any, tmp_path: Path) -> None:
    launcher = real_launch()
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=60) == 143
    assert (tmp_path / "ended-0").exists()
    assert (tmp_path / "ended-1").exists()
    assert launcher.communicate()[1] == ""


# --- the demo --------------------------------------------------------------------------------------------------------


def test_the_demo_fine_tunes_350m_on_netflix_as_on_the_original_card(launch: Launcher, with_gpu: Any) -> None:
    done = launch("run_demo.sh", **with_gpu)
    wanted = {
        "--model_name_or_path": "350m",
        "--dataset": "netflix",
        "--num_train_epochs": "10",
        "--per_device_train_batch_size": "16",
        "--learning_rate": "5e-5",
        "--warmup_ratio": "0.1",
        "--num_samples": "5",
        "--validation_split_percentage": "0",
        "--block_size": "128",
    }
    assert {flag: done.value(flag) for flag in wanted} == wanted
    assert "--from_scratch" not in done.flags


def test_every_setting_of_the_demo_has_a_variable(launch: Launcher) -> None:
    flags = {
        "MODEL": ("--model_name_or_path", "my model"),
        "EPOCHS": ("--num_train_epochs", "3"),
        "BATCH": ("--per_device_train_batch_size", "2"),
        "LR": ("--learning_rate", "1e-4"),
        "WARMUP": ("--warmup_ratio", "0.2"),
        "MEM_CAP": ("--mem_cap", "9"),
        "PLUGIN": ("--plugin", "gemini"),
        "TRAIN_FILE": ("--train_file", "my titles.csv"),
        "TOKENIZER": ("--tokenizer_name", "my tokenizer"),
        "SAMPLES": ("--num_samples", "1"),
    }
    done = launch("run_demo.sh", GPUS="2", **{name: value for name, (_, value) in flags.items()})
    assert {flag: done.value(flag) for flag, _ in flags.values()} == dict(flags.values())
    assert done.torchrun_flags[-1] == "2"


def test_the_demo_with_tiny_starts_from_random_weights_at_tinys_own_learning_rate(launch: Launcher) -> None:
    done = launch("run_demo.sh", MODEL="tiny")
    assert "--from_scratch" in done.flags
    assert done.value("--learning_rate") is None
    assert launch("run_demo.sh", MODEL="tiny", LR="1").value("--learning_rate") == "1"


def test_the_demo_without_a_gpu_and_a_model_rehearses_tiny_for_two_epochs(launch: Launcher) -> None:
    done = launch("run_demo.sh", TRAIN_FILE="titles.csv")
    assert (done.value("--model_name_or_path"), done.value("--num_train_epochs")) == ("tiny", "2")
    assert done.value("--train_file") == "titles.csv"
    assert len(done.stderr.splitlines()) == 1
    assert "rehearsing" in done.stderr


def test_the_demo_without_a_gpu_obeys_a_named_model(launch: Launcher) -> None:
    done = launch("run_demo.sh", MODEL="350m")
    assert (done.value("--model_name_or_path"), done.value("--num_train_epochs")) == ("350m", "10")
    assert done.stderr == ""


def test_the_demo_without_a_gpu_gives_a_model_of_the_flags_no_random_weights(launch: Launcher) -> None:
    done = launch("run_demo.sh", "--model_name_or_path", "RUN/final")
    assert "--from_scratch" not in done.flags and done.stderr == ""


def test_the_demo_refuses_positions(launch: Launcher) -> None:
    done = launch("run_demo.sh", "16")
    assert (done.exit_code, done.argv) == (2, None)
    assert "'16'" in done.stderr
