"""What is a weight worth? `(weight "out in", <statistics by parameter name>) -> "out in"`, higher = keep."""

from secateur.score.activation import RIA, activation, wanda, wanda_l1
from secateur.score.gradient import fisher, taylor
from secateur.score.magnitude import magnitude, random

__all__ = ["RIA", "activation", "fisher", "magnitude", "random", "taylor", "wanda", "wanda_l1"]
