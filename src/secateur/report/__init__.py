"""How does it look? Numbers and tensors become one HTML file that opens offline."""

from .counting import histogram
from .histogram import CountBelow, Histogram

__all__ = ["CountBelow", "Histogram", "histogram"]
