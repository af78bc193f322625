"""The version, apart from the package so that the build needs no torch."""

VERSION = "0.2.0"

RECORD_SCHEMA = 1
"""Of the records of runs: raised when a reader of the old ones would misread the new ones."""
