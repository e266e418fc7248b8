"""Small causal language models that are not OPT, and a folder of one."""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import (
    AutoConfig,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    MptConfig,
    PretrainedConfig,
)

WORDS = 512
LLAMA = {
    "vocab_size": WORDS, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
GPT = {"vocab_size": WORDS, "n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 4}
CONFIGS = {  # and the longest row that each can take
    "llama": (LlamaConfig(**LLAMA), 128),
    "gemma2": (Gemma2Config(**LLAMA, head_dim=16), 128),  # no scaled_dot_product_attention, capped logits
    "mixtral": (MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2), 128),
    "gpt2": (GPT2Config(**GPT, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0), 128),
    "gptj": (GPTJConfig(**GPT, rotary_dim=8), 128),
    "bloom": (BloomConfig(vocab_size=WORDS, hidden_size=64, n_layer=2, n_head=4), sys.maxsize),  # no positions: ALiBi
    "mpt": (MptConfig(vocab_size=WORDS, d_model=64, n_heads=4, n_layers=2, max_seq_len=128), 128),
    "mamba": (MambaConfig(vocab_size=WORDS, hidden_size=64, num_hidden_layers=2), sys.maxsize),  # no heads either
}


def save(config: PretrainedConfig, folder: Path) -> Path:
    """Return a model folder without weights."""
    config.save_pretrained(folder / "model")
    assert type(AutoConfig.from_pretrained(folder / "model")) is type(config)
    return folder / "model"
