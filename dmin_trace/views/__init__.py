"""An answer for a person or a program: terminal tables, JSON and CSV."""

from dmin_trace.views.report import (
    Question,
    damage_table,
    facts_table,
    harmless,
    hits_table,
    measure_table,
    measures_json,
    to_csv,
    to_json,
    verified_json,
)

__all__ = [
    "Question",
    "damage_table",
    "facts_table",
    "harmless",
    "hits_table",
    "measure_table",
    "measures_json",
    "to_csv",
    "to_json",
    "verified_json",
]
