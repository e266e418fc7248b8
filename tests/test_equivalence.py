"""Every plugin trains like a plain PyTorch loop, and the comparison that says so notices when one does not."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from benchmarks import equivalence, reference
from benchmarks.equivalence_cases import (
    Case,
    Strategy,
    all_cases,
    covering,
    factors_of,
    pairs,
    possible,
    quick_cases,
    strategies,
)
from benchmarks.equivalence_report import (
    Circumstances,
    Differences,
    Numbers,
    Report,
    Row,
    compare_evaluation,
    compare_training,
    failure,
    judge,
)
from benchmarks.equivalence_worker import sharing
from conftest import ROOT
from runtime import Runtime

QUICK = {case.name: case for case in quick_cases()}
SOUND = [name for name, case in QUICK.items() if not case.fault]
FAULTY = [name for name, case in QUICK.items() if case.fault]
KINKED = "tp-2-2-ranks-fp32-pre-norm-packed-x1-recompute-dropout-0.1"


def run_matrix(folder, *flags, timeout_s, **environment):
    """Return the exit code, the rows by name, and what was printed."""
    command = [sys.executable, "-m", "benchmarks.equivalence", "--output", str(folder), *flags]
    with (
        open(folder / "printed", "w") as printed,
        subprocess.Popen(
            command, cwd=ROOT, env=os.environ | environment, stdout=printed, stderr=subprocess.STDOUT
        ) as process,
    ):
        try:
            process.wait(timeout_s)
        finally:
            process.terminate()  # it ends its ranks
    output = (folder / "printed").read_text()
    assert (folder / "equivalence.json").exists(), output
    rows = json.loads((folder / "equivalence.json").read_text())["rows"]
    return process.returncode, {row["name"]: row for row in rows}, output


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory):
    return run_matrix(tmp_path_factory.mktemp("equivalence"), "--quick", timeout_s=580, CUDA_VISIBLE_DEVICES="")


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SOUND)
def test_a_strategy_trains_and_evaluates_like_the_plain_loop(name, quick_run):
    row = quick_run[1][name]
    assert row["verdict"] == "agrees", row["error"]


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", FAULTY)
def test_a_fault_planted_on_purpose_is_noticed(name, quick_run):
    assert quick_run[1][name]["verdict"].startswith("differs")


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_slice_ends_with_its_summary_and_without_an_error(quick_run):
    code, rows, output = quick_run
    assert code == 0 and len(rows) == len(QUICK)
    assert f"{len(SOUND)} of {len(SOUND)} cases agree with the reference." in output


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_whole_matrix_agrees_on_the_cpu(tmp_path):
    code, rows, output = run_matrix(tmp_path, timeout_s=3500, CUDA_VISIBLE_DEVICES="")
    assert code == 0 and len(rows) == len(all_cases()), output


@pytest.mark.gpu
@pytest.mark.timeout(3600)
def test_the_whole_matrix_agrees_on_as_many_ranks_as_there_are_gpus(tmp_path):
    code, rows, output = run_matrix(tmp_path, timeout_s=3500)
    assert code == 0 and len(rows) == len(possible(all_cases(), torch.cuda.device_count())), output


# --- the verdict ------------------------------------------------------------------------------------------------------

EXACT = Case(Strategy("ZeRO 1", 2, "--plugin low_level_zero", ("fp32",)), "fp32")
HALF = dataclasses.replace(EXACT, precision="fp16")
PLAIN = Numbers(losses=[6.0, 5.0], grad_norms=[2.0, 1.0], evaluations=[5.5])
WEIGHTS = (0.0, "lm_head.weight")


def verdict(found, case=EXACT, weights=WEIGHTS, shares=None):
    return judge(case, compare_training(case, found, PLAIN, weights), shares)


def test_the_reference_agrees_with_itself():
    assert verdict(PLAIN) == "agrees"


@pytest.mark.parametrize(
    ("name", "values"), [("losses", [6.0, 5.0001]), ("grad_norms", [2.0001, 1.0]), ("evaluations", [5.5001])]
)
def test_one_number_that_is_a_little_off_makes_fp32_differ(name, values):
    assert verdict(dataclasses.replace(PLAIN, **{name: values})).startswith("differs")


def test_a_tensor_that_is_a_little_off_makes_fp32_differ():
    assert verdict(PLAIN, weights=(1.1e-4, "lm_head.weight")) == "differs: weights 1.1e-04 > 1e-04"


@pytest.mark.parametrize("losses", [[6.0], [6.0, 5.0, 4.0], [6.0, math.nan], [6.0, math.inf], []])
def test_missing_steps_and_losses_that_are_not_finite_differ(losses):
    assert verdict(dataclasses.replace(PLAIN, losses=losses)).startswith("differs: loss")


@pytest.mark.parametrize("norms", [[None, None], [2.0], [2.0, math.inf]])
def test_norms_that_clipping_did_not_report_differ(norms):
    assert verdict(dataclasses.replace(PLAIN, grad_norms=norms)) != "agrees"


def test_half_precision_may_be_two_percent_off_but_no_more():
    assert verdict(dataclasses.replace(PLAIN, losses=[6.1, 5.09]), HALF) == "agrees"
    assert verdict(dataclasses.replace(PLAIN, losses=[6.1, 5.11]), HALF) == "differs: loss 2.2e-02 > 2e-02"


def test_a_step_that_fp16_skipped_is_told():
    skipped = dataclasses.replace(PLAIN, grad_norms=[math.inf, 1.0], num_skipped=1)
    assert verdict(skipped, HALF) == "agrees, though fp16 skipped 1 of the steps"
    worse = dataclasses.replace(skipped, losses=[6.0, 9.0])
    assert verdict(worse, HALF) == "differs: loss 8.0e-01 > 2e-02; fp16 skipped 1 of the steps"
    assert verdict(skipped).startswith("differs: grad norm inf")


def test_perplexity_is_held_to_a_millionth():
    assert judge(EXACT, compare_evaluation(3.0 + 0.9e-6, 3.0), None) == "agrees"
    assert judge(EXACT, compare_evaluation(3.0 + 1.1e-6, 3.0), None).startswith("differs: perplexity")


@pytest.mark.parametrize("shares", [[1.0, 1.0], [0.5, 1.0], [0.5], []])
def test_chunks_that_are_not_shared_out_differ(shares):
    assert "chunks" in verdict(PLAIN, HALF, shares=shares)
    assert verdict(PLAIN, HALF, shares=[0.5, 0.5]) == "agrees"


def test_only_a_fault_may_differ_and_nothing_may_fail():
    faulty = dataclasses.replace(EXACT, fault="no clipping")
    holds = [Row(case, Differences(), text).holds for case in (EXACT, faulty) for text in ("agrees", "differs: x")]
    assert holds == [True, False, False, True]
    assert not failure(EXACT, "boom").holds and not failure(faulty, "boom").holds


def test_an_error_is_a_row_with_its_last_line_and_the_whole_text_below():
    row = failure(EXACT, "Traceback\n  line\nValueError: no\n")
    about = Circumstances("", "2026-11-23", "cpu", {}, None, "", 1.0, Differences())
    page = Report(about, [row]).as_markdown()
    assert "| error: ValueError: no |" in page and "Traceback\n  line" in page and "1 of 1 differ" in page


def test_the_table_has_a_line_a_plugin_with_its_worst_numbers_and_the_tolerances():
    rows = [Row(EXACT, Differences(loss=loss, weights=1e-6), "agrees") for loss in (2e-7, 3e-7)]
    rows += [Row(HALF, Differences(loss=4e-4, weights=1.0), "agrees"), Row(EXACT, Differences(loss=9.0), "differs: x")]
    about = Circumstances("", "2026-11-23", "cpu", {}, None, "", 1.0, Differences())
    summary = Report(about, rows).summary()
    line = "| `low_level_zero` | ZeRO 1 | 2 | 4 | 9.0e+00 | 4.0e-04 | - | - | - | - | 1.0e-06 | - | - | 1 of 4 differ |"
    assert line in summary
    assert "| held to |  |  |  | 1e-05 | 2e-02 | 1e-05 | 5e-02 | 1e-05 | 2e-02 | 1e-04 | 1e-06 | 2e-02 |  |" in summary


def test_the_readme_shows_the_summary_of_the_committed_table():
    page = (ROOT / "benchmarks" / "results" / "equivalence.md").read_text()
    summary = page.split("\n\n")[2].splitlines()
    assert len(summary) > 5 and "\n".join(summary) in (ROOT / "README.md").read_text()


# --- the cases --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", list(strategies()), ids=lambda found: f"{found.name} {found.world_size}")
def test_every_pair_of_factors_stands_under_every_strategy(strategy):
    factors = factors_of(strategy)
    found = set().union(*map(pairs, covering(factors, "seed")))
    names = list(factors)
    wanted = {
        ((one, a), (other, b))
        for i, one in enumerate(names)
        for other in names[i + 1 :]
        for a in factors[one]
        for b in factors[other]
    }
    assert found == wanted


def test_each_case_has_a_name_of_its_own():
    assert len({case.name for case in all_cases()}) == len(all_cases())


def test_every_case_takes_the_same_sixteen_rows_a_step(tmp_path):
    from args import parse_args, problems

    for case in all_cases():
        args, world = parse_args(case.flags(tmp_path)), case.strategy.world_size
        assert case.evaluates or args.global_batch_size(world) == 16
        assert not problems(args, world_size=world, num_gpus=0, gpus_per_node=world)


def test_a_machine_with_one_gpu_runs_one_rank_and_drops_in_fp32_alone():
    cases = possible(all_cases(), num_ranks=1)
    assert {case.strategy.world_size for case in cases} == {1}
    assert {case.precision for case in cases if case.dropout} == {"fp32"}
    assert len({case.name for case in cases}) == len(cases)


# --- the processes ----------------------------------------------------------------------------------------------------


def test_a_process_that_falls_silent_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(equivalence, "SILENCE_S", 0.5)
    results = tmp_path / "found.jsonl"
    results.touch()
    started = time.monotonic()
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    end = equivalence.watch(command, results, subprocess.DEVNULL, {}, threading.Event())
    assert end.startswith("deadlock") and time.monotonic() - started < 30


def test_a_failing_case_and_a_deadlock_cost_only_their_own_rows(tmp_path, monkeypatch):
    """Groups that run: one case, then an error; then nothing; then the rest."""
    cases = [dataclasses.replace(EXACT, accumulation=number) for number in (1, 2, 4, 8)]
    scripts = iter([[{"name": cases[0].name}, {"name": cases[1].name, "error": "E"}], [], [{"name": cases[3].name}]])

    def watch(command: list[str], results: Path, *rest: object) -> str:
        results.write_text("".join(json.dumps(line) + "\n" for line in next(scripts)))
        return "deadlock: no answer"

    monkeypatch.setattr(equivalence, "watch", watch)
    found = equivalence.run_cases(cases, tmp_path, jobs=1)
    assert [found[case.name].get("error", "fine").strip() for case in cases] == [
        "fine",
        "E",
        "deadlock: no answer",
        "fine",
    ]


@pytest.mark.long
def test_two_groups_at_a_time_find_what_one_does(tmp_path):
    only = ["--only", "^DDP-1-ranks-.*batch"]
    code, rows, output = run_matrix(tmp_path, *only, "--jobs", "2", timeout_s=120, CUDA_VISIBLE_DEVICES="")
    assert code == 0 and [row["verdict"] for row in rows.values()] == ["agrees"] * 3, output


def test_groups_run_at_the_same_time_each_with_its_own_files(tmp_path, monkeypatch):
    cases = [dataclasses.replace(EXACT, accumulation=number) for number in (1, 2, 4, 8)]
    both_run = threading.Barrier(2, timeout=10)

    def watch(command: list[str], results: Path, *rest: object) -> str:
        both_run.wait()
        orders = json.loads((Path(command[-1]) / "orders.json").read_text())
        results.write_text("".join(json.dumps({"name": order["name"]}) + "\n" for order in orders))
        return ""

    monkeypatch.setattr(equivalence, "watch", watch)
    assert equivalence.run_cases(cases, tmp_path, jobs=2) == {case.name: {"name": case.name} for case in cases}
    assert equivalence.num_answers(tmp_path) == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_all_groups_and_keeps_what_is_done(tmp_path, monkeypatch, number):
    """The first of two groups has answered one of its two cases."""
    cases = [dataclasses.replace(EXACT, accumulation=number) for number in (1, 2, 4, 8)]
    answer = f'print({json.dumps({"name": cases[0].name})!r}, file=open(sys.argv[1], "a"), flush=True)'
    sleep, right = "import sys, time; {}; time.sleep(60)", equivalence.watch

    def watch(command: list[str], results: Path, *rest: Any) -> str:
        program = sleep.format(answer if "ranks-0" in str(results) else "pass")
        return right([sys.executable, "-c", program, str(results)], results, *rest)

    def interrupt() -> None:
        while not equivalence.num_answers(tmp_path):
            time.sleep(0.1)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(equivalence, "watch", watch)
    monkeypatch.setattr(equivalence, "PROGRESS_S", 0.2)
    # A suite started in the background was told to ignore SIGINT.
    ends = signal.default_int_handler if number == signal.SIGINT else lambda number, frame: sys.exit(128 + number)
    handler = signal.signal(number, ends)
    others = psutil.Process().children()  # such as multiprocessing's tracker, from another test
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        found = equivalence.run_cases(cases, tmp_path, jobs=2)
    finally:
        signal.signal(number, handler)
    assert found == {cases[0].name: {"name": cases[0].name}}
    assert set(psutil.Process().children()) <= set(others)


def test_a_case_that_was_cut_off_says_so_and_does_not_hold():
    rows = [Row(EXACT, Differences(loss=1e-7), "agrees"), equivalence.make_row(HALF, None, PLAIN, Path())]
    page = Report(Circumstances("", "2026-11-23", "cpu", {}, None, "", 1.0, Differences()), rows).as_markdown()
    assert not rows[1].holds and "| 1 not run |" in page and "1 of 2 cases agree" in page
    assert page.count("not run: interrupted |") == 1 and "1 of all were not run" in page


def test_one_rank_groups_are_spread_over_the_gpus_and_larger_ones_take_one_a_rank():
    cases = [case for case in all_cases() if case.strategy.world_size < 4]
    shares = equivalence.deal(cases, 5, ["4", "7"])
    assert [share.world_size for share in shares] == [2, 2, 1, 1, 1, 1, 1]
    gpus = [share.environment["CUDA_VISIBLE_DEVICES"] for share in shares]
    assert gpus == ["4,7", "4,7", "4", "7", "4", "7", "4"]
    assert sorted(case.name for share in shares for case in share.cases) == sorted(case.name for case in cases)


@pytest.mark.parametrize(("gpus", "taken"), [(["7"], ["7", "7", "7", "7"]), (["4", "7"], ["4,7", "4,7", "4", "7"])])
def test_ranks_that_share_a_gpu_take_fewer_of_them(gpus: list[str], taken: list[str]) -> None:
    cases = [case for case in all_cases() if case.strategy.world_size > 1]
    shares = equivalence.deal(cases, 2, gpus, ranks_per_gpu=4 // len(gpus))
    assert [share.world_size for share in shares] == [4, 4, 2, 2]
    assert [share.environment["CUDA_VISIBLE_DEVICES"] for share in shares] == taken


@pytest.mark.parametrize(("visible", "devices"), [(1, [0, 0, 0, 0]), (2, [0, 0, 1, 1]), (4, [0, 1, 2, 3])])
def test_a_rank_knows_which_gpu_it_shares(visible: int, devices: list[int]) -> None:
    for rank, device in enumerate(devices):
        alone = Runtime(rank, 4, rank, 4, torch.device("cuda", rank), visible)
        shared = sharing(alone, 4 // visible)
        assert (shared.device, shared.num_gpus) == (torch.device("cuda", device), 4)


def test_on_the_cpu_every_world_size_gets_as_many_groups_as_it_has_cases_for():
    shares = equivalence.deal([EXACT, HALF, *(case for case in all_cases() if case.strategy.world_size == 4)], 3, [])
    assert [share.world_size for share in shares] == [4, 4, 4, 2, 2]
    assert all(share.environment == {} for share in shares)


def test_a_text_that_is_too_short_is_said():
    with pytest.raises(SystemExit, match="--train_file: too short"):
        equivalence.cut_rows(b"short", 5, uneven=False)


# --- the plain loop ---------------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=32, dropout=0.0
    )
    return OPTForCausalLM(config)


ROWS = [torch.arange(5, 12), torch.arange(20, 23), torch.arange(30, 31)]


def test_the_plain_loss_is_that_of_transformers_without_padding(model):
    alone = [model(input_ids=row[None], labels=row[None]).loss * (len(row) - 1) for row in ROWS[:2]]
    assert reference.summed_loss(model, ROWS).item() == pytest.approx(sum(alone).item(), rel=1e-6)


def test_the_plain_gradients_do_not_depend_on_the_micro_batch(model):
    found = []
    for micro_batch_size in (3, 1):
        model.zero_grad()
        reference.add_gradients(model, ROWS, micro_batch_size)
        found.append(model.lm_head.weight.grad.clone())
    torch.testing.assert_close(*found)
    assert found[0].norm() > 0.01


def test_plain_clipping_scales_to_the_norm_and_returns_that_before(model):
    reference.summed_loss(model, ROWS).backward()
    before = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()]).item()
    assert reference.clip(model, 0.5) == pytest.approx(before, rel=1e-5) and before > 0.5
    assert reference.clip(model, 0.0) == pytest.approx(0.5, rel=1e-5)
    assert reference.clip(model, 0.9) == pytest.approx(0.5, rel=1e-5)


def test_plain_evaluation_is_the_mean_over_all_targets(model):
    expected = reference.summed_loss(model, ROWS).item() / 8
    assert reference.evaluate(model, ROWS) == pytest.approx(expected, rel=1e-6)
    assert model.training


def test_one_token_across_relus_kink_moves_the_plain_loops_weights_where_rounding_does_not(tmp_path, monkeypatch):
    """What the report says of weights that differ where losses agree."""
    (case,) = [case for case in all_cases() if case.name == KINKED]
    equivalence.write_weights(tmp_path / "weights")
    equivalence.write_texts(ROOT / "LICENSE", tmp_path)
    before_relu = []

    def note(module, _, output):
        if isinstance(module, torch.nn.Linear) and module.out_features == 4 * module.in_features and module.training:
            before_relu.append(output.detach().flatten(0, -2))

    handle = torch.nn.modules.module.register_module_forward_hook(note)
    plain = equivalence.train_reference(case.reference, tmp_path)
    handle.remove()
    folder = tmp_path / "references" / case.reference.name
    folder.rename(tmp_path / "plain")
    # Of the first three steps, four layers each: nearest to zero, yet far enough for a bias of 0.05 to be shifted by it.
    near = [values.abs().masked_fill(values.abs() < 3e-8, math.inf) for values in before_relu[: 3 * 4]]
    call = min(range(len(near)), key=lambda number: near[number].min().item())
    token, unit = divmod(near[call].argmin().item(), near[call].shape[1])
    value = before_relu[call][token, unit].item()

    def differences(shift):
        load = OPTForCausalLM.from_pretrained

        def shifted(*args, **kwargs):
            model = load(*args, **kwargs)
            model.model.decoder.layers[call % 4].fc1.bias.data[unit] += shift
            return model

        with monkeypatch.context() as patch:
            patch.setattr(reference.OPTForCausalLM, "from_pretrained", shifted)
            found = equivalence.train_reference(case.reference, tmp_path)
        weights = equivalence.compare_weights(folder, tmp_path / "plain")
        return compare_training(case, equivalence.numbers(found), equivalence.numbers(plain), weights)

    away, across = differences(0.5 * value), differences(-1.5 * value)
    assert away.weights < 1e-6
    assert across.weights > 1e-4
    assert ".fc1." in across.tensor
    assert max(away.loss, across.loss) < 1e-5
