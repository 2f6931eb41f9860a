"""The OpenAPI document of the API, from which clients are generated, as a file."""

import json
from pathlib import Path

from batchserve.app import create_app
from batchserve.settings import Settings

__all__ = ["PATH", "document"]

PATH = Path(__file__).resolve().parent.parent / "docs" / "openapi.json"


def document() -> str:
    """The text of the file, as it should be."""
    described = create_app(Settings(), worker=False).openapi()
    return json.dumps(described, indent=1, ensure_ascii=False) + "\n"
