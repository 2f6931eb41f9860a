"""What the client alone does not install: libraries for tables, and the rest of the service."""

from importlib.util import find_spec

__all__ = ["require_polars", "require_service"]


def require_polars(what: str) -> None:
    """Raises ImportError that says how to install polars, which makes and reads tables. `what` needs it."""
    if find_spec("polars") is None:
        raise ImportError(f"{what} needs polars: pip install 'batchserve-client[tables]'", name="polars")


def require_service(what: str) -> None:
    """Raises ImportError where only the client is installed. `what` needs the service."""
    if find_spec("batchserve.cli") is None:
        raise ImportError(
            f"{what} needs the whole service, and only its client is installed: pip uninstall batchserve-client, then "
            "pip install batchserve",
            name="batchserve",
        )
