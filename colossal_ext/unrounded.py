"""Master weights and rotary frequencies as they were before a plugin cast the model to 16 bits.

Mends `module = module.to(self.mixed_precision)` in `HybridParallelModule.__init__` (booster/plugin/hybrid_parallel_plugin.py)
and `p.data = p.data.to(self.mixed_precision)` in `GeminiDDP._init_chunks` (zero/gemini/gemini_ddp.py), of which the fp32
master weights are made afterwards. From rounded weights the first updates, of the size of a 16-bit step, are rounded all
alike and not on average: HybridParallel's loss of a Llama of 1.1 billion random weights was 9.36 after 14 steps, and is 8.61 from
the model's own, in fp32 8.65 (one H200, 2026-11-29). Pretrained fp16 weights lose three of their bits. Random weights that
are cast as they are drawn, before either, are drawn once more afterwards (`model.DrawnAgain`).

Mends the same casts, and that in `LowLevelZeroModel.__init__` (booster/plugin/low_level_zero_plugin.py), of the frequencies of
rotary embeddings, too: with 8 bits an angle is off by up to a 512th of itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .upstream import require_mended_version


def fp32_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's weights by name, tied ones under each of theirs; none where they are not in fp32 any more.

    They are the model's own, no copies: what a plugin casts it puts elsewhere.
    """
    require_mended_version("master weights made of rounded ones")
    weights = {name: parameter.data for name, parameter in model.named_parameters(remove_duplicate=False)}
    return weights if all(weight.dtype == torch.float32 for weight in weights.values()) else {}


@contextmanager
def unrounded_frequencies(model: nn.Module) -> Iterator[None]:
    """Give a model its rotary frequencies back, on the device where it is by then."""
    kept = {
        (module, name): buffer.detach()
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name.endswith("inv_freq")
    }
    yield
    for (module, name), buffer in kept.items():
        setattr(module, name, buffer.to(getattr(module, name).device))
