"""Several stages in one run, each measured: train, distil, prune, quantize, fine-tune, export."""

from secateur.pipeline.runner import Outcome, experiment_to, run_experiment
from secateur.pipeline.spec import Experiment, experiment, read_experiment
from secateur.pipeline.subject import Loading

__all__ = [
    "Experiment",
    "Loading",
    "Outcome",
    "experiment",
    "experiment_to",
    "read_experiment",
    "run_experiment",
]
