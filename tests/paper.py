"""The generators of the paper's settings, as docs/SETTINGS.md has them."""

# (million parameters, TFLOP of a sample's forward pass, tokens)
SETTINGS = {
    "qwen2_5_0_5b_commonsense": (1113.2, 8.26, (4296, 10, 130)),
    "qwen2_5_1_5b_code": (1715.3, 27.31, (4508, 18, 258)),
    "qwen2_5_1_5b_math": (1775.3, 37.93, (4508, 18, 258)),
    "qwen2_5_7b_code": (1936.5, 52.77, (4928, 18, 514)),
    "qwen2_5_7b_math": (1936.5, 52.77, (4928, 18, 514)),
    "qwen2_5_vl_3b_math": (2409.6, 28.90, (7308, 18, 258)),
}
