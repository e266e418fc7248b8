"""What we plug into ColossalAI 0.5.0: one module a topic, nothing happens at import.

mends              all of the following, in one call
host_accelerator   the plugins on CPU tensors and gloo (set_accelerator)
adam_kernels       Adam without a compiler (KernelLoader.register_extension)
triton_adam        its CUDA kernel for mixed dtypes; imported only where Triton is
gemini_host        Gemini's chunks shard where device and host are both the CPU
gemini_placement   Gemini's offload fractions mean what they say
gemini_overflow    Gemini, fp16, accumulation: training goes on after an overflow
gemini_chunks      chunk sizes that shard a model of any size
opt_policy         tensor and pipeline parallel OPT (custom_policy)
vocab_parallel     cross entropy over a sharded vocabulary
mixed_precision    autocast, and loss scaling, for TorchDDP (Booster's mixed_precision)
loss_scale         fp16 gradients are divided by the scale they were multiplied with
grad_norm          the last gradient norm of any boosted optimizer
upstream           the version that the mends are written for
"""
