"""The cluster of docker-compose.yml on this host: its services as plain processes, with the commands and the
environment that they have there.

    python -m cluster        # with tests/ on the path; `make cluster-demo`
"""
