"""Causal language models that are not OPT: the same script, plugins, losses and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, T5Config

from architectures import CONFIGS, WORDS, save
from args import ConfigError, TrainArgs
from model import ModelSource, build_model, decoder_layers, find_model, recompute_layers, shape_of

PLUGINS = {
    "ddp": "--plugin torch_ddp",
    "zero": "--plugin low_level_zero --offload_optim_frac 0.5",
    "hybrid": "--plugin hybrid_parallel",
    "recomputed": "--plugin torch_ddp --gradient_checkpointing on",
    "gemini": "--plugin gemini",
    "bf16": "--plugin low_level_zero --precision bf16",
}


def source_of(name: str) -> ModelSource:
    return ModelSource(name, CONFIGS[name][0], None)


@pytest.mark.parametrize("name", CONFIGS)
def test_its_numbers_are_those_of_the_model(name: str) -> None:
    shape = shape_of(source_of(name))
    model = build_model(source_of(name), seed=0)
    assert shape.num_params == sum(parameter.numel() for parameter in model.parameters())
    assert (shape.num_layers, shape.hidden_size, shape.vocab_size) == (2, 64, WORDS) and shape.num_heads == 0
    assert shape.max_positions == CONFIGS[name][1]
    assert len(decoder_layers(model)) == 2


@pytest.mark.parametrize("name", CONFIGS)
def test_its_summed_loss_and_recomputed_gradients_are_those_of_transformers(name: str) -> None:
    ids = torch.randint(0, WORDS, (2, 16), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    plain: Any = AutoModelForCausalLM.from_config(CONFIGS[name][0]).train()
    ours: Any = build_model(source_of(name), seed=0)
    recompute_layers(ours, 2)
    mean, summed = plain(input_ids=ids, labels=ids).loss, ours(input_ids=ids, labels=ids).loss
    assert float(summed.detach()) == pytest.approx(float(mean.detach()) * 2 * 15, rel=1e-5)
    (mean * 2 * 15).backward()
    summed.backward()
    theirs = dict(plain.named_parameters())
    for parameter_name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[parameter_name].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom", "mixtral"])
def test_every_plugin_trains_it_alike(name: str, tmp_path: Path, run_many: Any) -> None:
    folder = save(CONFIGS[name][0], tmp_path)
    base = ["--model_name_or_path", folder, "--save_final", "--export_dtype", "fp32"]
    runs = run_many(tmp_path, {each: [*base, *flags.split()] for each, flags in PLUGINS.items()}, world=2)
    for each, run in runs.items():
        assert run.code == 0, each + run.output
        within = 2e-3 if each in ("gemini", "bf16") else 1e-5
        assert run.losses == pytest.approx(runs["ddp"].losses, rel=within) and len(run.losses) == 3, each
        assert run.result["eval"]["loss"] == pytest.approx(runs["ddp"].result["eval"]["loss"], rel=within), each
        final: Any = AutoModelForCausalLM.from_pretrained(run.folder / "final")
        assert final.config.model_type == name and final.dtype == torch.float32
    ddp, zero = (AutoModelForCausalLM.from_pretrained(runs[each].folder / "final") for each in ("ddp", "zero"))
    for (_, one), (_, other) in zip(ddp.named_parameters(), zero.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_compiled_on_a_gpu_it_trains_as_it_does_in_fp32(name: str, tmp_path: Path, run_training: Any) -> None:
    base = ["--model_name_or_path", save(CONFIGS[name][0], tmp_path), "--block_size", 128]

    def losses(label: str, *flags: str, compile: str = "on") -> list[float]:
        run = run_training(tmp_path / label, *base, *flags)
        assert run.code == 0, run.output
        assert run.result["args"]["compile"] == compile
        return run.losses

    plain = losses("plain", "--plugin", "torch_ddp", "--precision", "fp32", "--compile", "off", compile="off")
    for plugin in ("low_level_zero", "gemini"):
        assert losses(plugin, "--plugin", plugin) == pytest.approx(plain, rel=2e-3) and len(plain) == 3, plugin


def test_a_model_that_is_no_causal_one_is_refused(tmp_path: Path) -> None:
    folder = save(T5Config(d_model=64, d_ff=64, num_layers=1, num_heads=2, vocab_size=WORDS), tmp_path)
    source = find_model(TrainArgs(model_name_or_path=str(folder), from_scratch=True))
    with pytest.raises(ConfigError, match="t5 is no causal language model of text"):
        shape_of(source)


def test_dropout_is_refused_where_the_model_has_none_of_that_name(tmp_path: Path) -> None:
    args = TrainArgs(model_name_or_path=str(save(CONFIGS["llama"][0], tmp_path)), from_scratch=True, dropout=0.1)
    with pytest.raises(ConfigError, match="llama's config has no dropout"):
        find_model(args)
