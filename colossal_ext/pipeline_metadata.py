"""The interleaved pipeline takes batches of varying length."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from colossalai.pipeline.schedule.interleaved_pp import InterleavedSchedule

from .upstream import require_mended_version

_SENDERS = ("send_forward", "send_backward", "send_forward_recv_forward", "send_backward_recv_backward")


def install_pipeline_metadata_mend() -> None:
    """Mend interleaved_pp.py:249 and 275 of ColossalAI 0.5.0. Repeating it is fine.

    Without the metadata cache every tensor is preceded by its shape. After an exchange in which a rank had nothing to
    send, the schedule leaves the shape of its next tensor out, which the neighbour waits for: both hang.

    Raises:
        RuntimeError: another ColossalAI than 0.5.0 is installed.
    """
    require_mended_version("colossalai.pipeline.schedule.interleaved_pp.InterleavedSchedule")
    for name in _SENDERS:
        sender = getattr(InterleavedSchedule, name)
        if not hasattr(sender, "__wrapped__"):
            setattr(InterleavedSchedule, name, _with_metadata(sender))


def _with_metadata(sender: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(sender)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.enable_metadata_cache:
            self.send_tensor_metadata = self.send_grad_metadata = True
        return sender(self, *args, **kwargs)

    return wrapper
