"""benchmarks/caps.py: whom it runs under a cap, its verdicts, and that nothing is run twice."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from args import parse_args
from benchmarks import caps, side_by_side
from benchmarks.caps import Machine, Trial
from benchmarks.side_by_side import Outcome

H100 = Machine(gpu_gib=79.6, host_gib=128.0)


def trial(name: str, tokens_per_s: float | None, *, reserved: float | None = 20.0, status: str = "ok") -> Trial:
    outcome = Outcome("1.3b", name, True, 1, status, name, 1.0, tokens_per_s=tokens_per_s, peak_reserved_gib=reserved)
    return Trial(24.0, "1.3b", outcome, 1.3)


def test_the_largest_size_that_fits_grows_with_the_cap_and_fixed_settings_are_of_other_plugins() -> None:
    options = caps.parse([])
    sizes = []
    for cap_gb in options.caps:
        found = caps.largest(cap_gb, H100, options)
        assert found
        size, (auto, *fixed) = found
        sizes.append(options.sizes.index(size))
        assert auto.name == "auto" and len(fixed) <= 4
        assert len({each.flags[1] for each in fixed}) == len(fixed)
        for each in fixed:
            line = caps.command_of(each, caps.setting_of(size, cap_gb, options), options, Path("x"))
            args = parse_args(shlex.split(line)[2:])
            assert args.mem_cap == cap_gb and H100.choose(args).fits
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    assert caps.largest(1.0, H100, options) is None


def test_auto_is_judged_by_the_best_fixed_setting_and_everybody_by_the_cap() -> None:
    cap = [trial("auto", 94.0), trial("slow", 50.0), trial("best", 100.0), trial("failed", 900.0, status="oom")]
    assert caps.ratio(cap[0], cap) == pytest.approx(0.94)
    assert [caps.is_fast_enough(each, cap) for each in cap] == [False, None, None, None]
    assert caps.is_fast_enough(trial("auto", 95.0), cap[1:])
    assert caps.is_fast_enough(trial("auto", 1.0), []) and not caps.is_fast_enough(trial("auto", None), [])
    # 24 GB are 22.35 GiB, of which 1.3 lie outside.
    peaks = [trial("auto", 1.0, reserved=gib).is_under_cap for gib in (21.0, 21.1, None)]
    assert peaks == [True, False, None]


def test_the_table_has_a_cell_a_column() -> None:
    lines = caps.table([trial("auto", 1234.5), trial("fixed", None, reserved=None, status="timeout")]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "| 24 | 1.3b | **auto** | ok | 1,234 | - | - | 20.00 | 21.30 | 22.35 | yes | yes |" in lines[2]
    assert "| timeout | - |" in lines[3] and "| - | - | - |" in lines[3]


def test_what_is_done_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[str] = []

    def run(command: str, log: Path, *, limit_s: float) -> Outcome:
        commands.append(command)
        status = "timeout" if len(commands) == 2 else "ok"
        return Outcome("", "", False, 0, status, command, 1.0, tokens_per_s=10.0, peak_reserved_gib=1.0)

    monkeypatch.setattr(side_by_side, "run", run)
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls, host_gib: H100))
    arguments = ["--caps", "24", "--sizes", "125m", "--output", str(tmp_path)]
    assert caps.main(arguments) == 0
    first = len(commands)
    assert first == 5 and caps.main(arguments) == 0 and commands[first:] == [commands[1]]
    done = caps.read(tmp_path / "caps.json")
    assert [each.outcome.status for each in done] == ["ok"] * first and "under the cap" in (
        tmp_path / "caps.md"
    ).read_text()


def test_a_verdict_of_no_is_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: str, log: Path, *, limit_s: float) -> Any:
        return Outcome("", "", False, 0, "ok", command, 1.0, tokens_per_s=10.0, peak_reserved_gib=30.0)

    monkeypatch.setattr(side_by_side, "run", run)
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls, host_gib: H100))
    assert caps.main(["--caps", "24", "--sizes", "125m", "--output", str(tmp_path)]) == 1
