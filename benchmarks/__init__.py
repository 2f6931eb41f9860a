"""Measures the speed of the service, as ratios within one run, and its peak memory."""
