"""What nvidia-smi says, from its own formats."""

from __future__ import annotations

from pathlib import Path

import pytest

import hardware

LINE = "{index}, GPU-{index}abc, NVIDIA H100 80GB HBM3, 81559, 570.86.15, 9.0, 5, 16"
LISTING = "\n".join(LINE.format(index=index) for index in range(4))

TOPOLOGY = """\
	\x1b[4mGPU0	GPU1	GPU2	GPU3	NIC0	CPU Affinity	NUMA Affinity	GPU NUMA ID\x1b[0m
GPU0	 X 	NV18	NV18	SYS	PIX	0-63	0		N/A
GPU1	NV18	 X 	NV12	SYS	NODE	0-63	0		N/A
GPU2	NV18	NV12	 X 	PHB	NODE	0-63	0		N/A
GPU3	SYS	SYS	PHB	 X 	NODE	0-63	0		N/A
NIC0	PIX	NODE	NODE	NODE	 X

Legend:

  X    = Self
  NV#  = Connection traversing a bonded set of # NVLinks
"""


def indices(monkeypatch: pytest.MonkeyPatch, visible: str | None, listing: str = LISTING) -> list[int]:
    monkeypatch.setattr(hardware, "_nvidia_smi", lambda *arguments: listing)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    return [gpu.index for gpu in hardware.visible_gpus()]


def test_a_line_of_the_listing_is_a_gpu() -> None:
    gpu = hardware.parse_gpu(LISTING.splitlines()[1])
    assert gpu is not None
    assert (gpu.index, gpu.name, gpu.driver, gpu.pcie) == (1, "NVIDIA H100 80GB HBM3", "570.86.15", "PCIe 5.0 x16")
    assert gpu.memory_gib == pytest.approx(79.65, abs=0.01)
    assert gpu.compute_capability == 9.0


def test_what_the_driver_does_not_tell_is_none() -> None:
    gpu = hardware.parse_gpu("0, GPU-0, Thing, [N/A], 570.1, [N/A], [N/A], [N/A]")
    assert gpu is not None
    assert (gpu.memory_gib, gpu.compute_capability, gpu.pcie) == (None, None, None)


def test_an_error_message_is_no_gpu() -> None:
    assert hardware.parse_gpu("NVIDIA-SMI has failed because it could not communicate with the driver") is None


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [0, 1, 2, 3]),
        ("2,0", [2, 0]),
        ("GPU-3", [3]),
        ("", []),
        ("-1", []),
        ("1,-1,2", [1]),
        ("NoDevFiles", []),
        ("MIG-0000", [0]),
    ],
)
def test_cuda_visible_devices_chooses_and_orders(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: list[int]
) -> None:
    assert indices(monkeypatch, visible) == expected


def test_without_a_driver_there_is_no_gpu_whatever_the_variable_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert indices(monkeypatch, "0,1", listing="") == []


@pytest.mark.parametrize(
    ("gpus", "link"),
    [
        ([0, 1], "NVLink (NV18)"),
        ([0, 1, 2], "NVLink (NV12, NV18)"),
        ([2, 3], "PCIe (PHB)"),
        ([0, 1, 2, 3], "PCIe (PHB, SYS)"),
        ([0, 7], None),
    ],
)
def test_the_slowest_link_between_the_gpus_of_the_run_counts(gpus: list[int], link: str | None) -> None:
    assert hardware.parse_topology(TOPOLOGY, gpus) == link


def test_a_single_gpu_has_its_link_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    assert indices(monkeypatch, "2") == [2]
    assert hardware.link_of(hardware.visible_gpus()) == "PCIe 5.0 x16"
    assert hardware.link_of([]) is None


def test_a_machine_without_nvidia_smi_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware.visible_gpus() == []


@pytest.mark.gpu
def test_nvidia_smi_and_torch_see_the_same_gpus() -> None:
    import torch

    seen = hardware.visible_gpus()
    assert [gpu.name for gpu in seen] == [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    assert seen[0].driver
    memory_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    assert seen[0].memory_gib == pytest.approx(memory_gib, rel=0.02)
    assert hardware.link_of(seen[:1])
