"""How does it look? Numbers and tensors become one HTML file that opens offline."""

from . import figures
from .boards import log_to
from .counting import histogram
from .elements import Section
from .heat import HeatMap, heat_section
from .histogram import CountBelow, Histogram
from .measurements import Comparison, compare, measurement_section
from .page import Highlight, document, page
from .pictures import Picture, picture, picture_section
from .sensitivity import Sensitivity, sensitivity_section
from .sparsity import LayerRow, sparsity_section
from .tables import Table, notes_section, table_section
from .threshold import Cut, threshold_for, threshold_section
from .tradeoff import Point, Tradeoff, tradeoff_section
from .weights import Stage, histogram_section
from .write import write

__all__ = [
    "Comparison",
    "CountBelow",
    "Cut",
    "HeatMap",
    "Highlight",
    "Histogram",
    "LayerRow",
    "Picture",
    "Point",
    "Section",
    "Sensitivity",
    "Stage",
    "Table",
    "Tradeoff",
    "compare",
    "document",
    "figures",
    "heat_section",
    "histogram",
    "histogram_section",
    "log_to",
    "measurement_section",
    "notes_section",
    "page",
    "picture",
    "picture_section",
    "sensitivity_section",
    "sparsity_section",
    "table_section",
    "threshold_for",
    "threshold_section",
    "tradeoff_section",
    "write",
]
