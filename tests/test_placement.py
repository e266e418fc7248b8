"""placement.py: what shares a machine; and that ColossalAI's mesh is laid out as it says."""

from __future__ import annotations

import pytest

import placement


def layout(tp: int, pp: int, world_size: int, gpus: int) -> str:
    return placement.describe(placement.axes(tp, pp, world_size=world_size, gpus=gpus))


@pytest.mark.parametrize(
    ("tp", "pp", "world_size", "gpus", "line"),
    [
        (2, 2, 8, 8, "tp 2 inside each machine, pp 2 inside each machine, dp 2 inside each machine"),
        (2, 2, 8, 4, "tp 2 inside each machine, pp 2 inside each machine, dp 2 across 2 machines"),
        (2, 2, 4, 2, "tp 2 inside each machine, pp 2 across 2 machines"),
        (2, 2, 8, 2, "tp 2 inside each machine, pp 2 across 2 machines, dp 2 across 2 machines"),
        (1, 1, 16, 8, "dp 16 across 2 machines"),
        (8, 4, 64, 8, "tp 8 inside each machine, pp 4 across 4 machines, dp 2 across 2 machines"),
    ],
)
def test_the_layout_says_what_stays_inside_a_machine(tp, pp, world_size, gpus, line):
    assert layout(tp, pp, world_size, gpus) == line
    assert placement.warning(placement.axes(tp, pp, world_size=world_size, gpus=gpus)) is None


@pytest.mark.parametrize(("tp", "world_size", "gpus"), [(4, 4, 2), (2, 6, 3), (16, 16, 8)])
def test_a_layer_that_spans_machines_is_warned_of(tp, world_size, gpus):
    warning = placement.warning(placement.axes(tp, 1, world_size=world_size, gpus=gpus))
    assert warning and warning.startswith(f"--tp {tp}: spans 2 machines")


def test_colossalai_gives_tp_to_neighbours_then_pp_then_dp(monkeypatch):
    import colossal_ext  # noqa: F401  # before ColossalAI

    # isort: split
    from colossalai.booster.plugin import hybrid_parallel_plugin
    from colossalai.cluster import ProcessGroupMesh

    shapes: list[tuple[int, ...]] = []

    class Seen(Exception):
        """The mesh has been asked for."""

    def mesh(*shape: int) -> None:
        shapes.append(shape)
        raise Seen

    monkeypatch.setattr(hybrid_parallel_plugin, "ProcessGroupMesh", mesh)
    monkeypatch.delattr(hybrid_parallel_plugin.HybridParallelPlugin, "__del__")  # needs what is not made here
    monkeypatch.setattr(hybrid_parallel_plugin.dist, "get_world_size", lambda *_: 12)
    with pytest.raises(Seen):
        hybrid_parallel_plugin.HybridParallelPlugin(tp_size=2, pp_size=3, num_microbatches=3)
    assert shapes == [(2, 3, 2, 1)]  # dp, pp, tp, sequence parallelism
    # The last axis is the one along which neighbouring ranks lie.
    assert [ProcessGroupMesh.unravel(rank, (2, 3, 2, 1)) for rank in (0, 1, 2, 6)] == [
        (0, 0, 0, 0),
        (0, 0, 1, 0),
        (0, 1, 0, 0),
        (1, 0, 0, 0),
    ]
