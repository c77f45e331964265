"""How does the gain become real?"""

from secateur.deploy.depth import drop_blocks, drop_blocks_
from secateur.deploy.merge import merge_blocks, merge_blocks_
from secateur.deploy.packed import load_quantized_, save_quantized
from secateur.deploy.quantize import Quantized, QuantizedLayer, quantize_

__all__ = [
    "Quantized",
    "QuantizedLayer",
    "drop_blocks",
    "drop_blocks_",
    "load_quantized_",
    "merge_blocks",
    "merge_blocks_",
    "quantize_",
    "save_quantized",
]
