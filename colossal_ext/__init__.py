"""What we plug into ColossalAI 0.5.0: one module a topic. Importing any of them imports ColossalAI, the lean way.

lean_import        ColossalAI without bitsandbytes, galore_torch and torch's compiler
mends              all of the following, in one call
host_accelerator   the plugins on CPU tensors and gloo (set_accelerator)
adam_kernels       Adam without a compiler (KernelLoader.register_extension)
triton_adam        its CUDA kernel for mixed dtypes; imported only where Triton is
gemini_host        Gemini's chunks shard where device and host are both the CPU
gemini_device      on a GPU, chunks have pinned memory only where they need it, and are not freed while they are read
gemini_placement   Gemini's offload fractions mean what they say
gemini_overflow    Gemini, fp16, accumulation: training goes on after an overflow
gemini_hook        Gemini's hook for many parameters at once, which fetches chunks ahead
gemini_layers      Gemini's hooks once a decoder layer, around a compiled graph
gemini_chunks      chunk sizes that shard a model of any size
layer_groups       decoder layers compiled several at a time
gradient_types     16-bit gradients beside fp32 weights, in compiled layers
opt_policy         tensor and pipeline parallel OPT (custom_policy)
vocab_parallel     cross entropy over a sharded vocabulary
parallel_linear    divided linear layers that torch.compile takes into one graph
data_parallel      TorchDDP whose gradients are exchanged where they are
hybrid_gradients   the same for HybridParallel's replicas, with stages and without
hybrid_step        HybridParallel's 16-bit step in one pass, without fp32 copies of gradients
pipeline_barrier   stages add up a tied embedding's gradients without waiting for their GPUs
pipeline_metadata  the interleaved pipeline takes batches of varying length
local_zero         LowLevelZero on one rank: no buckets, no copies, states on device and host
sharded_zero       the same on several ranks: few large exchanges, beside the backward and the forward pass
exchanges          collectives of many tensors, in place where they are large
host_updates       their Adam on the host, beside the backward pass
pinned             page-locked memory of exact size, for the weights there
states             weights and moments of any boosted model as full tensors
scaler_state       the loss scale of any boosted optimizer
mixed_precision    autocast, and loss scaling, for TorchDDP (Booster's mixed_precision)
loss_scale         fp16 gradients are divided by the scale they were multiplied with
grad_norm          the last gradient norm of any boosted optimizer
upstream           the version that the mends are written for
"""

from .lean_import import import_colossalai

import_colossalai()
