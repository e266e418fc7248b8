"""Processes that are forked from one that has imported the libraries: that takes longer than a small case trains."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any


def import_what_can_be_forked() -> None:
    """Import what takes longest, but ColossalAI, whose import makes a CUDA context: that does not survive a fork."""
    import torch

    import runtime

    runtime.quiet_third_parties(runtime.Runtime(0, 1, 0, 1, torch.device("cpu"), 0))
    import datasets  # noqa: F401
    from transformers import OPTForCausalLM  # noqa: F401

    import recorder  # noqa: F401


def fork_ranks(function: Callable[..., None], num_ranks: int, *arguments: Any) -> None:
    """Call `function(*arguments)` in as many processes as ranks, each with torchrun's environment, and wait for all.

    Raises:
        torch.multiprocessing.ProcessExitedException: a rank failed; the others were ended.
    """
    from torch import multiprocessing

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    multiprocessing.start_processes(
        _call_as_rank, (num_ranks, port, function, arguments), nprocs=num_ranks, start_method="fork"
    )


def _call_as_rank(
    rank: int, num_ranks: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    numbers = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": num_ranks,
        "LOCAL_WORLD_SIZE": num_ranks,
        "MASTER_PORT": port,
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {name: str(number) for name, number in numbers.items()}
    function(*arguments)
