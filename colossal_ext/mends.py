"""Everything that has to be in place before a plugin is built, in the order it needs."""

from __future__ import annotations

from .adam_kernels import register_adam_kernels
from .gemini_device import install_gemini_device_chunks
from .gemini_host import install_gemini_host_chunks
from .gemini_overflow import install_gemini_overflow_mend
from .gemini_placement import install_exact_placement
from .host_accelerator import install_host_accelerator
from .hybrid_gradients import install_hybrid_gradients_mend
from .hybrid_step import install_hybrid_step_mend
from .loss_scale import install_loss_scale_mend
from .pipeline_barrier import install_pipeline_barrier_mend
from .pipeline_metadata import install_pipeline_metadata_mend


def install_mends(*, on_cpu: bool) -> None:
    """Install this folder's kernels and mends for this process. Repeating it is fine.

    Args:
        on_cpu: train on CPU tensors with gloo, also on a machine that has a GPU.

    Raises:
        RuntimeError: another ColossalAI than 0.5.0 is installed.
    """
    if on_cpu:
        install_host_accelerator()
        install_gemini_host_chunks()
    else:
        install_gemini_device_chunks()
    install_exact_placement()
    install_gemini_overflow_mend()
    install_hybrid_gradients_mend()
    install_hybrid_step_mend()
    install_loss_scale_mend()
    install_pipeline_barrier_mend()
    install_pipeline_metadata_mend()
    register_adam_kernels()
