"""Checkpoints: what is written, what a resumed run repeats, and what is refused."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from args import ConfigError, TrainArgs, parse_args
from checkpoint import FIXED_FLAGS, MANIFEST, find, generate, load, resume_problems, step_folders, verify
from conftest import MINI, MODULE_PATH, ROOT
from model import ModelSource
from runtime import RankFailure, folder_lock, lock_problem
from train_clm import export

LENGTH = "--max_train_steps 4 --save_strategy steps --save_steps 2"
EXACT = {
    "torch_ddp": "--plugin torch_ddp --dropout 0.1",
    "torch_ddp bf16": "--plugin torch_ddp --precision bf16",
    "torch_ddp_fp16": "--plugin torch_ddp_fp16 --allow_cpu_fp16",
    "zero 1 bf16": "--plugin low_level_zero --precision bf16 --dropout 0.1",
    "zero 2 fp16": "--plugin low_level_zero --zero_stage 2 --precision fp16 --allow_cpu_fp16",
    "zero 1 fp32 offloaded": "--plugin low_level_zero --offload_optim_frac 1",
    "gemini bf16": "--plugin gemini --dropout 0.1",
    "gemini fp16 offloaded": "--plugin gemini --precision fp16 --allow_cpu_fp16 --offload_optim_frac 0.5",
    "tensor parallel bf16": "--plugin hybrid_parallel --tp 2 --precision bf16 --dropout 0.1",
    "pipeline fp32": "--plugin hybrid_parallel --pp 2",
    "hybrid zero bf16": "--plugin hybrid_parallel --zero_stage 1 --precision bf16",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def whole(folder, run_many):
    """Four steps under every plugin on two ranks, checkpoints after 2 and 4, final/."""
    length = [*LENGTH.split(), "--save_final"]
    return run_many(folder, {name: [*flags.split(), *length] for name, flags in EXACT.items()}, world=2)


@pytest.fixture(scope="module")
def resumed(whole, tmp_path_factory, run_many):
    """The last two of them again, from the checkpoint after 2."""
    flags = {
        name: [*EXACT[name].split(), *LENGTH.split(), "--resume_from_checkpoint", checkpoint_of(run, 2)]
        for name, run in whole.items()
    }
    return run_many(tmp_path_factory.mktemp("resumed"), flags, world=2)


def checkpoint_of(run, step):
    return run.folder / "checkpoints" / f"step-{step:08d}"


@pytest.mark.parametrize("name", EXACT)
def test_a_resumed_run_repeats_the_losses_bit_for_bit(name, whole, resumed):
    assert whole[name].code == 0, whole[name].output
    assert resumed[name].code == 0, resumed[name].output
    assert resumed[name].losses == whole[name].losses[2:] and len(resumed[name].losses) == 2
    assert resumed[name].result["eval"]["loss"] == whole[name].result["eval"]["loss"]


@pytest.mark.parametrize("plugin", ["torch_ddp", "hybrid_parallel"])
def test_among_four_ranks_the_order_of_their_sums_is_repeated_as_well(plugin, tmp_path, run_many):
    """Two numbers have one sum; the order of four may depend on the bucket that they are in."""
    own = "--dropout 0.1 --per_device_train_batch_size 1 --model_name_or_path tiny --max_train_steps 8"
    flags = [*LENGTH.split(), *own.split(), "--plugin", plugin]  # a last bit takes time to show
    whole = run_many(tmp_path, {"whole": flags}, world=4)["whole"]
    assert whole.code == 0, whole.output
    more = [*flags, "--resume_from_checkpoint", checkpoint_of(whole, 2)]
    resumed = run_many(tmp_path, {"resumed": more}, world=4)["resumed"]
    assert resumed.losses == whole.losses[2:] and len(resumed.losses) == 6, resumed.output


def test_another_plugin_and_number_of_ranks_goes_on_with_the_same_losses(whole, tmp_path, run_many):
    start = checkpoint_of(whole["pipeline fp32"], 2)
    flags = {
        name: [*text.split(), *LENGTH.split(), "--per_device_train_batch_size", 1, "--resume_from_checkpoint", start]
        for name, text in {
            "ddp": "--plugin torch_ddp",
            "zero": "--plugin low_level_zero --zero_stage 2",
            "tp x pp": "--plugin hybrid_parallel --tp 2 --pp 2",
        }.items()
    }
    for name, run in run_many(tmp_path, flags, world=4).items():
        assert run.code == 0, name + run.output
        assert run.losses == pytest.approx(whole["pipeline fp32"].losses[2:], rel=1e-5), name


@pytest.mark.parametrize(("tp", "expected"), [(1, "restored"), (2, 5 + 2)])
def test_ranks_that_come_to_share_a_layer_draw_their_masks_anew(tp, expected, whole):
    drawn, folder = [], whole["torch_ddp"].folder
    engine = SimpleNamespace(
        args=TrainArgs(tp=tp, seed=5),
        runtime=SimpleNamespace(world_size=2),
        load_states=lambda read, adam_step: None,
        restore_counters=lambda counters: None,
        set_random_states=lambda states: drawn.append("restored"),
        seed_dropout=lambda seed: drawn.append(seed),
    )
    load(engine, find(str(checkpoint_of(whole["torch_ddp"], 2)), folder))
    assert drawn == [expected]


def test_an_interleaved_pipeline_of_any_number_of_parts_goes_on_as_another_and_as_ddp(tmp_path, run_many):
    """Eight layers: 2 parts of two layers on each of two stages, or 4 of one."""
    shutil.copytree(MINI, tmp_path / "eight")
    config = json.loads((MINI / "config.json").read_text())
    (tmp_path / "eight" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 8}))
    base = ["--model_name_or_path", tmp_path / "eight", "--per_device_train_batch_size", 2, *LENGTH.split()]
    pipeline = [*base, *"--plugin hybrid_parallel --pp 2 --pp_schedule interleaved --num_model_chunks".split()]
    flags = {"ddp": [*base, "--plugin", "torch_ddp"], "2": [*pipeline, 2], "4": [*pipeline, 4]}
    whole = run_many(tmp_path, flags, world=2)
    for name in ("2", "4"):
        assert whole[name].code == 0, whole[name].output
        assert whole[name].result["args"]["num_model_chunks"] == int(name)
        assert whole[name].losses == pytest.approx(whole["ddp"].losses, rel=1e-6)
    start = ["--resume_from_checkpoint", checkpoint_of(whole["4"], 2)]
    more = {f"{name} again": [*flags[name], *start] for name in flags}
    for name, run in run_many(tmp_path, more, world=2).items():
        assert run.code == 0, run.output
        exact = whole["4"].losses[2:]
        assert run.losses == (exact if name == "4 again" else pytest.approx(exact, rel=1e-6)), name


def test_a_checkpoint_of_four_ranks_goes_on_on_two_and_on_one(tmp_path, run_many):
    flags = ["--plugin", "low_level_zero", "--per_device_train_batch_size", 1, *LENGTH.split()]
    four = run_many(tmp_path, {"four": flags}, world=4)["four"]
    assert four.code == 0, four.output
    for world in (2, 1):
        more = [*LENGTH.split(), "--plugin", "torch_ddp", "--per_device_train_batch_size", 4 // world]
        more += ["--resume_from_checkpoint", checkpoint_of(four, 2)]
        run = run_many(tmp_path, {f"on-{world}": more}, world=world)[f"on-{world}"]
        assert run.code == 0, run.output
        assert run.losses == pytest.approx(four.losses[2:], rel=1e-5)


@pytest.mark.parametrize("name", ["torch_ddp", "zero 2 fp16", "gemini bf16", "tensor parallel bf16", "pipeline fp32"])
def test_a_checkpoint_holds_weights_and_moments_in_fp32_under_transformers_names(name, whole):
    tensors: dict[str, torch.Tensor] = {}
    for path in checkpoint_of(whole[name], 4).glob("states-*.safetensors"):
        tensors |= load_file(path)
    names = {key.split("/")[1] for key in tensors} - {"lm_head.weight"}
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint_of(whole[name], 4)))
    assert names == {name for name, _ in model.named_parameters()}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(4, 36)[None]).logits


def trained_model(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """Return the model of a checkpoint's fp32 weights, cast to a type."""
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("states-*.safetensors"):
        tensors |= {key[7:]: value for key, value in load_file(path).items() if key.startswith("weight/")}
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    assert not model.load_state_dict({"lm_head.weight": tensors["model.decoder.embed_tokens.weight"]} | tensors)[0]
    return model.to(dtype)


@pytest.mark.parametrize("name", EXACT)
def test_final_has_the_logits_of_the_trained_model_in_16_bits(name, whole):
    dtype = torch.float16 if "fp16" in name else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(whole[name].folder / "final")
    assert model.dtype == dtype and f"final, {dtype} weights" in whole[name].output
    assert torch.equal(logits(model), logits(trained_model(checkpoint_of(whole[name], 4), dtype)))


@pytest.mark.parametrize(
    ("asked", "dtype"), [("auto", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_an_exported_checkpoint_is_the_model_that_was_trained(asked, dtype, whole, tmp_path):
    source, target = checkpoint_of(whole["pipeline fp32"], 4), tmp_path / "exported"
    export(parse_args(["--export", str(source), "--output_dir", str(target), "--export_dtype", asked]), source)
    model = AutoModelForCausalLM.from_pretrained(target)
    assert model.dtype == dtype and torch.equal(logits(model), logits(trained_model(source, dtype)))


def test_the_model_of_a_checkpoint_is_written_by_one_command(whole, tmp_path):
    run, target = whole["torch_ddp"], tmp_path / "exported"
    command = [sys.executable, ROOT / "train_clm.py", "--export", checkpoint_of(run, 4), "--output_dir", target]
    subprocess.run(list(map(str, command)), check=True, timeout=120)
    exported, final = (load_file(folder / "model.safetensors") for folder in (target, run.folder / "final"))
    assert exported.keys() == final.keys() and all(torch.equal(exported[name], final[name]) for name in final)


def test_an_export_writes_over_an_export_and_over_nothing_else(whole, tmp_path):
    source, target = checkpoint_of(whole["torch_ddp"], 4), tmp_path / "exported"
    args = parse_args(["--export", str(source), "--output_dir", str(target), "--overwrite_output_dir"])
    for _ in range(2):
        export(args, source)
    (target / "checkpoints").mkdir()
    for folder in (target, whole["torch_ddp"].folder, source):
        before = sorted(folder.rglob("*"))
        with pytest.raises(ConfigError, match="holds more than an exported model"):
            export(replace(args, output_dir=str(folder)), source)
        assert sorted(folder.rglob("*")) == before


def test_only_one_of_many_ranks_exports(whole, tmp_path, run_training):
    source, target = checkpoint_of(whole["torch_ddp"], 4), tmp_path / "exported"
    run = run_training(tmp_path, "--export", source, "--output_dir", target, world=2)
    assert run.code == 0 and run.output.count("exported ") == 1, run.output
    assert (target / "model.safetensors").exists()


def test_an_export_that_the_disk_does_not_take_leaves_nothing(whole, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("checkpoint.finish_folder", full)
    source = checkpoint_of(whole["torch_ddp"], 4)
    with pytest.raises(RankFailure, match="could not be written"):
        export(parse_args(["--export", str(source), "--output_dir", str(tmp_path / "exported")]), source)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def gpt2(tmp_path):
    """A model with 16 positions, and a tokenizer that, as GPT-2's, puts nothing before a text."""
    words = Tokenizer(WordLevel({"<|endoftext|>": 0, **{word: number for number, word in enumerate("abcd", 1)}}, "a"))
    words.pre_tokenizer = Whitespace()
    config = GPT2Config(vocab_size=5, n_positions=16, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    return ModelSource("gpt2", config, str(tmp_path)), tokenizer


def test_texts_end_with_the_positions_and_begin_without_a_first_token(gpt2):
    args = parse_args(["--num_samples", "2", "--prompt", "a b", "--prompt", "c " * 30, "--max_new_tokens", "50"])
    texts = list(generate(gpt2[0], gpt2[1], args))
    assert len(texts) == 4 and texts[0].startswith("a b")
    assert all(len(text.split()) <= 16 for text in texts)


@pytest.fixture
def damaged(whole, tmp_path):
    shutil.copytree(whole["torch_ddp"].folder / "checkpoints", tmp_path / "checkpoints")
    return tmp_path


def newest(folder: Path) -> Path:
    return step_folders(folder / "checkpoints")[0]


def test_a_flipped_bit_is_found_and_last_falls_back_to_the_checkpoint_before(damaged, caplog):
    shard = next(newest(damaged).glob("states-*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{shard.name} is missing or damaged"):
        verify(newest(damaged))
    with caplog.at_level("WARNING", logger="clm"):
        assert find("last", damaged).manifest.progress.step == 2
    assert "skipped a damaged checkpoint" in caplog.text


@pytest.mark.parametrize("harm", ["truncate", "delete"])
def test_a_truncated_or_missing_file_is_named(harm, damaged):
    shard = next(newest(damaged).glob("states-*.safetensors"))
    os.truncate(shard, 100) if harm == "truncate" else shard.unlink()
    with pytest.raises(ConfigError, match=rf"{shard.name} is missing or damaged"):
        verify(newest(damaged))


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path, damaged):
    with pytest.raises(ConfigError, match=f"has no {MANIFEST}"):
        verify(tmp_path)
    (newest(damaged) / MANIFEST).write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        verify(newest(damaged))
    with pytest.raises(ConfigError, match="no whole checkpoint"):
        find("last", tmp_path / "nothing")


@pytest.mark.parametrize("name", FIXED_FLAGS)
def test_a_flag_that_decides_data_or_schedule_may_not_change(name, whole):
    manifest = verify(checkpoint_of(whole["torch_ddp"], 2))
    same = TrainArgs(**{**manifest.args, "prompt": ()})
    assert resume_problems(manifest, same, world_size=2) == []
    changed = TrainArgs(**{**manifest.args, "prompt": (), name: 77})
    (problem,) = resume_problems(manifest, changed, world_size=2)
    assert problem.startswith(f"--{name} 77: the checkpoint's run had")


def test_another_global_batch_is_refused(whole):
    manifest = verify(checkpoint_of(whole["torch_ddp"], 2))
    (problem,) = resume_problems(manifest, TrainArgs(**{**manifest.args, "prompt": ()}), world_size=4)
    assert problem.startswith("global batch 8")


def test_only_the_newest_checkpoints_are_kept(tmp_path, run_many):
    flags = "--save_strategy steps --save_steps 1 --save_total_limit 2 --max_train_steps 4"
    run = run_many(tmp_path, {"kept": flags.split()}, world=1)["kept"]
    assert [path.name for path in step_folders(run.folder / "checkpoints")] == ["step-00000004", "step-00000003"]


def test_an_epoch_ends_with_a_checkpoint_and_the_next_goes_on_in_new_order(tmp_path, run_many):
    flags = "--save_strategy epoch --max_train_samples 6 --max_train_steps 6"
    runs = run_many(tmp_path, {"epochs": flags.split()}, world=1)
    start = checkpoint_of(runs["epochs"], 3)
    more = run_many(tmp_path, {"more": [*flags.split(), "--resume_from_checkpoint", start]}, world=1)["more"]
    assert more.code == 0, more.output
    assert more.losses == runs["epochs"].losses[3:]


def test_a_pre_emption_signal_saves_a_checkpoint_between_two_steps(tmp_path):
    folder = tmp_path / "run"
    common = f"--model_name_or_path {MINI} --from_scratch --dataset synthetic --block_size 32 --no-save_final"
    command = [sys.executable, str(ROOT / "train_clm.py"), *common.split(), "--max_train_steps", "5000"]
    with subprocess.Popen(
        [*command, "--logging_steps", "1", "--output_dir", str(folder)], stdout=subprocess.PIPE, text=True
    ) as process:
        next(line for line in process.stdout if line.startswith("step"))
        process.send_signal(signal.SIGUSR1)
        output = process.stdout.read()
    assert process.returncode == 128 + signal.SIGUSR1 and "Traceback" not in output
    assert "status      interrupted" in output
    step = find("last", folder).manifest.progress.step
    assert json.loads((folder / "result.json").read_text())["steps"] == step


def test_a_run_that_has_ended_keeps_its_result(tmp_path, run_many):
    flags = ["--save_strategy", "epoch"]
    first = run_many(tmp_path, {"run": flags}, world=1)["run"].result
    again = [*flags, "--resume_from_checkpoint", "last"]
    run = run_many(tmp_path, {"run": again}, world=1)["run"]
    assert run.code == 0 and "nothing was left to train" in run.output and "planned " not in run.output
    assert run.result == first and len(run.losses) == 3


def test_a_live_run_keeps_others_out_of_its_folder_and_a_kill_lets_them_in(tmp_path, run_many):
    common = f"--model_name_or_path {MINI} --from_scratch --dataset synthetic --block_size 32 --save_strategy steps"
    command = [sys.executable, str(ROOT / "train_clm.py"), *common.split(), "--save_steps", "2"]
    command += ["--max_train_steps", "5000", "--logging_steps", "1", "--output_dir", str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        try:
            next(line for line in first.stdout if line.startswith("checkpoint"))
            others = {"resumed": ["--resume_from_checkpoint", "last"], "over": ["--overwrite_output_dir"]}
            flags = {name: [*command[2:], *own] for name, own in others.items()}
            for name, second in run_many(tmp_path, flags, world=1).items():
                assert second.code == 2 and second.output.startswith("error: --output_dir"), name + second.output
                assert f"in use by a run that is still alive (process {first.pid} on" in second.output
                assert second.output.count("\n") == 1
            with pytest.raises(ConfigError, match="still alive"):
                export(
                    parse_args(["--export", "any", "--output_dir", command[-1], "--overwrite_output_dir"]), Path("any")
                )
            assert first.poll() is None
        finally:
            first.kill()
    assert find("last", tmp_path / "run").manifest.progress.step >= 2
    assert lock_problem(tmp_path / "run") is None


def test_the_second_of_two_that_take_a_folder_at_once_is_refused(tmp_path):
    with folder_lock(tmp_path), pytest.raises(ConfigError, match=f"process {os.getpid()} on"), folder_lock(tmp_path):
        pass
    with folder_lock(tmp_path):
        assert "still alive" in lock_problem(tmp_path)


def test_without_locks_in_the_file_system_a_run_goes_on_and_says_so(tmp_path, monkeypatch, caplog):
    def unsupported(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with caplog.at_level("WARNING", logger="clm"), folder_lock(tmp_path), folder_lock(tmp_path):
        assert lock_problem(tmp_path) is None
    assert caplog.text.count("cannot be locked ([Errno 37] No locks available)") == 2


def test_a_file_the_disk_does_not_take_ends_every_rank_with_one_message(tmp_path, run_training):
    (tmp_path / "sitecustomize.py").write_text(
        "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))\n"
    )
    flags = "--save_strategy steps --save_steps 1"
    run = run_training(tmp_path, *flags.split(), world=2, PYTHONPATH=f"{tmp_path}:{MODULE_PATH}")
    assert run.code == 1 and run.output.count("could not be written") == 1, run.output
    assert "error: [rank 0] checkpoint" in run.output and "File too large" in run.output
    assert not list((run.folder / "checkpoints").iterdir())
