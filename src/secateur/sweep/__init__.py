"""Many experiments that differ in a few settings: each a run's folder, together a table."""

from secateur.sweep.points import AXES, Point, Sweep, read_sweep, sweep
from secateur.sweep.table import Line, lines, write_table
from secateur.sweep.work import carry_out

__all__ = ["AXES", "Line", "Point", "Sweep", "carry_out", "lines", "read_sweep", "sweep", "write_table"]
