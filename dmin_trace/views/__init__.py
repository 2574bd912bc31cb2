"""An answer for a person or a program: terminal tables, JSON and CSV."""

from dmin_trace.views.describe import describe_index, describe_store, summarize_index
from dmin_trace.views.export import hits_csv, hits_json, measures_json, verified_json
from dmin_trace.views.table import damage_table, facts_table, hits_table, measure_table
from dmin_trace.views.terminal_pictures import find_draw, shows_pictures
from dmin_trace.views.text import harmless
