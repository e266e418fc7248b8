"""The one-way rule of imports: who may know whom, and who must start without torch."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {path.stem: path for path in ROOT.glob("*.py")}
EXTENSION = sorted((ROOT / "colossal_ext").glob("*.py"))
OURS = {*MODULES, "colossal_ext", "benchmarks", "tests"}

# What each low module may import of ours; a module that is not named here may import any but the tops.
ALLOWED = {
    "opt_sizes": set(),
    "args": {"opt_sizes"},
    "report": {"benchmarks"},  # when it is run itself, to compare two sweeps
    "hardware": set(),
    "speed": {"report"},
    "planner": {"args", "opt_sizes", "speed"},
    "chooser": {"args", "planner", "speed"},
    "adviser": {"args", "chooser", "planner"},
    "placement": set(),
    "scaling": {"planner", "report", "speed"},
}
QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"
LOW = ("planner", "chooser", "adviser", "strategy", "model", "data", "checkpoint")
TORCH_FREE = (
    "args",
    "opt_sizes",
    "report",
    "speed",
    "planner",
    "chooser",
    "adviser",
    "hardware",
    "placement",
    "scaling",
    "benchmarks.sweep",
    "benchmarks.compare",
)


def imports_of(path: Path) -> set[str]:
    """Return our modules that a file imports anywhere in it, under `TYPE_CHECKING` too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found & OURS


@pytest.mark.parametrize("name", ALLOWED)
def test_low_modules_import_only_what_they_may(name: str) -> None:
    assert imports_of(MODULES[name]) <= ALLOWED[name]


@pytest.mark.parametrize("name", LOW)
def test_what_is_trained_never_imports_the_trainer(name: str) -> None:
    assert not imports_of(MODULES[name]) & {"trainer", "recorder", "train_clm"}


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"train_clm"}))
def test_nobody_imports_the_entry_point(name: str) -> None:
    assert "train_clm" not in imports_of(MODULES[name])


@pytest.mark.parametrize("path", EXTENSION, ids=lambda path: path.stem)
def test_the_extension_of_colossalai_imports_nothing_of_ours(path: Path) -> None:
    assert imports_of(path) <= {"colossal_ext"}


def test_imports_go_round_nowhere() -> None:
    graph = {name: imports_of(path) & MODULES.keys() for name, path in MODULES.items()}
    while leaves := [name for name, below in graph.items() if not below & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph, f"these import each other in a circle: {sorted(graph)}"


def test_the_rules_see_every_way_to_import(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("import trainer as t\ndef f():\n    from colossal_ext.grad_norm import x\n    import json, data\n")
    assert imports_of(path) == {"trainer", "colossal_ext", "data"}


@pytest.mark.parametrize("name", TORCH_FREE)
def test_a_module_starts_without_heavy_packages(name: str) -> None:
    heavy = "{'torch', 'numpy', 'transformers', 'datasets', 'colossalai', 'matplotlib'}"
    program = f"import sys, {name}; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def run_program(program: str, environment: dict[str, str] | None = None) -> str:
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_our_extension_imports_colossalai_without_what_nobody_here_uses() -> None:
    program = """
import sys
import colossal_ext
print(sorted({"bitsandbytes", "galore_torch", "torch._inductor.compile_fx"} & sys.modules.keys()))
import torch
from colossalai.nn.optimizer import HybridAdam
print(torch.compile.__name__)
"""
    assert run_program(program).split() == ["[]", "compile"]


def test_upstream_still_imports_what_our_extension_stands_in_for() -> None:
    """Where it no longer does, colossal_ext/lean_import.py can go."""
    program = """
import sys
sys.modules["galore_torch"] = None
try:
    import colossalai.nn.optimizer
except ModuleNotFoundError as error:
    print(error.name)
import colossalai.quantization.fp8
print("torch._inductor.compile_fx" in sys.modules)
"""
    assert run_program(program).split() == ["galore_torch", "True"]


@pytest.mark.parametrize("before", [None, "32"])
def test_importing_our_extension_leaves_the_queues_of_gpus_as_they_were(before: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != QUEUES}
    program = f"import os, colossal_ext; print(os.environ.get({QUEUES!r}))"
    assert run_program(program, environment | ({QUEUES: before} if before else {})) == str(before)


def test_upstream_still_puts_all_streams_of_a_gpu_in_one_queue() -> None:
    """Where it no longer does, `_unchanged` in colossal_ext/lean_import.py can go."""
    assert run_program(f"import os, colossalai; print(os.environ[{QUEUES!r}])") == "1"
