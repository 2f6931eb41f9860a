"""Every state transition of a job and its chunks: one function each, the guard in its name and in its WHERE.

Functions take a Connection of `Database.write()` (or `read()`), so that a caller can join several in one transaction.
"""
