"""Tensor and pipeline parallel OPT on transformers 5: `HybridParallelPlugin(custom_policy=OPTCausalLMPolicy())`.

The attention, and with tensor parallelism alone every forward, stay those of transformers: only their linear layers
are replaced by sharded ones. ColossalAI's own OPT policy imports classes that transformers 4.52 removed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from colossalai.pipeline.stage_manager import PipelineStageManager
from colossalai.shardformer.layer import VocabParallelEmbedding1D, VocabParallelLMHead1D
from colossalai.shardformer.policies.base_policy import ModulePolicyDescription, Policy, SubModuleReplacementDescription
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.opt.modeling_opt import OPTAttention, OPTDecoder, OPTDecoderLayer

from .layer_groups import LayerGroups
from .parallel_linear import (
    ColumnParallelLinear,
    CopyingColumnParallelLinear,
    RowParallelLinear,
    copied_to_ranks,
)
from .unrounded import fp32_weights
from .vocab_parallel import vocab_parallel_nll_sum

StageIndex = tuple[int, int]


def opt_layout_problems(config: OPTConfig, *, tp_size: int, num_stages: int, vocab_multiple: int = 1) -> list[str]:
    """Return why a model cannot be split like this: one sentence each.

    Args:
        tp_size: ranks that share each layer.
        num_stages: pipeline stages x model chunks of a stage.
        vocab_multiple: HybridParallelPlugin's `make_vocab_size_divisible_by`.
    """
    divided = {
        "attention heads": config.num_attention_heads,
        "feed-forward width": config.ffn_dim,
        "vocabulary": config.vocab_size,
    }
    found = [
        f"OPT's {what}, {size}, must divide by tp_size {tp_size}" for what, size in divided.items() if size % tp_size
    ]
    divides = config.vocab_size % tp_size == 0
    if tp_size > 1 and divides and config.vocab_size % (vocab_multiple * tp_size):
        found.append(
            f"make_vocab_size_divisible_by={vocab_multiple} would pad OPT's vocabulary of {config.vocab_size}, "
            "and its optimizer could not be saved; pass make_vocab_size_divisible_by=1"
        )
    if tp_size > 1 and config.attention_dropout:
        found.append(
            f"attention_dropout {config.attention_dropout} would drop the same positions in the heads of every "
            "tensor-parallel rank; set it to 0, as in the released models"
        )
    if num_stages > config.num_hidden_layers:
        found.append(f"OPT's {config.num_hidden_layers} layers are fewer than the {num_stages} pipeline stages")
    if num_stages > 1 and config.layerdrop:
        found.append(f"layerdrop {config.layerdrop}: not with pipeline stages; set it to 0")
    return found


class OPTCausalLMPolicy(Policy):
    """How OPTForCausalLM is split, in every shape (350m's post-norm and projections included).

    The model's `loss_function(logits=, labels=, vocab_size=)` returns a sum over targets. With tensor parallelism and
    `parallel_output` it is replaced by the same sum over sharded logits; else the model's own is called.

    Args:
        layers_per_graph: pipeline stages compile as many of their layers at a time; 1: the caller compiles, or nobody.
    """

    def __init__(self, layers_per_graph: int = 1) -> None:
        super().__init__()
        self.layers_per_graph = layers_per_graph
        self._fp32_weights: dict[str, Tensor] = {}

    @property
    def config(self) -> OPTConfig:
        return self.model.config

    @property
    def tp_size(self) -> int:
        return self.shard_config.tensor_parallel_size

    def config_sanity_check(self) -> None:
        """
        Raises:
            ValueError: the model does not divide by the layout, or the layout needs what this policy does not have.
        """
        stages, found = self.pipeline_stage_manager, list[str]()
        if self.tp_size > 1 or stages:  # else any model stays as it is
            found += opt_layout_problems(
                self.config,
                tp_size=self.tp_size,
                num_stages=stages.num_stages * stages.num_model_chunks if stages else 1,
                vocab_multiple=self.shard_config.make_vocab_size_divisible_by,
            )
        if self.shard_config.enable_sequence_parallelism:
            found.append("sequence parallelism: not implemented for OPT")
        if stages and stages.use_zbv:
            found.append("pp_style 'zbv': not implemented for OPT; use '1f1b' or 'interleaved'")
        if found:
            raise ValueError("; ".join(found))

    def preprocess(self) -> nn.Module:
        self._tied = self.tie_weight_check()
        return self.model

    def module_policy(self) -> dict[type[nn.Module], ModulePolicyDescription]:
        policy = self._tensor_parallel_policy() if self.tp_size > 1 else {}
        if self.pipeline_stage_manager is not None:
            forward = {"forward": self._stage_forward()}
            self.append_or_create_method_replacement(forward, policy, OPTForCausalLM)
        return policy

    def _tensor_parallel_policy(self) -> dict[type[nn.Module], ModulePolicyDescription]:
        replace = SubModuleReplacementDescription
        vocab = {"make_vocab_size_divisible_by": self.shard_config.make_vocab_size_divisible_by}
        head = {**vocab, "gather_output": not self.shard_config.parallel_output}
        local_shape = {
            "embed_dim": self.config.hidden_size // self.tp_size,
            "num_heads": self.config.num_attention_heads // self.tp_size,
        }
        return {
            OPTAttention: ModulePolicyDescription(
                attribute_replacement=local_shape,
                method_replacement={"forward": _attention_forward},
                sub_module_replacement=[
                    *(replace(name, ColumnParallelLinear) for name in ("q_proj", "k_proj", "v_proj")),
                    replace("out_proj", RowParallelLinear),
                ],
            ),
            OPTDecoderLayer: ModulePolicyDescription(
                sub_module_replacement=[replace("fc1", CopyingColumnParallelLinear), replace("fc2", RowParallelLinear)]
            ),
            OPTDecoder: ModulePolicyDescription(
                sub_module_replacement=[replace("embed_tokens", VocabParallelEmbedding1D, vocab)]
            ),
            OPTForCausalLM: ModulePolicyDescription(
                sub_module_replacement=[replace("lm_head", VocabParallelLMHead1D, head)]
            ),
        }

    def _stage_forward(self) -> partial[Any]:
        stages, index = self.pipeline_stage_manager, self._stage_index()
        forward = partial(stage_forward, stage_manager=stages, run_layers=LayerGroups(self.layers_per_graph))
        if stages.is_interleave:
            stages.stage_indices = index  # the schedule hands one of them to each call
            return forward
        return partial(forward, stage_index=index)

    def postprocess(self) -> nn.Module:
        if self.tp_size > 1:
            if self._tied and self.pipeline_stage_manager is None:
                self.model.lm_head.weight = self.model.model.decoder.embed_tokens.weight
            if self.shard_config.parallel_output:
                self.model.loss_function = partial(_sharded_loss, self.shard_config.tensor_parallel_process_group)
        self._fp32_weights = fp32_weights(self.model)
        return self.model

    def take_fp32_weights(self) -> dict[str, Tensor]:
        """Return, once, what this rank holds of the weights, as they were before the plugin cast them; by name."""
        weights, self._fp32_weights = self._fp32_weights, {}
        return weights

    def _stage_index(self) -> Any:
        """Return this rank's range of layers: (first, end), with interleaving a list of them."""
        stages = self.pipeline_stage_manager
        return stages.get_stage_index(stages.distribute_layers(self.config.num_hidden_layers))

    def get_held_layers(self) -> list[nn.Module | None]:
        """Return the modules whose parameters this rank keeps."""
        stages, decoder = self.pipeline_stage_manager, self.model.model.decoder
        ranges = self._stage_index() if stages.is_interleave else [self._stage_index()]
        held: list[nn.Module | None] = [
            layer for first, end in ranges for layer in decoder.layers[int(first) : int(end)]
        ]
        if stages.is_first_stage(ignore_chunk=True):
            held += [decoder.embed_tokens, decoder.embed_positions, decoder.project_in]
        if stages.is_last_stage(ignore_chunk=True):
            held += [decoder.final_layer_norm, decoder.project_out, self.model.lm_head]
        return held

    def get_shared_params(self) -> list[dict[int, Tensor]]:
        """Return, by stage, the two copies of a tied embedding, whose gradients the plugin adds up."""
        stages = self.pipeline_stage_manager
        if stages is None or stages.num_stages == 1 or not self._tied:
            return []
        copies = {0: self.model.model.decoder.embed_tokens.weight, stages.num_stages - 1: self.model.lm_head.weight}
        return [copies]


def _attention_forward(self: OPTAttention, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Compute this rank's heads: the forward of OPTAttention."""
    return OPTAttention.forward(self, copied_to_ranks(hidden_states, self.q_proj.process_group), *args, **kwargs)


def _sharded_loss(group: Any, logits: Tensor, labels: Tensor, vocab_size: int | None = None, **kwargs: Any) -> Tensor:
    return vocab_parallel_nll_sum(logits, labels, group)


def stage_forward(
    self: OPTForCausalLM,
    input_ids: Tensor,
    labels: Tensor | None = None,
    hidden_states: Tensor | None = None,
    *,
    stage_manager: PipelineStageManager,
    stage_index: StageIndex,
    run_layers: LayerGroups,
    **kwargs: Any,
) -> dict[str, Tensor] | CausalLMOutputWithPast:
    """Run this rank's layers: the forward of OPTForCausalLM on a pipeline stage.

    Args:
        input_ids: (B, T) int64, read by the first stage; the schedule hands them to every one.
        labels: (B, T) int64, read by the last stage; none: no loss.
        hidden_states: (B, T, H), what the previous stage returned.

    Returns:
        The next stage's `hidden_states`, on the last stage the loss and the logits.

    Raises:
        ValueError: an attention mask was passed, which right-padded causal training does not need.
    """
    if kwargs.get("attention_mask") is not None:
        raise ValueError("attention_mask: pipeline stages take none; pad on the right and label the padding -100")
    decoder = self.model.decoder
    if hidden_states is None:
        hidden_states = _embed(decoder, input_ids)
    first, end = (int(layer) for layer in stage_index)
    hidden_states = run_layers(decoder.layers[first:end], hidden_states, **_layer_arguments(decoder, hidden_states))
    if not stage_manager.is_last_stage():
        return {"hidden_states": hidden_states}
    return _head(self, hidden_states, labels)


def _embed(decoder: OPTDecoder, input_ids: Tensor) -> Tensor:
    embeddings = decoder.embed_tokens(input_ids)
    if decoder.project_in is not None:
        embeddings = decoder.project_in(embeddings)
    return embeddings + decoder.embed_positions(None, position_ids=_position_ids(embeddings))


def _position_ids(hidden_states: Tensor) -> Tensor:
    return torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]


def _layer_arguments(decoder: OPTDecoder, hidden_states: Tensor) -> dict[str, Any]:
    # Without a padding mask this is None under SDPA, which then runs its causal kernel.
    causal_mask = create_causal_mask(
        config=decoder.config, inputs_embeds=hidden_states, attention_mask=None, past_key_values=None
    )
    return {"attention_mask": causal_mask, "position_ids": _position_ids(hidden_states)}


def _head(model: OPTForCausalLM, hidden_states: Tensor, labels: Tensor | None) -> CausalLMOutputWithPast:
    decoder = model.model.decoder
    if decoder.final_layer_norm is not None:
        hidden_states = decoder.final_layer_norm(hidden_states)
    if decoder.project_out is not None:
        hidden_states = decoder.project_out(hidden_states)
    logits = model.lm_head(hidden_states)
    loss = None
    if labels is not None:
        loss = model.loss_function(logits=logits, labels=labels, vocab_size=model.config.vocab_size)
    return CausalLMOutputWithPast(loss=loss, logits=logits)
