"""The GPT-2 study: pruned, merged and compressed models beside a smaller one, each before and after one fine-tuning."""

from .given import Given, Plan, Sources, read
from .job import Row, study
from .pages import write_study

__all__ = ["Given", "Plan", "Row", "Sources", "read", "study", "write_study"]
