"""Compiled reading of texts. All gives the values of polars, which reads without it."""
