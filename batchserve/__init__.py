"""Asynchronous batch prediction: a file of inputs and an ONNX model give a file of predictions."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchserve.client import AsyncClient, Client
    from batchserve.client.child import local
    from batchserve.conversion import annotate, chain, convert, export_img2feat, export_torch

__all__ = [
    "AsyncClient",
    "Client",
    "__version__",
    "annotate",
    "chain",
    "convert",
    "export_img2feat",
    "export_torch",
    "local",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Scoring processes import this package too, and have no use for a client.
    if name in ("AsyncClient", "Client"):
        from batchserve import client

        return getattr(client, name)
    if name == "local":
        from batchserve.client import child

        return child.local
    if name in ("annotate", "chain", "convert", "export_img2feat", "export_torch"):
        from batchserve.client.extras import require_service

        require_service(f"batchserve.{name}")
        from batchserve import conversion

        return getattr(conversion, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
