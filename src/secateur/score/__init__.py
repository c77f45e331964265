"""What is a weight worth? `(weight "out in", <statistics by parameter name>) -> "out in"`, higher = keep."""

from secateur.score.activation import RIA, activation, wanda, wanda_l1
from secateur.score.depth import angular_distance, block_influence, last_blocks, loss_without, random_blocks
from secateur.score.gradient import fisher, movement, taylor
from secateur.score.magnitude import magnitude, random

__all__ = [
    "RIA",
    "activation",
    "angular_distance",
    "block_influence",
    "fisher",
    "last_blocks",
    "loss_without",
    "magnitude",
    "movement",
    "random",
    "random_blocks",
    "taylor",
    "wanda",
    "wanda_l1",
]
