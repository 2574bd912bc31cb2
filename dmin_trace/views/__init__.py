"""An answer for a person or a program: terminal tables, JSON and CSV."""

from dmin_trace.views.describe import describe_index as describe_index
from dmin_trace.views.describe import describe_store as describe_store
from dmin_trace.views.describe import summarize_index as summarize_index
from dmin_trace.views.export import hits_csv as hits_csv
from dmin_trace.views.export import hits_json as hits_json
from dmin_trace.views.export import measures_json as measures_json
from dmin_trace.views.export import verified_json as verified_json
from dmin_trace.views.table import damage_table as damage_table
from dmin_trace.views.table import facts_table as facts_table
from dmin_trace.views.table import hits_table as hits_table
from dmin_trace.views.table import measure_table as measure_table
from dmin_trace.views.text import harmless as harmless
