"""Gemini's hook around an operator or a layer: parameters change state together, and chunks are fetched ahead."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from colossalai.utils import is_ddp_ignored
from colossalai.zero.gemini.chunk import TensorState
from colossalai.zero.gemini.chunk.chunk import STATE_TRANS, Chunk, TensorInfo
from colossalai.zero.gemini.gemini_ddp import GeminiDDP
from colossalai.zero.gemini.gemini_hook import GeminiZeROHook, TrainingPhase
from colossalai.zero.gemini.gemini_mgr import GeminiManager
from colossalai.zero.gemini.placement_policy import AutoPlacementPolicy

from .upstream import require_mended_version

# From which states a parameter may go to another.
_SOURCES = {state: tuple(source for source, target in STATE_TRANS if target is state) for state in TensorState}


@dataclass(frozen=True)
class Residents:
    """Those of some parameters that lie in one chunk.

    Args:
        numbers: their places among the parameters, ascending; of one that is there twice the first.
        infos: where in the chunk each of them lies, and its state.
    """

    chunk: Chunk
    numbers: tuple[int, ...]
    infos: tuple[TensorInfo, ...]

    def change_to(self, state: TensorState) -> None:
        """Do for all of them what `Chunk.tensor_trans_state` (chunk.py:426 of 0.5.0) does for one."""
        counts = self.chunk.tensor_state_cnter
        for source in _SOURCES[state]:
            moved = [info for info in self.infos if info.state is source]
            if moved:
                counts[source] -= len(moved)
                counts[state] += len(moved)
            for info in moved:
                info.state = state

    @functools.cached_property
    def without_last(self) -> Residents:
        """All but the last one, whose gradient completes the chunk's."""
        return Residents(self.chunk, self.numbers[:-1], self.infos[:-1])


class LayerHook(GeminiZeROHook):
    """GeminiZeROHook that remembers where parameters lie, and fetches chunks ahead in training alone.

    Upstream (gemini_hook.py:27 and :76 of 0.5.0) looks for the chunk and the state of each parameter in each of four
    calls a step, by Python's hashes of tensors and enumerations, and asks each for `requires_grad`, which ColoParameter
    answers in Python, too. Frozen parameters are not told apart here: Gemini never reduces a chunk that has one.

    It also fetches ahead in evaluation (gemini_hook.py:54), what a backward pass would want next. Those chunks are given
    back while they are still on their way, and the next step waits for them instead of fetching them: it computes with
    parameters without data. And it takes the operators of an evaluation before the first step for part of that step.
    """

    def __init__(self, gemini_manager: Any) -> None:
        super().__init__(gemini_manager)
        self._residents: dict[tuple[int, ...], tuple[Residents, ...]] = {}

    @property
    def overwrites_weights(self) -> bool:
        """Whether gradients take the weights' place in their chunks: not with accumulation."""
        return bool(self._chunk_manager.reuse_fp16_chunk)

    def residents(self, params: Sequence[torch.Tensor]) -> tuple[Residents, ...]:
        """Return the parameters by chunk, those of the first one's first. All have to outlive the hook."""
        key = tuple(map(id, params))
        if key not in self._residents:
            self._residents[key] = tuple(self._look_up(params))
        return self._residents[key]

    def _look_up(self, params: Sequence[torch.Tensor]) -> list[Residents]:
        numbers: dict[Chunk, list[int]] = {}
        seen = set[int]()
        for number, parameter in enumerate(params):
            if id(parameter) not in seen and not is_ddp_ignored(parameter):
                numbers.setdefault(self._chunk_manager.get_chunk(parameter), []).append(number)
            seen.add(id(parameter))
        return [
            Residents(chunk, tuple(own), tuple(chunk.tensors_info[params[number]] for number in own))
            for chunk, own in numbers.items()
        ]

    def pre_op(self, params: Sequence[torch.Tensor]) -> None:
        """Bring the parameters' chunks, and let come what will be wanted next."""
        with torch._C.DisableTorchFunction():  # a gathered chunk's parameters get their data, one by one
            self._bring(self.residents(params))

    def _bring(self, residents: Sequence[Residents]) -> None:
        manager = self._gemini_manager
        chunks = tuple(each.chunk for each in residents)
        missing = manager.wait_chunks(chunks)
        for each in residents:
            each.change_to(TensorState.COMPUTE)
        trains = torch.is_grad_enabled() or self._training_phase is TrainingPhase.BACKWARD
        manager.sample_overall_data()
        manager.adjust_layout(chunks, record_anyway=trains and manager.placement_policy.max_prefetch > 0)
        for chunk in missing:
            self._chunk_manager.access_chunk(chunk)
        if trains:
            self._fetch_ahead()
        manager.record_model_data_volume()

    def post_op(self, params: Sequence[torch.Tensor]) -> None:
        """Let the parameters' chunks go."""
        is_forward = self._training_phase is TrainingPhase.FORWARD
        for each in self.residents(params):
            each.change_to(TensorState.HOLD if is_forward else TensorState.HOLD_AFTER_BWD)

    def _fetch_ahead(self) -> None:
        manager = self._gemini_manager
        for chunk in manager.placement_policy.get_prefetch_chunks(
            is_warmup=manager.is_warmup(),
            compute_list=manager.compute_list,
            compute_idx=manager.compute_idx,
            async_works=manager.async_works,
        ):
            if work := self._chunk_manager.access_chunk(chunk, async_access=True):
                manager.add_work(chunk, work)


def use_layer_hook(model: GeminiDDP) -> None:
    """Give a boosted model this hook in place of upstream's.

    Upstream fetches ahead on a stream of its own. NCCL gathers on another one in any case, and what is allocated on a
    third is not free again before the device has used it, while the host is layers ahead.

    Raises:
        RuntimeError: another ColossalAI than 0.5.0 is installed.
    """
    require_mended_version("colossalai.zero.gemini.gemini_hook.GeminiZeROHook")
    hook = LayerHook(model.gemini_manager)
    model.hooks[model.hooks.index(model.param_op_hook)] = hook
    model.param_op_hook = hook


def forget_layouts() -> None:
    """Let go of the models that are no longer used: upstream's caches keep every one's chunks."""
    GeminiManager._get_layout_info.cache_clear()
    AutoPlacementPolicy._sort_can_evict_chunks.cache_clear()
