"""The ColossalAI release that this folder's mends are written for."""

from __future__ import annotations

import importlib.metadata

MENDED_VERSION = "0.5.0"


def require_mended_version(mend: str) -> None:
    """Do nothing under the release that `mend` was written for.

    Args:
        mend: what is about to be replaced, named as in `colossalai.pipeline.p2p`.

    Raises:
        RuntimeError: another ColossalAI is installed, whose internals may differ.
    """
    found = importlib.metadata.version("colossalai")
    if found != MENDED_VERSION:
        raise RuntimeError(
            f"colossalai {found}: our mend of {mend} is written for colossalai=={MENDED_VERSION}. "
            f"Install that (pip install --no-deps -r requirements-colossalai.txt)."
        )
