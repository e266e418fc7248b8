"""setup.sh, with a fake interpreter that records its calls and installs nothing; and the requirements it installs."""

from __future__ import annotations

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import ROOT

# Plays both the interpreter that .venv is made of and the one inside it.
# FAKE_FAIL: part of the call that fails; FAKE_SLEEP_S: how long an install takes.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
*version_info*) exit "${FAKE_OLD:-0}" ;;
*ensurepip*) exit "${FAKE_NO_ENSUREPIP:-0}" ;;
--version) echo 'Python 3.9.1' && exit ;;
'-m pip --version') exit ;;
esac
echo "$*" >>"$FAKE_CALLS"
if [[ $1 == -m && $2 == venv ]]; then
  rm -rf "$4"
  mkdir -p "$4/bin"
  cp "$0" "$4/bin/python"
else
  sleep "${FAKE_SLEEP_S:-0}"
fi
if [[ -n ${FAKE_FAIL:-} && $* == *"$FAKE_FAIL"* ]]; then
  echo "ERROR: no such package"
  exit 1
fi
"""

MAKE_VENV = "venv"
BASE, COLOSSALAI, DEV = "requirements.txt", "requirements-colossalai.txt", "requirements-dev.txt"


class SetUp:
    """A copy of setup.sh with the real requirements, in a folder with a space in its name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "a folder"
        self.calls_file = folder / "calls"
        self.python = folder / "fake-python"
        self.folder.mkdir()
        for name in ("setup.sh", BASE, COLOSSALAI, DEV):
            shutil.copy(ROOT / name, self.folder)
        self.python.write_text(FAKE_PYTHON)
        self.python.chmod(0o755)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        env = {"PATH": os.environ["PATH"], "PYTHON": str(self.python), "FAKE_CALLS": str(self.calls_file)} | environment
        command = ["bash", self.folder / "setup.sh", *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True)

    def __call__(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, **environment)
        stdout, stderr = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def new_calls(self) -> list[str]:
        """What the interpreters were asked to do since the last look: MAKE_VENV, or the requirements file."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return [MAKE_VENV if "-m venv" in line else line.rsplit(" ", 1)[-1] for line in lines]


@pytest.fixture
def setup(tmp_path: Path) -> SetUp:
    return SetUp(tmp_path)


# --- once, and again only where something changed --------------------------------------------------------------------


def test_the_first_call_makes_the_environment_and_installs_colossalai_last(setup: SetUp) -> None:
    assert setup().returncode == 0
    assert setup.new_calls() == [MAKE_VENV, BASE, COLOSSALAI]


def test_only_colossalai_is_installed_without_its_dependencies(setup: SetUp) -> None:
    setup("--dev")
    no_deps = [line for line in setup.calls_file.read_text().splitlines() if "--no-deps" in line]
    assert [line.rsplit(" ", 1)[-1] for line in no_deps] == [COLOSSALAI]


def test_the_second_call_does_and_says_nothing(setup: SetUp) -> None:
    setup()
    setup.new_calls()
    again = setup()
    assert (again.returncode, again.stdout, setup.new_calls()) == (0, "", [])


def test_a_first_call_says_two_lines_and_keeps_pips_own_for_the_log(setup: SetUp) -> None:
    done = setup()
    assert len(done.stdout.splitlines()) == 2
    assert done.stderr == ""
    assert (setup.folder / ".setup.log").exists()


@pytest.mark.parametrize("changed", [BASE, COLOSSALAI])
def test_a_changed_requirements_file_is_installed_into_the_same_environment(setup: SetUp, changed: str) -> None:
    setup()
    setup.new_calls()
    (setup.folder / changed).write_text("another==1\n")
    setup()
    assert setup.new_calls() == [BASE, COLOSSALAI]


def test_the_tools_are_installed_only_when_asked_for_and_then_once(setup: SetUp) -> None:
    setup()
    assert DEV not in setup.new_calls()
    setup("--dev")
    assert setup.new_calls() == [DEV]
    setup("--dev")
    setup()
    assert setup.new_calls() == []


def test_a_launcher_does_not_reinstall_for_changed_tools(setup: SetUp) -> None:
    setup("--dev")
    setup.new_calls()
    (setup.folder / DEV).write_text("another==1\n")
    setup()
    assert setup.new_calls() == []


def test_an_environment_whose_interpreter_is_gone_is_made_anew(setup: SetUp) -> None:
    setup()
    setup.new_calls()
    python = setup.folder / ".venv/bin/python"
    python.unlink()
    python.symlink_to("/no/such/python")
    setup()
    assert setup.new_calls() == [MAKE_VENV, BASE, COLOSSALAI]


def test_skip_setup_makes_nothing(setup: SetUp) -> None:
    assert setup(SKIP_SETUP="1").returncode == 0
    assert setup.new_calls() == []
    assert not (setup.folder / ".venv").exists()


def test_another_interpreter_for_an_environment_that_is_there_is_said_to_be_unused(setup: SetUp) -> None:
    setup()
    assert "is not used" in setup(PYTHON=sys.executable).stderr
    assert setup(PYTHON="").stderr == ""


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", [BASE, COLOSSALAI, DEV])
def test_a_failed_install_shows_the_end_of_the_log_and_the_next_call_goes_on(setup: SetUp, broken: str) -> None:
    failed = setup("--dev", FAKE_FAIL=f"-r {broken}")
    assert failed.returncode == 1
    assert "ERROR: no such package" in failed.stderr
    setup.new_calls()
    assert setup("--dev").returncode == 0
    calls = setup.new_calls()
    assert broken in calls
    assert MAKE_VENV not in calls


def test_a_killed_install_is_taken_up_by_the_next_call(setup: SetUp) -> None:
    process = setup.start(FAKE_SLEEP_S="30")
    wait_for(lambda: setup.calls_file.exists() and BASE in setup.calls_file.read_text())
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    setup.new_calls()
    assert setup().returncode == 0
    assert setup.new_calls() == [BASE, COLOSSALAI]


def wait_for(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.skipif(shutil.which("flock") is None, reason="without flock(1) set-ups are not kept apart")
def test_of_two_set_ups_at_once_one_works_and_the_other_waits(setup: SetUp) -> None:
    both = [setup.start(FAKE_SLEEP_S="0.2") for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert setup.new_calls() == [MAKE_VENV, BASE, COLOSSALAI]
    waiter = min(outputs, key=len)
    assert waiter.startswith("Waiting for another")
    assert len(waiter.splitlines()) == 1


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"PYTHON": "no-such-python"}, ["no-such-python", "not found"]),
        ({"FAKE_OLD": "1"}, ["Python 3.9.1", "3.10"]),
        ({"FAKE_NO_ENSUREPIP": "1"}, ["python3-venv"]),
    ],
)
def test_an_interpreter_that_will_not_do_is_one_line_with_the_fix(
    setup: SetUp, environment: dict[str, str], words: list[str]
) -> None:
    done = setup(**environment)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert all(word in done.stderr for word in [*words, "PYTHON="])
    assert not (setup.folder / ".venv").exists()


def test_an_unknown_argument_is_exit_2(setup: SetUp) -> None:
    done = setup("--fast")
    assert (done.returncode, setup.new_calls()) == (2, [])
    assert done.stderr.startswith("usage:")


# --- the requirements ------------------------------------------------------------------------------------------------


def required_packages() -> set[str]:
    """Names in requirements.txt and requirements-colossalai.txt, as they are imported."""
    lines = (ROOT / BASE).read_text().splitlines() + (ROOT / COLOSSALAI).read_text().splitlines()
    names = (re.match(r"[\w-]+", line) for line in lines)
    return {name.group().replace("-", "_") for name in names if name}


def imported_packages() -> set[str]:
    """Top-level packages that the project's own files, but for its tests, import anywhere."""
    found = set()
    files = [*ROOT.glob("*.py"), *ROOT.glob("colossal_ext/*.py")]
    ours = {path.stem for path in files} | {"colossal_ext", "benchmarks"}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            found |= {name.split(".")[0] for name in names}
    return found - ours - set(sys.stdlib_module_names)


def test_everything_we_import_is_required() -> None:
    come_with_torch, asked_for = {"triton"}, {"wandb"}  # --report_to, which says when it is missing
    assert imported_packages() - required_packages() - come_with_torch - asked_for == set()


@pytest.mark.parametrize("name", [BASE, COLOSSALAI, DEV])
def test_requirements_are_names_and_versions_and_no_place_to_fetch_from(name: str) -> None:
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    assert [line for line in lines if line and not re.fullmatch(r"[\w-]+[=<>!~,.\d]+", line)] == []


@pytest.mark.parametrize("apt_code", [0, 100])
def test_ci_asks_for_a_browser_once_and_goes_on_without_one(tmp_path: Path, apt_code: int) -> None:
    """.ci/run with stand-ins for all it calls, which note that they were called."""
    (tmp_path / ".ci").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "bin").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    for name, code in (("bin/apt-get", apt_code), ("bin/make", 0), ("setup.sh", 0), ("tests/run.sh", 0)):
        (tmp_path / name).write_text(f'#!/bin/bash\necho "{name} $*" >>{tmp_path}/calls\nexit {code}\n')
        (tmp_path / name).chmod(0o755)
    for tool in ("bash", "dirname", "timeout"):
        (tmp_path / "bin" / tool).symlink_to(str(shutil.which(tool)))
    done = subprocess.run(["bash", ".ci/run"], cwd=tmp_path, env={"PATH": str(tmp_path / "bin")}, capture_output=True)
    *calls, tests = (tmp_path / "calls").read_text().splitlines()
    apt = [["bin/apt-get", "update"]] + ([["bin/apt-get", "install"]] if apt_code == 0 else [])
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in calls] == [*apt, ["setup.sh", "--dev"], ["bin/make", "check"]]
    assert tests == "tests/run.sh -m not gpu and not multi_gpu and not slow"
