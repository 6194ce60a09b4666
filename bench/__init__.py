"""Measurements: named shapes, providers, timing, rows, tables. See bench/README.md. Not installed with the package."""
