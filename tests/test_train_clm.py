"""Whole runs of the command line, as a user starts them."""

import math
import os
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from args import parse_args
from conftest import MODULE_PATH, ROOT
from data import Collator, SyntheticRows
from train_clm import needs_hub, output_problems

# The same 4 rows a step in every run: 2 for each of two ranks, 4 for one.
STRATEGIES = {
    "torch_ddp": "--plugin torch_ddp",
    "torch_ddp_fp16": "--plugin torch_ddp_fp16 --allow_cpu_fp16",
    "zero 1": "--plugin low_level_zero",
    "zero 2, accumulated": "--plugin low_level_zero --zero_stage 2 --per_device_train_batch_size 1 "
    "--gradient_accumulation_steps 2",
    "gemini": "--plugin gemini",
    "tensor parallel": "--plugin hybrid_parallel --tp 2",
    "pipeline": "--plugin hybrid_parallel --pp 2",
    "hybrid, accumulated": "--plugin hybrid_parallel --per_device_train_batch_size 1 --gradient_accumulation_steps 2",
    "recompute": "--plugin torch_ddp --gradient_checkpointing 2",
}
HALF_PRECISION = ("torch_ddp_fp16", "gemini")


@pytest.fixture(scope="module")
def reference(tmp_path_factory, run_training):
    return run_training(
        tmp_path_factory.mktemp("reference"), *"--plugin torch_ddp --per_device_train_batch_size 4".split()
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory, run_many):
    flags = {name: [*text.split(), "--save_final", "--export_dtype", "fp32"] for name, text in STRATEGIES.items()}
    return run_many(tmp_path_factory.mktemp("runs"), flags, world=2)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_on_two_ranks_trains_and_exports_the_model_of_one_process(name, reference, runs):
    run = runs[name]
    assert run.code == 0, run.output
    tolerance = 2e-3 if name in HALF_PRECISION else 1e-5
    assert run.losses == pytest.approx(reference.losses, rel=tolerance) and run.losses[-1] < run.losses[0]
    assert run.result["eval"]["loss"] == pytest.approx(reference.result["eval"]["loss"], rel=tolerance)
    assert exported_loss(run) == pytest.approx(run.result["eval"]["loss"], rel=tolerance)


def test_a_batch_that_auto_cuts_under_a_cap_trains_like_the_whole(tmp_path, run_many):
    job = "--model_name_or_path tiny --per_device_train_batch_size 8 --dropout 0".split()
    job += "--gradient_checkpointing off --eval_strategy no".split()
    flags = {"whole": [], "ddp": ["--mem_cap", "0.16"], "zero": ["--mem_cap", "0.13"]}
    runs = run_many(tmp_path, {name: [*job, *own] for name, own in flags.items()}, world=1)
    for name, plugin in (("ddp", "torch_ddp"), ("zero", "low_level_zero")):
        args = runs[name].result["args"]
        assert (args["plugin"], args["per_device_train_batch_size"], args["gradient_accumulation_steps"]) == (
            plugin,
            4,
            2,
        )
        assert "batch cut into 2 micro-batches of 4" in runs[name].output
        assert runs[name].losses == pytest.approx(runs["whole"].losses, rel=1e-5)
    assert runs["whole"].result["args"]["gradient_accumulation_steps"] == 1
    assert runs["whole"].losses[-1] < runs["whole"].losses[0]


def exported_loss(run):
    """Evaluate final/ in plain transformers on the run's own evaluation rows."""
    model = AutoModelForCausalLM.from_pretrained(run.folder / "final", dtype=torch.float32).eval()
    rows = SyntheticRows(4, block_size=32, vocab_size=512, seed=42, part=1)
    batch = Collator(pad_token_id=1)([rows[index] for index in range(4)])["input_ids"]
    with torch.no_grad():
        return model(input_ids=batch, labels=batch).loss.item()


def test_a_run_leaves_its_results_in_one_file(reference):
    result = reference.result
    assert result["status"] == "ok" and result["steps"] == 3 and result["plugin"] == "torch_ddp"
    assert result["model"] == {"name": "mini", "num_params": 364032, "pretrained": False}
    assert result["data"]["num_tokens"] == 3 * 4 * 32 and result["eval"]["num_tokens"] == 4 * 31
    assert result["eval"]["perplexity"] == pytest.approx(math.exp(result["eval"]["loss"]))
    assert result["throughput"]["tokens_per_s"] > 0 and result["throughput"]["mfu"] is None
    assert result["memory"]["host_peak_rss_gib"] > 0.1 and result["plan"]["fits"]
    assert len((reference.folder / "metrics.jsonl").read_text().splitlines()) == 4  # 3 steps and an evaluation


def test_a_run_never_writes_over_another_unless_told(reference, run_many):
    before = reference.result
    again = run_many(reference.folder.parent, {reference.folder.name: []}, world=1)[reference.folder.name]
    assert again.code == 2 and "already holds a run" in again.output and reference.result == before


def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(tmp_path, run_many):
    run = run_many(tmp_path, {"nan": "--learning_rate 1e30 --max_grad_norm 0 --save_final".split()}, world=2)["nan"]
    assert run.code == 4 and "stopped before the weights were updated" in run.output
    assert run.result["status"] == "nan" and not (run.folder / "final").exists()


def test_a_rank_that_fails_takes_the_others_along(train, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nif os.environ.get('RANK') == '1':\n"
        "    import torch.distributed as dist\n    real = dist.all_reduce\n    calls = []\n"
        "    def broken(*args, **kwargs):\n        calls.append(1)\n"
        "        if len(calls) == 3:\n            raise RuntimeError('planted')\n        return real(*args, **kwargs)\n"
        "    dist.all_reduce = broken\n"
    )
    started = time.perf_counter()
    run = train(world=2, PYTHONPATH=f"{tmp_path}:{MODULE_PATH}")
    assert run.code != 0 and "[rank 1]" in run.output and "planted" in run.output
    assert run.result["status"] == "error"
    assert time.perf_counter() - started < 60


def test_a_host_without_memory_ends_with_3_and_advice(train, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import torch.nn.functional as f\nreal = f.cross_entropy\n"
        "def full(*args, **options):\n"
        "    raise RuntimeError('[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can\\'t allocate memory')\n"
        "f.cross_entropy = full\n"
    )
    run = train(PYTHONPATH=f"{tmp_path}:{MODULE_PATH}")
    assert run.code == 3 and run.result["status"] == "oom", run.output
    assert "error: out of memory ([enforce fail" in run.output and "Try, in this order:\n  " in run.output


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_refused_alone_says_why_and_takes_the_other_along(rank, train, tmp_path):
    """Torchrun would see a success, and the other rank would wait in the process group for half an hour."""
    (tmp_path / "sitecustomize.py").write_text(
        f"import os\nif os.environ.get('RANK') == '{rank}':\n"
        "    import args, runtime\n    args.problems = lambda *_, **__: ['planted']\n    runtime.ALONE_AFTER_S = 2\n"
    )
    started = time.perf_counter()
    run = train(world=2, PYTHONPATH=f"{tmp_path}:{MODULE_PATH}")
    assert run.code == 2 and run.output.count("error: planted") == 1, run.output
    assert ("[rank 1] error" in run.output) == (rank == 1)
    assert time.perf_counter() - started < 60


def test_what_every_rank_is_refused_for_is_told_once(train):
    run = train("--train_file", "nowhere.txt", "--dataset", "wikitext", world=2)
    assert run.code == 2 and run.output.count("nowhere.txt: no such file") == 1, run.output
    assert "Traceback" not in run.output


BAD_INPUT = [
    ("--plugin gemini --precision fp32", "gemini trains in bf16 or fp16"),
    ("--precision fp16", "fp16 needs a GPU"),
    ("--plugin hybrid_parallel --tp 2", "--tp 2 x --pp 1: must divide the 1 processes"),
    ("--plugin hybrid_parallel --tp 1 --pp 1 --num_microbatches -1", "--num_microbatches -1: must be at least 0"),
    ("--model_name_or_path ./nowhere", "--model_name_or_path ./nowhere: no such folder"),
    ("--num_samples 2", "need a tokenizer"),
]


@pytest.mark.parametrize(("flags", "message"), BAD_INPUT)
def test_bad_input_is_one_clear_error_before_anything_is_written(flags, message, tmp_path, run_many):
    run = run_many(tmp_path, {"run": flags.split()}, world=1)["run"]
    assert run.code == 2 and message in run.output
    assert "Traceback" not in run.output and not run.folder.exists()


def test_a_file_that_is_not_there_is_one_clear_error_of_the_command(tmp_path):
    command = [sys.executable, str(ROOT / "train_clm.py"), *"--model_name_or_path tiny --dataset wikitext".split()]
    command += ["--output_dir", str(tmp_path / "run"), "--train_file", "nowhere.txt"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: --train_file nowhere.txt: ")
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_heads_that_tp_does_not_divide_are_refused(tmp_path, run_many):
    run = run_many(tmp_path, {"tp": "--plugin hybrid_parallel --tp 3".split()}, world=3)["tp"]
    assert run.code == 2 and run.output.count("--tp 3: must divide mini's attention heads, 4") == 1


def test_without_the_hub_the_message_names_the_files_to_give(tmp_path):
    command = [sys.executable, str(ROOT / "train_clm.py"), *"--model_name_or_path 125m --dataset netflix".split()]
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "Retrying" not in done.stderr  # transformers, imported before the hub was asked, would: for 23 s a file
    assert all(
        advice in done.stderr for advice in ("--model_name_or_path DIR", "--tokenizer_name DIR", "--train_file FILE")
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory, run_many, real_data):
    """Tiny, trained on real Netflix descriptions until it is clearly better than chance."""
    flags = (
        "--model_name_or_path tiny --dataset netflix --block_size 48 --max_train_samples 400 --max_eval_samples 21 "
        "--per_device_train_batch_size 8 --num_train_epochs 1 --max_train_steps 40 --learning_rate 5e-3 --save_final --export_dtype fp32 --num_samples 1 "
        "--prompt Love"
    )
    sources = [
        "--train_file",
        real_data / "netflix/netflix_titles.csv",
        "--tokenizer_name",
        real_data / "opt-tokenizer",
    ]
    return run_many(tmp_path_factory.mktemp("trained"), {"run": [*flags.split(), *sources]}, world=2)["run"]


def test_a_fine_tune_on_descriptions_learns_and_prints_texts(trained):
    assert trained.code == 0, trained.output
    assert trained.losses[-1] < 8.5 and trained.output.count("generated:") == 2


def test_perplexity_depends_neither_on_the_batch_size_nor_on_the_ranks(trained, run_many, tmp_path, real_data):
    source = [
        "--train_file",
        real_data / "netflix/netflix_titles.csv",
        "--model_name_or_path",
        trained.folder / "final",
    ]
    common = ["--eval_only", "--dataset", "netflix", "--block_size", 48, "--max_eval_samples", 21, *source]
    flags = {f"batch-{size}": [*common, "--per_device_eval_batch_size", size] for size in (1, 3, 8)}
    for name, run in run_many(tmp_path, flags, world=1, from_scratch=False).items():
        assert run.code == 0, name + run.output
        assert run.result["eval"]["loss"] == pytest.approx(trained.result["eval"]["loss"], rel=1e-6)
        assert run.result["eval"]["num_tokens"] == trained.result["eval"]["num_tokens"]


def test_a_pretrained_start_goes_on_from_the_trained_loss(trained, tmp_path, run_many, real_data):
    flags = [
        *("--dataset", "netflix", "--model_name_or_path", trained.folder / "final", "--block_size", 48),
        *("--train_file", real_data / "netflix/netflix_titles.csv", "--max_train_samples", 50),
    ]
    run = run_many(tmp_path, {"run": flags}, world=1, from_scratch=False)["run"]
    assert run.code == 0, run.output
    assert run.result["model"]["pretrained"] and run.losses[0] < 8.5


def test_an_evaluation_alone_says_nothing_of_training(tmp_path, run_many):
    run = run_many(tmp_path, {"run": ["--eval_only", "--max_eval_samples", 4]}, world=1)["run"]
    assert run.code == 0 and run.result["eval"]["num_tokens"] == 4 * 31, run.output
    assert run.result["plan_check"] is None and "step " not in run.output
    assert "eval: loss" in run.output


@pytest.mark.parametrize(
    ("flags", "needs"),
    [
        ("--model_name_or_path tiny --dataset synthetic", False),
        ("--model_name_or_path tiny --dataset synthetic --tokenizer_name facebook/opt-125m", True),
        ("--model_name_or_path 125m --dataset synthetic", True),
        ("--model_name_or_path DIR --train_file a.txt", False),
        ("--model_name_or_path DIR --validation_file a.txt", True),
        ("--model_name_or_path DIR --validation_file a.txt --eval_only", False),
        ("--model_name_or_path 125m --from_scratch --tokenizer_name DIR --train_file a.txt", False),
        ("--model_name_or_path 125m --from_scratch --train_file a.txt", True),
    ],
)
def test_the_hub_is_asked_for_where_something_is_named_by_it(flags, needs, tmp_path):
    assert needs_hub(parse_args(flags.replace("DIR", str(tmp_path)).split())) == needs


def test_random_weights_have_nothing_to_say_and_that_is_said_first(tmp_path):
    flags = f"--model_name_or_path tiny --eval_only --prompt x --tokenizer_name {tmp_path}"
    assert any("random weights" in problem for problem in output_problems(parse_args(flags.split())))


def test_a_plan_that_cannot_be_gives_the_launcher_its_code(tmp_path):
    environment = os.environ | {"RANK": "0", "CLM_EXIT_CODE_FILE": str(tmp_path / "code")}
    flags = "--plan --gpus 4 --plugin hybrid_parallel --tp 3"
    done = subprocess.run(
        [sys.executable, ROOT / "train_clm.py", *flags.split()], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--tp 3" in done.stderr
    assert (tmp_path / "code").read_text() == "2"


@pytest.mark.parametrize(("rank", "told", "code"), [("0", 2, "2"), ("1", 0, None)])
def test_an_unknown_flag_is_told_once_and_gives_the_launcher_its_code(tmp_path, rank, told, code):
    """As torchrun starts a rank: with its own exit code 0 there is no page of torchrun's."""
    environment = os.environ | {"RANK": rank, "CLM_EXIT_CODE_FILE": str(tmp_path / "code")}
    command = [sys.executable, ROOT / "train_clm.py", "--no_such_flag"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stderr.splitlines()) == told
    assert ("unrecognized arguments: --no_such_flag" in done.stderr) == bool(told)
    assert ((tmp_path / "code").read_text() if (tmp_path / "code").exists() else None) == code
