"""ColossalAI imported without bitsandbytes, galore_torch and torch's compiler, 2 s faster, and without side effects.

Mends `from galore_torch import GaLoreAdafactor, GaLoreAdamW` in colossalai/nn/optimizer/__init__.py, `from
bitsandbytes.optim.optimizer import Optimizer2State` in galore.py and distributed_galore.py beside it, and the
`@torch.compile` of functions in quantization/fp8.py and shardformer/layer/attn.py. Every plugin imports these modules;
none of ours uses what is in them.

Also mends `os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"` in colossalai/initialize.py: all streams of a GPU in one queue,
where each waits for those before it, if CUDA starts later.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from .upstream import require_mended_version

# Module, and the classes that are imported from it.
STAND_INS = {
    "bitsandbytes": (),
    "bitsandbytes.optim": (),
    "bitsandbytes.optim.optimizer": ("Optimizer2State",),
    "galore_torch": ("GaLoreAdafactor", "GaLoreAdamW"),
}


def import_colossalai() -> None:
    """Import ColossalAI's Booster. Must come before any other import of it; repeating it is fine."""
    if "colossalai.booster" in sys.modules:
        return
    require_mended_version("the import of galore_torch")
    torch.cuda.is_available()  # starts CUDA, which reads its variables now, and not in the middle of the import
    with _modules(dict.fromkeys(STAND_INS)):  # peft imports bitsandbytes where there is one
        importlib.import_module("peft")
    stand_ins = {name: _stand_in(name, classes) for name, classes in STAND_INS.items()}
    with (
        _modules(stand_ins),
        mock.patch.object(torch, "compile", _leave_as_it_is),
        _unchanged("CUDA_DEVICE_MAX_CONNECTIONS"),
    ):
        importlib.import_module("colossalai.booster")


def _stand_in(name: str, classes: tuple[str, ...]) -> ModuleType:
    module = ModuleType(name)
    vars(module).update({each: type(each, (torch.optim.Optimizer,), {}) for each in classes}, __version__="0")
    return module


def _leave_as_it_is(**settings: Any) -> Callable[[Any], Any]:
    return lambda function: function


@contextmanager
def _modules(found: Mapping[str, ModuleType | None]) -> Iterator[None]:
    """Let an import find these modules; where it is None, nothing."""
    before = {name: sys.modules[name] for name in found if name in sys.modules}
    sys.modules.update(found)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in found:
            del sys.modules[name]
        sys.modules.update(before)


@contextmanager
def _unchanged(variable: str) -> Iterator[None]:
    """Leave an environment variable as it is, or missing, whatever happens to it meanwhile."""
    before = os.environ.get(variable)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(variable, None)
        else:
            os.environ[variable] = before
