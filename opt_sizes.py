"""The OPT family as numbers: shapes, exact parameter counts, published settings. No torch import."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OPTShape:
    """Everything that decides an OPT model's size.

    Args:
        learning_rate: peak rate of the original pre-training run (OPT paper, table 1);
            for `tiny`, which has none, a rate that makes the loss fall within 20 steps.
        word_embed_proj_dim: embedding width; differs from `hidden_size` only in 350m,
            which then projects in and out.
        dropout: probability in training. 0 in `tiny`, so that a rehearsal under one plugin can be compared with
            another to the last digit: data-parallel ranks draw different masks.
        pre_norm: LayerNorm before attention and MLP. False only in 350m, which also has
            no final LayerNorm.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    learning_rate: float
    word_embed_proj_dim: int | None = None
    pre_norm: bool = True
    dropout: float = 0.1
    vocab_size: int = 50272
    max_positions: int = 2048

    @property
    def ffn_dim(self) -> int:
        return 4 * self.hidden_size

    @property
    def embed_dim(self) -> int:
        return self.word_embed_proj_dim or self.hidden_size

    @property
    def num_params(self) -> int:
        """Exact count of distinct parameters: the output head is tied to the embedding."""
        h = self.hidden_size
        attention = 4 * (h * h + h)
        mlp = 2 * h * self.ffn_dim + self.ffn_dim + h
        layer_norms = 2 * 2 * h
        embeddings = self.vocab_size * self.embed_dim + (self.max_positions + 2) * h
        projections = 2 * h * self.embed_dim if self.embed_dim != h else 0
        final_norm = 2 * h if self.pre_norm else 0
        return embeddings + projections + self.num_layers * (attention + mlp + layer_norms) + final_norm


# Zhang et al. 2022, "OPT: Open Pre-trained Transformer Language Models", table 1.
OPT_SHAPES: dict[str, OPTShape] = {
    "tiny": OPTShape(num_layers=4, hidden_size=64, num_heads=4, learning_rate=1e-3, dropout=0.0),
    "125m": OPTShape(num_layers=12, hidden_size=768, num_heads=12, learning_rate=6e-4),
    "350m": OPTShape(
        num_layers=24,
        hidden_size=1024,
        num_heads=16,
        learning_rate=3e-4,
        word_embed_proj_dim=512,
        pre_norm=False,
    ),
    "1.3b": OPTShape(num_layers=24, hidden_size=2048, num_heads=32, learning_rate=2e-4),
    "2.7b": OPTShape(num_layers=32, hidden_size=2560, num_heads=32, learning_rate=1.6e-4),
    "6.7b": OPTShape(num_layers=32, hidden_size=4096, num_heads=32, learning_rate=1.2e-4),
    "13b": OPTShape(num_layers=40, hidden_size=5120, num_heads=40, learning_rate=1e-4),
    "30b": OPTShape(num_layers=48, hidden_size=7168, num_heads=56, learning_rate=1e-4),
    "66b": OPTShape(num_layers=64, hidden_size=9216, num_heads=72, learning_rate=0.8e-4),
    "175b": OPTShape(num_layers=96, hidden_size=12288, num_heads=96, learning_rate=1.2e-4),
}


def size_name(word: str) -> str | None:
    """Return the table's name for a model word (`6.7`, `6.7B` -> `6.7b`), or None for a folder or hub id."""
    name = word.lower()
    for candidate in (name, f"{name}b", f"{name}m"):
        if candidate in OPT_SHAPES:
            return candidate
    return None
