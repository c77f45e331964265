"""How good, how big, how fast: every answer is a Measurement, a number with its unit and its conditions.

Takes any `nn.Module` and knows nothing of masks or recipes.
"""

from secateur.evaluate.classification import Predictions, accuracy, f1, predict
from secateur.evaluate.divergence import divergence
from secateur.evaluate.flops import flops
from secateur.evaluate.harness import harness
from secateur.evaluate.language import PROTOCOLS, loglikelihood_rolling, perplexity
from secateur.evaluate.machine import hardware
from secateur.evaluate.memory import peak_memory
from secateur.evaluate.size import disk_bytes, nonzeros, parameters, state_bytes
from secateur.evaluate.speed import PairedLatency, latency, paired_latency, throughput
from secateur.evaluate.text import rouge
from secateur.measurement import Condition, Measurement, Spread

__all__ = [
    "PROTOCOLS",
    "Condition",
    "Measurement",
    "PairedLatency",
    "Predictions",
    "Spread",
    "accuracy",
    "disk_bytes",
    "divergence",
    "f1",
    "flops",
    "hardware",
    "harness",
    "latency",
    "loglikelihood_rolling",
    "nonzeros",
    "paired_latency",
    "parameters",
    "peak_memory",
    "perplexity",
    "predict",
    "rouge",
    "state_bytes",
    "throughput",
]
