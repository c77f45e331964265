"""What is a weight worth? `(weight "out in", <statistics by parameter name>) -> "out in"`, higher = keep."""

from secateur.score.activation import RIA, activation, wanda, wanda_l1
from secateur.score.depth import angular_distance, block_influence, last_blocks, loss_without, random_blocks
from secateur.score.gradient import fisher, movement, taylor
from secateur.score.magnitude import magnitude, random
from secateur.score.units import active, flap, gate, l2, slimming, taylor_whole

__all__ = [
    "RIA",
    "activation",
    "active",
    "angular_distance",
    "block_influence",
    "fisher",
    "flap",
    "gate",
    "l2",
    "last_blocks",
    "loss_without",
    "magnitude",
    "movement",
    "random",
    "random_blocks",
    "slimming",
    "taylor",
    "taylor_whole",
    "wanda",
    "wanda_l1",
]
