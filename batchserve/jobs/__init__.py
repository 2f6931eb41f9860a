"""State transitions of jobs and chunks: one function each, with its guard in the WHERE.

Functions take a Connection of `Database.write()` (or `read()`), so that a caller can join several in one transaction.
"""
