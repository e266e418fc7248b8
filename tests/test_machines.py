"""Two launchers as two machines: over loopback, and in two network namespaces that share nothing but a cable."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import MINI, ROOT, SHORT

FLAGS = [word for word in SHORT.split() if word not in ("--dataset", "synthetic")]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def reference(tmp_path_factory, run_many):
    """The losses of two ranks on one machine."""
    run = run_many(tmp_path_factory.mktemp("reference"), {"run": []}, world=2)["run"]
    assert run.code == 0, run.output
    return run.losses


def losses_of_two(folder: Path, *machines: dict[str, str], prefixes=((), ())) -> list[float]:
    """Run a launcher for each machine, and return the losses that they leave together."""
    own = {"SKIP_SETUP": "1", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "NNODES": "2"}
    words = ["2", "0", str(MINI), "1", *FLAGS, "--learning_rate", "1e-3", "--output_dir", str(folder)]
    launchers = []
    for prefix, machine in zip(prefixes, machines, strict=True):
        command = [*prefix, "bash", str(ROOT / "run_clm_synthetic.sh"), *words]
        environment = os.environ | own | machine
        launchers.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    outputs = [launcher.communicate(timeout=240)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], "\n".join(outputs)
    result = json.loads((folder / "result.json").read_text())
    assert result["device"]["count"] == 2
    return [loss for _, loss in result["train_loss"]]


def test_two_machines_that_meet_at_the_master_train_as_one(tmp_path, reference):
    master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    machines = [master | {"NODE_RANK": str(rank)} for rank in range(2)]
    assert losses_of_two(tmp_path / "run", *machines) == reference


@pytest.mark.long
def test_two_machines_that_meet_at_a_rendezvous_train_as_one(tmp_path, reference):
    meeting = {"RDZV_ENDPOINT": f"localhost:{free_port()}", "RDZV_ID": "test"}
    assert losses_of_two(tmp_path / "run", meeting, meeting) == reference


@pytest.fixture
def namespaces():
    """Two network namespaces joined by a cable of their own: (prefix of a command, address, interface) of each."""
    if not shutil.which("ip"):
        pytest.skip("no ip command (iproute2)")
    names = [f"clm{os.getpid()}{end}" for end in "ab"]
    ends = [f"v{os.getpid()}{end}" for end in "ab"]
    addresses = ["10.213.7.1", "10.213.7.2"]
    commands = [f"ip netns add {name}" for name in names]
    commands.append(f"ip link add {ends[0]} netns {names[0]} type veth peer name {ends[1]} netns {names[1]}")
    for name, end, address in zip(names, ends, addresses, strict=True):
        commands += [f"ip -n {name} addr add {address}/24 dev {end}", f"ip -n {name} link set {end} up"]
        commands += [f"ip -n {name} link set lo up"]
    try:
        for command in commands:
            done = subprocess.run(command.split(), capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no right to make network namespaces ({done.stderr.strip()})")
        yield [
            (("ip", "netns", "exec", name), address, end)
            for name, end, address in zip(names, ends, addresses, strict=True)
        ]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.long
def test_two_machines_with_nothing_but_a_network_between_them_train_as_one(tmp_path, reference, namespaces):
    master = {"MASTER_ADDR": namespaces[0][1], "MASTER_PORT": str(free_port())}
    machines = [
        master | {"NODE_RANK": str(rank), "GLOO_SOCKET_IFNAME": interface}
        for rank, (_, _, interface) in enumerate(namespaces)
    ]
    prefixes = [prefix for prefix, _, _ in namespaces]
    assert losses_of_two(tmp_path / "run", *machines, prefixes=prefixes) == reference
