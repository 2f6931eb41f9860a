"""A service under kill -9, and clients that record what it has acknowledged.

    python -m chaos --seconds 60        # with tests/ on the path; `make chaos`

A server, two workers, and 16 clients on one storage. A killer ends a process every few seconds, a supervisor starts it
again. At the end, the history of what was acknowledged is compared with what is there.
"""

NOT_HERE = "Not here"
"""How the message begins where a run needs what this machine does not have."""
