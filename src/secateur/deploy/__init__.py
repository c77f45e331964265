"""How does the gain become real? Fewer blocks, smaller tensors; the same classes, checked."""

from secateur.deploy.aware import FakeQuantized, fake_quantize_
from secateur.deploy.decoupling import Decoupling, decouple_, decoupling
from secateur.deploy.depth import drop_blocks, drop_blocks_
from secateur.deploy.merge import merge_blocks, merge_blocks_
from secateur.deploy.optimizer import slice_like_, slice_optimizer_
from secateur.deploy.packed import load_quantized_, save_quantized
from secateur.deploy.quantize import Quantized, QuantizedLayer, quantize_
from secateur.deploy.shrink import shrink
from secateur.deploy.shrunk import Axis, Shrunk, shrunk

__all__ = [
    "Axis",
    "Decoupling",
    "FakeQuantized",
    "Quantized",
    "QuantizedLayer",
    "Shrunk",
    "decouple_",
    "decoupling",
    "drop_blocks",
    "drop_blocks_",
    "fake_quantize_",
    "load_quantized_",
    "merge_blocks",
    "merge_blocks_",
    "quantize_",
    "save_quantized",
    "shrink",
    "shrunk",
    "slice_like_",
    "slice_optimizer_",
]
