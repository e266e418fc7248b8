"""Ranks that meet in a collective each step, of which rank 1 comes to harm in step 4: `stop`, `stand` or `silent_end`."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

import runtime
import watchdog

TIMEOUT_S = 3.0
HARM_STEP = 4


def main(process: runtime.Runtime) -> int:
    """Take steps, the harm among them."""
    harm = sys.argv[1]
    runtime.start_process_group(process, timeout_s=120)
    with watchdog.watching(process, TIMEOUT_S) as pulse:
        for step in range(1, HARM_STEP + 1):
            pulse.mark("forward", step)
            if step == HARM_STEP and process.rank == 1:
                time.sleep(0.2 * TIMEOUT_S)  # two beats
                come_to(harm)
            pulse.mark("backward", step)
            dist.all_reduce(torch.ones(1))
    if harm == "silent_end" and process.rank == 0:
        time.sleep(2 * TIMEOUT_S)
    return 0


def come_to(harm: str) -> None:
    """Do what the word says."""
    if harm == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    while harm == "stand":
        time.sleep(0.1)


if __name__ == "__main__":
    runtime.run_to_exit(main)
