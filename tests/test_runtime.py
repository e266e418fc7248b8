import os
import subprocess
import sys
import time
from importlib.metadata import version

import pytest

import runtime
from args import ConfigError
from conftest import ROOT


def exits(body: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `body` (a Python expression or `raise`) as the body of run_to_exit in a fresh process."""
    program = f"import runtime, args, torch, signal, os\ndef body(process):\n    {body}\nruntime.run_to_exit(body)"
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("return 0", 0),
        ("return 4", 4),
        ("raise args.ConfigError('no')", 2),
        ("raise torch.OutOfMemoryError('full')", 3),
        ("raise RuntimeError('broken')", 1),
        ("raise KeyboardInterrupt", 130),
    ],
)
def test_each_end_has_its_exit_code(body, code):
    assert exits(body).returncode == code


def test_a_config_error_prints_every_problem_once_and_no_traceback():
    done = exits("raise args.ConfigError('first', 'second')")
    assert done.stderr == "error: first\nerror: second\n" and done.stdout == ""


def test_one_rank_of_a_machine_prints_a_config_error(tmp_path):
    """It has handed its code to the launcher when the others come to look."""
    code = tmp_path / "code"
    code.write_text("2")
    refused, ranks = "raise args.ConfigError('first')", {"WORLD_SIZE": "2", "CLM_EXIT_CODE_FILE": str(code)}
    second = exits(refused, RANK="1", LOCAL_RANK="1", **ranks)
    assert (second.returncode, second.stderr) == (0, "")
    assert exits(refused, RANK="1", LOCAL_RANK="0", **ranks).stderr == "error: first\n"  # of another machine


def test_a_failure_names_its_rank_and_shows_where():
    assert "[rank 3] Traceback" in exits("raise RuntimeError('broken')", RANK="3").stderr


def test_under_the_launcher_an_orderly_end_is_quiet_for_torchrun(tmp_path):
    done = exits("return 4", CLM_EXIT_CODE_FILE=str(tmp_path / "code"))
    assert done.returncode == 0 and (tmp_path / "code").read_text() == "4"


def test_under_the_launcher_a_crash_is_not_quiet(tmp_path):
    done = exits("raise RuntimeError('broken')", CLM_EXIT_CODE_FILE=str(tmp_path / "code"))
    assert done.returncode == 1 and not (tmp_path / "code").exists()


def test_the_first_signal_is_remembered_and_ctrl_c_twice_ends_at_once():
    body = "stop = runtime.StopSignal(); os.kill(os.getpid(), signal.SIGTERM); return stop.exit_code"
    assert exits(body).returncode == 143
    body = "stop = runtime.StopSignal(); [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]; return 0"
    assert exits(body).returncode == 130


def test_another_colossalai_is_refused_with_the_fix(monkeypatch):
    monkeypatch.setattr(runtime, "version", lambda package: "0.4.9" if package == "colossalai" else version(package))
    with pytest.raises(ConfigError, match=r"colossalai 0.4.9 is not supported .*bash setup.sh"):
        runtime.check_versions()


def test_an_older_torch_is_refused_and_a_newer_one_only_warned_of(monkeypatch, caplog):
    monkeypatch.setattr(runtime, "version", lambda package: "2.5.1" if package == "torch" else version(package))
    with pytest.raises(ConfigError, match=r"torch 2\.5\.1"):
        runtime.check_versions()
    monkeypatch.setattr(runtime, "version", lambda package: "2.99.0" if package == "torch" else version(package))
    with caplog.at_level("WARNING", logger="clm"):
        runtime.check_versions()
    assert "torch 2.99.0 is newer" in caplog.text


def test_the_installed_versions_are_the_tested_ones():
    runtime.check_versions()


def test_a_hub_out_of_reach_turns_the_clients_offline_at_once(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    started = time.perf_counter()
    assert not runtime.settle_hub()
    assert os.environ.pop("HF_HUB_OFFLINE") == "1" and time.perf_counter() - started < 6


def test_a_plain_python_start_is_a_world_of_one_on_a_free_port():
    body = "runtime.start_process_group(process, timeout_s=30); return torch.distributed.get_world_size() - 1"
    assert exits(body).returncode == 0
