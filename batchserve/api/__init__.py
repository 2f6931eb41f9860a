"""The REST API under /v1: one module for each noun of the path."""
