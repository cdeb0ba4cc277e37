"""Names that settings of several sections are chosen from."""

DTYPES = ("float32", "bfloat16")
# Of products of float32 data: what the chip does by itself (a TPU bfloat16, a GPU since the A100
# TF32) or JAX_DEFAULT_MATMUL_PRECISION says; no less than TF32; float32. Convolutions of float32
# data in the Fourier domain always have the last.
PRECISIONS = ("default", "tensorfloat32", "highest")
METHODS = ("auto", "direct", "dft", "tuned")  # of a convolution: dnd_jax/ops/choice.py
REMAT = ("none", "convolutions", "stages")
AXES = ("slice", "data", "fsdp", "tensor")  # from the slowest network to the fastest
