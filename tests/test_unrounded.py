"""colossal_ext/unrounded.py: 16-bit plugins start from the model's own fp32 weights and rotary frequencies."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import colossal_ext  # noqa: F401  # before ColossalAI, which it imports the lean way

# isort: split
import pytest
import torch
from colossalai.booster.plugin.hybrid_parallel_plugin import HybridParallelModule
from colossalai.zero.gemini import GeminiDDP
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from architectures import CONFIGS, save
from colossal_ext.unrounded import fp32_weights, unrounded_frequencies

# All but torch_ddp, which keeps the model in fp32: what they start from, and what two ranks make of it.
PLUGINS = {
    "zero": "--plugin low_level_zero",
    "gemini": "--plugin gemini",
    "gemini on the host": "--plugin gemini --offload_optim_frac 1",
    "hybrid": "--plugin hybrid_parallel",
    "hybrid zero": "--plugin hybrid_parallel --zero_stage 1",
}
OPT = PLUGINS | {
    "tp": "--plugin hybrid_parallel --tp 2",
    "pp": "--plugin hybrid_parallel --pp 2",
}


@pytest.mark.parametrize(
    ("name", "plugins", "casts"), [("llama", PLUGINS, False), (None, OPT, False), (None, OPT, True)]
)
def test_16_bit_plugins_start_from_the_same_fp32_weights(
    name: str | None, plugins: dict[str, str], casts: bool, tmp_path: Path, run_many: Any
) -> None:
    """A step whose rate is nothing leaves the weights as they were; three of size change them alike.

    Cast as they are drawn, the weights of all but low_level_zero, which keeps its share in fp32, are drawn once more.
    """
    own = ["--model_name_or_path", save(CONFIGS[name][0], tmp_path)] if name else []
    start = [*own, "--precision", "bf16", "--learning_rate", "1e-30", "--weight_decay", 0, "--save_steps", 3]
    started = {
        f"{each}, start": [*start, "--save_strategy", "steps", *flags.split()] for each, flags in plugins.items()
    }
    trained = {each: [*own, "--precision", "bf16", *flags.split()] for each, flags in plugins.items()}
    runs = run_many(tmp_path, started | trained, world=2, casts=casts)
    assert all(run.code == 0 for run in runs.values()), [run.output for run in runs.values() if run.code]
    expected = weights_of(runs["zero, start"].folder)
    assert not all(torch.equal(weight, weight.bfloat16().float()) for weight in expected.values())
    for each in plugins:
        found = weights_of(runs[f"{each}, start"].folder)
        assert found.keys() - expected.keys() <= {"weight/lm_head.weight"}  # of the last of two stages
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], rtol=0, atol=1e-20, msg=f"{each}, {key}")
        within = {"tp": 2e-3, "pp": 2e-5}.get(
            each, 1e-6
        )  # they sum products, or gradients, in parts rounded to 16 bits
        assert runs[each].losses == pytest.approx(runs["zero"].losses, rel=within), each


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    """Return the fp32 weights of a run's only checkpoint."""
    (folder,) = (run / "checkpoints").glob("step-*")
    states = {key: tensor for path in folder.glob("states-*") for key, tensor in load_file(path).items()}
    return {key: tensor for key, tensor in states.items() if key.startswith("weight/")}


def test_upstream_still_casts_a_model_before_it_makes_master_weights() -> None:
    """Where it no longer does, colossal_ext/unrounded.py can go."""
    chunks, module = inspect.getsource(GeminiDDP._init_chunks), inspect.getsource(HybridParallelModule.__init__)
    assert 0 < chunks.index("p.data = p.data.to(self.mixed_precision)") < chunks.index("fp32_p = p.clone()")
    assert "module = module.to(self.mixed_precision)" in module


def test_only_weights_that_are_still_in_fp32_are_kept() -> None:
    model = nn.Linear(2, 2)
    weights = fp32_weights(model)
    before = model.weight.detach().clone()
    model.bfloat16()
    assert torch.equal(weights["weight"], before) and model.weight.dtype == torch.bfloat16
    assert fp32_weights(model) == {}


@pytest.mark.parametrize("cast", [lambda buffer: buffer.bfloat16(), None])
def test_frequencies_come_back_however_they_were_cast(cast: Any) -> None:
    """HybridParallel and LowLevelZero put another tensor in their place, Gemini other data into it."""
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"][0])
    rotary = model.model.rotary_emb
    before = rotary.inv_freq.clone()
    with unrounded_frequencies(model):
        if cast:
            rotary.inv_freq = cast(rotary.inv_freq)
        else:
            rotary.inv_freq.data = rotary.inv_freq.bfloat16()
        assert rotary.inv_freq.dtype == torch.bfloat16
    assert rotary.inv_freq.dtype == torch.float32 and torch.equal(rotary.inv_freq, before)
