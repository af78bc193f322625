"""The version, apart from the package so that the build needs no torch."""

VERSION = "0.1.0"
