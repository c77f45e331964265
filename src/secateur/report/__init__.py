"""How does it look? Numbers and tensors become one HTML file that opens offline."""

from .counting import histogram
from .elements import Section
from .histogram import CountBelow, Histogram
from .measurements import Comparison, compare, measurement_section
from .page import Highlight, document, page
from .sparsity import LayerRow, sparsity_section
from .tables import Table, notes_section, table_section
from .tradeoff import Point, Tradeoff, tradeoff_section
from .weights import Stage, histogram_section
from .write import write

__all__ = [
    "Comparison",
    "CountBelow",
    "Highlight",
    "Histogram",
    "LayerRow",
    "Point",
    "Section",
    "Stage",
    "Table",
    "Tradeoff",
    "compare",
    "document",
    "histogram",
    "histogram_section",
    "measurement_section",
    "notes_section",
    "page",
    "sparsity_section",
    "table_section",
    "tradeoff_section",
    "write",
]
