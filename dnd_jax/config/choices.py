"""Names that settings of several sections are chosen from."""

DTYPES = ("float32", "bfloat16")
METHODS = ("auto", "direct", "dft", "tuned")  # of a convolution: dnd_jax/ops/convolution.py
REMAT = ("none", "convolutions", "stages")
AXES = ("slice", "data", "fsdp", "tensor")  # from the slowest network to the fastest
