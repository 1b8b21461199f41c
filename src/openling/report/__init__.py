"""Reads a run folder's `report.json` and writes one self-contained page; imports nothing of the model."""

from openling.report.page import build, summary_table
from openling.report.shipped import completions, side_by_side

__all__ = ["build", "completions", "side_by_side", "summary_table"]
