"""Weight formats that tests of quantised kernels go through: ``quantize(weight, bits, group, **options)``."""

import torch

__all__ = ["FORMATS", "INT4_FORMATS"]

ZEROS, FP16 = {"zero_points": True}, {"scale_dtype": torch.float16}
INT4_FORMATS = [
    (4, 32, {}),
    (4, 64, {}),
    (4, 128, {}),
    (4, 32, ZEROS),
    (4, 64, ZEROS),
    (4, 128, ZEROS),
    (4, 32, FP16),
    (4, 64, ZEROS | FP16),
    (4, 128, ZEROS | FP16),
]
FORMATS = [(8, 128, {}), *INT4_FORMATS]
