"""slurm/run_clm.sbatch under fake srun, scancel and scontrol, and as a real job where Slurm is running."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT

SCRIPT = ROOT / "slurm" / "run_clm.sbatch"

# The launcher of a node: notes what it was given, and ends with the code wanted, at USR1 with 138.
LAUNCHER = """trap 'exit 138' USR1
printf '%s\\n' "$NODE_RANK of $NNODES at $MASTER_ADDR:$MASTER_PORT: $*" >>"$NOTES/launched"
[[ -z ${WAITS:-} ]] || for _ in $(seq 600); do sleep 0.05; done
exit "${CODE:-0}"
"""
# srun stays until its step has ended, and ends with its code; scancel reaches the step alone.
SRUN = 'SLURM_NODEID=1 "$@" & echo $! >"$NOTES/step"; wait $!'
SCANCEL = 'echo "$*" >>"$NOTES/scancel"; [[ $* != *--batch* ]] && kill -s USR1 "$(cat "$NOTES/step")"'
SCONTROL = 'case "$1 $2" in "show hostnames") printf "node7\\nnode8\\n" ;; "show job") echo "JobState=${STATE:-RUNNING}" ;; *) echo "$*" >>"$NOTES/scontrol" ;; esac'


@pytest.fixture
def cluster(tmp_path):
    """The environment of a job's batch shell."""
    (tmp_path / "run_clm.sh").write_text(LAUNCHER)
    for name, body in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/usr/bin/env bash\n{body}\n")
        program.chmod(0o755)
    kept = {name: os.environ[name] for name in ("HOME", "LD_LIBRARY_PATH") if name in os.environ}
    job = {"SLURM_JOB_ID": "41", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[7-8]"}
    job |= {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_GPUS_ON_NODE": "8", "NOTES": str(tmp_path)}
    return kept | job | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}


def start(cluster, *arguments, **environment):
    return subprocess.Popen(
        ["bash", str(SCRIPT), *arguments], env=cluster | environment, stderr=subprocess.PIPE, text=True
    )


def ended(job):
    """Return exit code and what was printed."""
    text = job.communicate(timeout=30)[1]
    return job.returncode, text


def notes(cluster, name):
    path = Path(cluster["NOTES"]) / name
    return path.read_text() if path.exists() else ""


def test_every_node_starts_one_launcher_with_its_rank_that_goes_on_from_the_last_checkpoint(cluster):
    assert ended(start(cluster, "8", "0", "13b", "--output_dir", "a b")) == (0, "")
    flags = "8 0 13b 8 --output_dir a b --resume_from_checkpoint auto"
    assert notes(cluster, "launched") == f"1 of 2 at node7:20041: {flags}\n"


@pytest.mark.parametrize(("code", "state"), [(1, "RUNNING"), (2, "RUNNING"), (3, "RUNNING"), (143, "CANCELLED")])
def test_a_run_that_fails_or_that_was_cancelled_ends_the_job_with_its_code(cluster, code, state):
    job = start(cluster, "8", "0", "13b", "--output_dir", "x", CODE=str(code), STATE=state)
    assert ended(job) == (code, "")
    assert notes(cluster, "scontrol") == ""


def test_a_run_that_a_preemption_ended_is_queued_again(cluster):
    job = start(cluster, "8", "0", "13b", "--output_dir", "x", CODE="143")
    assert ended(job) == (143, "job 41 saved a checkpoint and is queued again\n")
    assert notes(cluster, "scontrol") == "requeue 41\n"


def test_at_usr1_the_steps_are_told_waited_for_and_the_job_is_queued_again(cluster):
    job = start(cluster, "8", "0", "13b", "--output_dir", "x", WAITS="1")
    end = time.monotonic() + 20
    while not notes(cluster, "launched"):
        assert time.monotonic() < end
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert ended(job) == (138, "job 41 saved a checkpoint and is queued again\n")
    assert notes(cluster, "scancel") == "--signal=USR1 41\n"
    assert notes(cluster, "scontrol") == "requeue 41\n"


@pytest.mark.parametrize(
    "arguments", [["8", "0", "13b"], ["8", "--output_dir", "x"], ["8", "0", "13b", "8", "--output_dir", "x"]]
)
def test_a_job_without_its_arguments_or_a_folder_to_go_on_in_is_refused(cluster, arguments):
    code, text = ended(start(cluster, *arguments))
    assert code == 2 and text.startswith("usage: sbatch")


# --- real jobs --------------------------------------------------------------------------------------------------------


def slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def state(job: str) -> dict[str, str]:
    """Return Slurm's word on a job."""
    return dict(word.split("=", 1) for word in slurm("scontrol", "show", "job", job).split() if "=" in word)


@pytest.fixture
def submit(tmp_path):
    """A function that submits a real job on two nodes, or skips the test; the job does not outlive it."""
    if not shutil.which("sbatch") or subprocess.run(["sinfo"], capture_output=True).returncode:
        pytest.skip("no Slurm is running here")
    jobs: list[str] = []

    def run(*flags: str) -> tuple[str, Path]:
        folder = tmp_path / "run"
        own = f"--dataset synthetic --from_scratch --block_size 32 --logging_steps 1 --no-save_final --output_dir {folder}"
        environment = {"SKIP_SETUP": "1", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
        command = ["sbatch", "--parsable", "--gpus-per-node=0", f"--output={tmp_path}/log.txt", f"--chdir={ROOT}"]
        done = subprocess.run(
            [*command, str(SCRIPT), "2", "0", "tiny", *own.split(), *flags],
            env=os.environ | environment, cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            pytest.skip(f"this Slurm takes no job of two nodes: {done.stderr.strip()}")
        jobs.append(done.stdout.strip())
        return jobs[-1], folder

    yield run
    for job in jobs:
        subprocess.run(["scancel", job])


def wait_for(condition, what: str, timeout_s: float = 240) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.3)


def steps(folder: Path) -> list[int]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line["step"] for line in map(json.loads, lines) if "loss" in line]


@pytest.mark.slow
def test_a_real_job_that_is_warned_saves_is_queued_again_and_ends_with_every_step_trained_once(submit):
    job, folder = submit("--max_train_steps", "40")
    wait_for(lambda: len(steps(folder)) >= 5, "no steps")
    slurm("scancel", "--batch", "--signal=USR1", job)
    wait_for(lambda: state(job)["Restarts"] == "1", "not queued again")
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm lets it wait two minutes
    wait_for(lambda: state(job)["JobState"] in ("COMPLETED", "FAILED"), "not ended", 280)
    assert state(job)["ExitCode"] == "0:0"
    assert steps(folder) == list(range(1, 41))
