"""An answer for a person or a program: terminal tables, JSON and CSV."""

from dmin_trace.views.audit_table import audit_json, audit_lines, audit_tables
from dmin_trace.views.describe import describe_index, describe_store, summarize_index
from dmin_trace.views.export import hits_json, measures_json, table_csv, verified_json
from dmin_trace.views.table import damage_table, facts_table, hits_table, measure_table
from dmin_trace.views.terminal_pictures import find_draw, shows_pictures
from dmin_trace.views.text import harmless
from dmin_trace.views.totals_table import totals_table
