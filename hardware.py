"""The machine: its GPUs as nvidia-smi names them, what joins them, its memory. No torch import, nothing of ours."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

GPU_FIELDS = "index,uuid,name,memory.total,driver_version,compute_cap,pcie.link.gen.max,pcie.link.width.max"


@dataclass(frozen=True)
class Gpu:
    """One GPU. None where nvidia-smi does not say.

    Args:
        index: its number in nvidia-smi, whatever CUDA_VISIBLE_DEVICES makes of it.
        pcie: generation and width of the link to the host.
    """

    index: int
    uuid: str
    name: str
    memory_gib: float | None
    driver: str | None
    compute_capability: float | None
    pcie: str | None


def visible_gpus() -> list[Gpu]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES leaves, in its order; none where there is no driver."""
    listing = _nvidia_smi(f"--query-gpu={GPU_FIELDS}", "--format=csv,noheader,nounits")
    there = [gpu for line in listing.splitlines() if (gpu := parse_gpu(line))]
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None or not there:
        return there
    found: list[Gpu] = []
    for word in (part.strip() for part in wanted.split(",")):
        if word.startswith("MIG-"):  # a slice, of whose memory the listing says nothing
            found.append(replace(there[0], memory_gib=None))
            continue
        matches = [gpu for gpu in there if word == str(gpu.index) or (word[:4] == "GPU-" and gpu.uuid.startswith(word))]
        if not matches:  # CUDA, too, ignores what stands behind a word that names nothing
            break
        found.append(matches[0])
    return found


def parse_gpu(line: str) -> Gpu | None:
    """Return the GPU of a line of nvidia-smi's CSV, or None for another line (an error message)."""
    words = [word.strip() for word in line.split(",")]
    if len(words) != GPU_FIELDS.count(",") + 1 or not words[0].isdecimal():
        return None
    index, uuid, name, memory_mib, driver, capability, generation, width = words
    return Gpu(
        index=int(index),
        uuid=uuid,
        name=name,
        memory_gib=None if (memory := _number(memory_mib)) is None else memory / 1024,
        driver=driver or None,
        compute_capability=_number(capability),
        pcie=f"PCIe {generation}.0 x{width}" if generation.isdecimal() and width.isdecimal() else None,
    )


def _number(word: str) -> float | None:
    return float(word) if re.fullmatch(r"\d+(\.\d+)?", word) else None


def link_of(gpus: Sequence[Gpu]) -> str | None:
    """Return what joins the GPUs (`NVLink`, `PCIe`), or for a single one its PCIe link to the host; None: not known."""
    if len(gpus) < 2:
        return gpus[0].pcie if gpus else None
    return parse_topology(_nvidia_smi("topo", "-m"), [gpu.index for gpu in gpus])


def parse_topology(matrix: str, indices: Sequence[int]) -> str | None:
    """Return the slowest kind of link between the GPUs in the matrix that `nvidia-smi topo -m` prints.

    `NV18` there means 18 NVLinks; PIX, PXB, PHB, NODE and SYS are ever longer ways over PCIe.
    """
    plain = re.sub(r"\x1b\[[0-9;]*m", "", matrix)
    rows = {int(row[1]): row[2].split() for row in re.finditer(r"^GPU(\d+)\s+(.*)$", plain, re.MULTILINE)}
    # The header line starts with blanks, so that `rows` holds a row for each GPU, whose n-th word is the link to GPU n.
    if any(i not in rows or len(rows[i]) <= max(indices) for i in indices):
        return None
    links = {rows[i][j] for i in indices for j in indices if i != j}
    paths = sorted(link for link in links if not re.fullmatch(r"NV\d+", link))
    return f"PCIe ({', '.join(paths)})" if paths else f"NVLink ({', '.join(sorted(links))})"


def _nvidia_smi(*arguments: str) -> str:
    """Return what nvidia-smi prints, empty where it is absent, fails or hangs."""
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def host_memory_gib() -> float:
    """Return the memory this machine, or the container it stands for, can use in GiB."""
    limits = [psutil.virtual_memory().total]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # absent, or "max"
            continue
    return min(limits) / 2**30
