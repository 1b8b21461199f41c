"""Reads a run folder's `report.json` and writes one self-contained page; imports nothing of the model."""

from openling.report.page import build, summary_table

__all__ = ["build", "summary_table"]
