"""When? Pruning while a model trains."""

from secateur.training.callbacks import LightningCallback, trainer_callback
from secateur.training.gradual import Gradual
from secateur.training.regrowth import RigL
from secateur.training.thresholding import Thresholding

__all__ = ["Gradual", "LightningCallback", "RigL", "Thresholding", "trainer_callback"]
