"""The version, kept apart so that it can be read without importing anything else."""

VERSION = "0.1.0"

EXPORT_VERSION = 1
"""Of what programs read: every JSON format, and the columns of every table. docs/exports.md describes it."""
