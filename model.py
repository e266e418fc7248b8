"""The model: its configuration, tokenizer, weights and loss, and what is applied to it before boosting."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    OPTConfig,
    PretrainedConfig,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from args import ConfigError, TrainArgs
from opt_sizes import OPT_SHAPES, OPTShape
from planner import ModelShape, model_shape

IGNORED = -100
HOST = torch.device("cpu")
PUBLISHED_SIZES = tuple(size for size in OPT_SHAPES if size not in ("tiny", "175b"))


@dataclass(frozen=True)
class ModelSource:
    """What will be built: a configuration, and the folder or hub id of its weights (None: random).

    Args:
        cache_dir: where the hub's files are kept; None: where its client keeps them.
    """

    name: str
    config: PretrainedConfig
    weights: str | None
    cache_dir: str | None = None

    @property
    def pretrained(self) -> bool:
        return self.weights is not None


def opt_config(shape: OPTShape) -> OPTConfig:
    """Return the transformers configuration of an OPT shape."""
    return OPTConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        ffn_dim=shape.ffn_dim,
        max_position_embeddings=shape.max_positions,
        word_embed_proj_dim=shape.embed_dim,
        do_layer_norm_before=shape.pre_norm,
        dropout=shape.dropout,
        attention_dropout=0.0,
    )


def shape_of(source: ModelSource) -> ModelShape:
    """Return the numbers that the planner and the FLOP count need, of OPT or any decoder with the usual names.

    Raises:
        ConfigError: it is no causal language model of text.
    """
    config = source.config
    lost = [name for name in ("num_hidden_layers", "hidden_size", "vocab_size") if not hasattr(config, name)]
    if lost or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(
            f"--model_name_or_path {source.name}: {config.model_type} is no causal language model of text"
            + (f"; its config has no {lost[0]}" if lost else "")
        )
    embed_dim = getattr(config, "word_embed_proj_dim", config.hidden_size)
    shape = OPTShape(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=getattr(config, "num_attention_heads", 1),  # Mamba has none
        learning_rate=math.nan,
        word_embed_proj_dim=None if embed_dim == config.hidden_size else embed_dim,
        pre_norm=getattr(config, "do_layer_norm_before", True),
        vocab_size=config.vocab_size,
        max_positions=max_positions(config),
    )
    with torch.device("meta"):
        num_params = AutoModelForCausalLM.from_config(config).num_parameters()
    found = model_shape(shape, num_params)
    if config.model_type != "opt":
        return replace(found, num_heads=0)
    return replace(found, num_heads=config.num_attention_heads, ffn_width=config.ffn_dim, layerdrop=config.layerdrop)


def max_positions(config: PretrainedConfig) -> int:
    """Return the longest row that a model takes, in tokens."""
    # MPT's are max_seq_len; nothing in BLOOM and Mamba limits how long a row is.
    found = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    return found or sys.maxsize


def find_model(args: TrainArgs) -> ModelSource:
    """Return the configuration and where the weights are; loads no weight.

    Raises:
        ConfigError: unknown model, unreadable folder, no weights in it, hub out of reach, too few layers or heads
            for the parallel layout.
    """
    size = args.model_size
    if size and args.random_weights:
        return ModelSource(size, _trainable(opt_config(OPT_SHAPES[size]), args), None)
    if size and size not in PUBLISHED_SIZES:
        raise ConfigError(f"--model_name_or_path {size}: its weights are not public; add --from_scratch")
    name = f"facebook/opt-{size}" if size else args.model_name_or_path
    config = _trainable(_load_config(name, args), args)
    return ModelSource(size or args.model_slug, config, None if args.random_weights else _weights(name), args.cache_dir)


def _load_config(name: str, args: TrainArgs) -> PretrainedConfig:
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    folder = Path(name)
    if looks_local and not folder.is_dir():
        raise ConfigError(f"--model_name_or_path {name}: no such folder, and not a size ({', '.join(OPT_SHAPES)})")
    if folder.is_dir() and not (folder / "config.json").is_file():
        near = (
            f"did you mean {folder / 'final'}?" if (folder / "final").is_dir() else "give a Hugging Face model folder"
        )
        raise ConfigError(f"--model_name_or_path {name}: has no config.json; {near}")
    try:
        return AutoConfig.from_pretrained(str(folder) if folder.is_dir() else name, cache_dir=args.cache_dir)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--model_name_or_path {name}: cannot be had from the hub ({_first_line(error)}); "
            f"give a local folder (--model_name_or_path DIR), or one of the sizes {', '.join(OPT_SHAPES)} "
            "with --from_scratch"
        ) from None


def _weights(name: str) -> str:
    folder = Path(name)
    if any(folder.glob("states-*.safetensors")):
        raise ConfigError(
            f"--model_name_or_path {name}: is a run's checkpoint; make a model of it first: "
            f"python train_clm.py --export {name} --output_dir DIR"
        )
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise ConfigError(
            f"--model_name_or_path {name}: holds no *.safetensors or pytorch_model*.bin; add --from_scratch"
        )
    return str(folder) if folder.is_dir() else name


def _trainable(config: PretrainedConfig, args: TrainArgs) -> PretrainedConfig:
    # A cache built in every training forward costs memory and makes torch.compile retrace each layer.
    config.use_cache = False
    if args.dropout is not None:
        if not hasattr(config, "dropout"):
            raise ConfigError(
                f"--dropout {args.dropout:g}: {config.model_type}'s config has no dropout of that name; set its own in config.json"
            )
        config.dropout = args.dropout
    return config


def layerdrop_problems(source: ModelSource, world_size: int) -> list[str]:
    """Return what in the model would differ from rank to rank."""
    if world_size == 1 or not getattr(source.config, "layerdrop", False):
        return []
    return [f"{source.name}: leaves layers out at random, on each rank others; set layerdrop to 0 in config.json"]


def load_tokenizer(args: TrainArgs, source: ModelSource) -> Any:
    """Return the tokenizer, or None for synthetic tokens without a named tokenizer.

    Raises:
        ConfigError: no tokenizer there, hub out of reach, or more words than the model's vocabulary.
    """
    if args.dataset == "synthetic" and args.tokenizer_name is None:
        return None
    size = {"tiny": "125m", "175b": "66b"}.get(source.name, source.name)
    name = args.tokenizer_name or (f"facebook/opt-{size}" if args.model_size else args.model_name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, cache_dir=args.cache_dir)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"--tokenizer_name {name}: no tokenizer to be had ({_first_line(error)}); give --tokenizer_name DIR, "
            "a local folder with vocab.json and merges.txt, or tokenizer.json"
        ) from None
    if len(tokenizer) > source.config.vocab_size:
        raise ConfigError(
            f"--tokenizer_name {name}: has {len(tokenizer)} words, more than the model's {source.config.vocab_size}"
        )
    return tokenizer


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def build_model(
    source: ModelSource, *, seed: int, device: torch.device = HOST, place: Callable[[nn.Module], Any] | None = None
) -> nn.Module:
    """Return the model in fp32 with the summed loss, the same on every rank.

    Random weights are drawn on `device`, which takes a GPU milliseconds and a host half a minute for 1.3b. Pretrained
    safetensors are mapped to the host, not read: the ranks of a machine share the pages until they write.

    Args:
        place: gets each module on a GPU as soon as its own random weights are drawn, to put them elsewhere.

    Raises:
        ConfigError: the weights cannot be read, or do not fill the model.
    """
    torch.manual_seed(seed)
    if source.weights is None:
        model: Any = _random_weights(source.config, device, place)
    else:
        model = _load_weights(source)
    model.loss_function = summed_loss
    return model.train()


def _random_weights(
    config: PretrainedConfig, device: torch.device, place: Callable[[nn.Module], Any] | None
) -> nn.Module:
    model = without_weights(config)
    # Buffers, such as rotary frequencies, are computed by the constructor, which meta tensors skip.
    if device.type == "cpu" or any(True for _ in model.buffers()):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return draw_weights(model, device, place)


def without_weights(config: PretrainedConfig) -> Any:
    """Return a model whose weights take no memory, on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def draw_weights(model: Any, device: torch.device, place: Callable[[nn.Module], Any] | None = None) -> Any:
    """Give a model on the meta device random weights, drawn module by module on `device`, each put in its place."""
    for _, module in _drawn_modules(model, device):
        if place:
            place(module)
    model.tie_weights()
    return model


@torch.no_grad()
def _drawn_modules(model: Any, device: torch.device) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of each that has weights of its own, as soon as they are drawn."""
    tied = model.get_output_embeddings() if model.config.tie_word_embeddings else None
    for name, module in model.named_modules():
        if module is tied or not module._parameters:
            continue
        module.to_empty(device=device, recurse=False)
        model._init_weights(module)
        yield name, module


class DrawnAgain:
    """Reads the random weights of `build_model` by name, drawn once more from the seed.

    Read in the model's order they are all drawn once; a name that has gone by is drawn anew, with all before it. One
    module's weights are in memory at a time.
    """

    _gone: set[str]
    _drawn: dict[str, Tensor]
    _modules: Iterator[dict[str, Tensor]]

    def __init__(self, config: PretrainedConfig, seed: int, device: torch.device) -> None:
        self._config, self._seed, self._device = config, seed, device
        self._start()

    @cached_property
    def _untied(self) -> dict[str, str]:
        """Each weight's name and the first of its names."""
        first = dict[int, str]()
        named = without_weights(self._config).named_parameters(remove_duplicate=False)
        return {name: first.setdefault(id(parameter), name) for name, parameter in named}

    def __call__(self, name: str) -> Tensor:
        """Return the fp32 tensor, in the model's shape, on the device."""
        name = self._untied[name]
        if name in self._gone:
            self._start()
        while name not in self._drawn:
            self._gone.update(self._drawn)
            self._drawn = next(self._modules)
        return self._drawn[name]

    def _start(self) -> None:
        self._gone, self._drawn, self._modules = set(), {}, self._draw()

    def _draw(self) -> Iterator[dict[str, Tensor]]:
        torch.manual_seed(self._seed)  # at the first read: until then others draw numbers, too
        for name, module in _drawn_modules(without_weights(self._config), self._device):
            yield {f"{name}.{key}": weight.data for key, weight in module._parameters.items() if weight is not None}
            module.to_empty(device="meta", recurse=False)


def _load_weights(source: ModelSource) -> nn.Module:
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source.weights,
            cache_dir=source.cache_dir,
            config=source.config,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"--model_name_or_path {source.weights}: its weights cannot be read ({_first_line(error)})"
        ) from None
    lost = sorted({*info["missing_keys"], *(str(key) for key in info.get("mismatched_keys", ()))})
    if lost:
        raise ConfigError(
            f"--model_name_or_path {source.weights}: its weights lack {len(lost)} tensors, first {lost[0]}"
        )
    return model


def summed_loss(logits: Tensor, labels: Tensor, vocab_size: int | None = None, **kwargs: Any) -> Tensor:
    """Return the negative log-likelihood summed over the real targets.

    Args:
        logits: (B, T, V), any float dtype.
        labels: (B, T) int64, -100 where ignored; position t is the target of the logits at t - 1.

    Returns:
        fp32 scalar in nats; 0 where no target is real.
    """
    targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def count_targets(labels: Tensor) -> int:
    """Return how many positions of `labels` (B, T) are predicted: those after the first that are not -100."""
    return int((labels[:, 1:] != IGNORED).sum())


def check_first_loss(loss: float, source: ModelSource) -> None:
    """Raise ConfigError when a pretrained start predicts no better than chance, ln(vocabulary) nats a token."""
    chance = math.log(source.config.vocab_size)
    if source.pretrained and loss > chance - 0.5:
        raise ConfigError(
            f"--model_name_or_path {source.weights}: the first loss, {loss:.2f}, is that of random weights "
            f"(ln {source.config.vocab_size} = {chance:.2f}): the weights were not loaded, or were never trained; "
            "add --from_scratch to train from random weights"
        )


def recompute_layers(model: Any, num_layers: int) -> None:
    """Recompute the activations of the first `num_layers` decoder layers in the backward pass; 0: none."""
    if num_layers == 0:
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in decoder_layers(model)[num_layers:]:
        layer.gradient_checkpointing = False


def decoder_layers(model: nn.Module) -> list[Any]:
    """Return the layers that transformers can recompute, from the input to the output."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def compile_layers(
    model: Any,
    groups: Iterable[Sequence[Any]] | None = None,
    *,
    gradient_dtype: torch.dtype | None = None,
    cuda_graphs: bool = False,
) -> None:
    """Compile the decoder layers and the loss in place, so that parameter names stay.

    One graph serves all layers, or all groups of one size, with batches of one size. Compiled as a whole the model is
    slower (125m, batch 32, one H100: 411k instead of 470k tokens/s), holds the logits twice, and gives no gradient away
    before all of them are there.

    Args:
        groups: layers that are compiled together; None: each by itself.
        gradient_dtype: of the layers' matrices, under autocast to it; None: that of the weights.
        cuda_graphs: the layers' kernels are recorded in the first steps and replayed in the others.
    """
    from colossal_ext.gradient_types import set_gradient_dtype
    from colossal_ext.layer_groups import compile_together

    # Which kernel sums fastest is not to be found by timing: the choice would change the last bits from run to run. Nor are
    # matrix products padded then, of which those of OPT need none.
    torch._inductor.config.deterministic = True
    # Tensor-parallel ranks make weights' gradients while they add up those of a layer's input.
    torch._inductor.config.reorder_for_compute_comm_overlap = True
    torch._inductor.config.reorder_for_compute_comm_overlap_passes = ["raise_comms", "sink_waits"]
    set_gradient_dtype(decoder_layers(model), gradient_dtype)
    for group in groups or [(layer,) for layer in decoder_layers(model)]:
        compile_together(group, cuda_graphs=cuda_graphs)
    model.loss_function = torch.compile(model.loss_function, dynamic=False)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two optimizer groups: matrices with `weight_decay`, biases and LayerNorm weights without."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def learning_rate(args: TrainArgs, source: ModelSource) -> float:
    """Return the peak rate: the flag, 5e-5 for pretrained weights, the OPT paper's for random ones."""
    if args.learning_rate is not None:
        return args.learning_rate
    if source.pretrained:
        return 5e-5
    return OPT_SHAPES[source.name].learning_rate if source.name in OPT_SHAPES else 1e-4
