"""A service under odd and hostile requests, and a count of every response, job and count that breaks a promise.

    python -m fuzz --seconds 60        # with tests/ on the path; `make fuzz`

One server process with keys for two tenants and an admin. Threads send cases: damaged inputs, inputs whose right
account is known, options of every type, models, and malformed HTTP. Small jobs of known bytes show all the while that
the others are served. `python -m fuzz --replay FILE` sends one case again.
"""
