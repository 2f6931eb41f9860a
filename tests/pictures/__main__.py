"""Writes the pictures of docs/images: `screenshots` of the pages, and the `recording` of a kill and a restart."""

import argparse
import tempfile
from pathlib import Path

from pictures import recording, screenshots

IMAGES = Path(__file__).resolve().parent.parent.parent / "docs" / "images"


def main() -> None:
    parser = argparse.ArgumentParser(prog="pictures", description=__doc__)
    parser.add_argument("kind", choices=("screenshots", "recording"))
    kind = parser.parse_args().kind
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="batchserve-pictures-") as name:
        for path in {"screenshots": screenshots.take, "recording": recording.take}[kind](Path(name), IMAGES):
            print(f"docs/images/{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
