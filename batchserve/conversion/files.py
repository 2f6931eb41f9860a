"""Trained models as they lie in files: pickles, skops, and the packages' own."""

import hashlib
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchserve.conversion.sample import sentence
from batchserve.errors import ConversionFailed

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Loaded:
    """A model, and what its file says about it."""

    model: Any
    digest: str
    """SHA-256 of its bytes."""
    notes: list[str] = field(default_factory=list)
    columns: list[str] | None = None
    """The names of its columns, where the model itself may not know them."""
    example: "pandas.DataFrame | None" = None
    """Records that were stored along."""


def load(path: Path) -> Loaded:
    """Raises ConversionFailed. Loading runs the code in a pickle: trust it."""
    if path.is_dir():
        from batchserve.conversion.mlflow import load_folder  # loads the files in it by this function

        return load_folder(path)
    if not path.is_file():
        raise ConversionFailed(f"There is no file {path}.")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    try:
        model, notes = _read(path)
    except ConversionFailed:
        raise
    except Exception as error:  # a pickle may raise anything
        raise ConversionFailed(f"{path} could not be unpickled: {_reason(error)}") from error
    return Loaded(model, digest, notes)


def _read(path: Path) -> tuple[Any, list[str]]:
    head = path.read_bytes()[:256]
    if head.startswith(b"tree\n"):
        return _need("lightgbm", path).Booster(model_file=str(path)), []
    if head.startswith(b"CBM1"):
        return _read_catboost(path), []
    if path.suffix in (".ubj", ".json", ".xgb", ".bst") and head[:1] == b"{":
        booster = _need("xgboost", path).Booster()
        booster.load_model(str(path))
        return booster, []
    if path.suffix == ".skops":
        return _read_skops(path), []
    return _unpickle(path)


def _need(package: str, path: Path) -> Any:
    if find_spec(package) is None:
        raise ConversionFailed(
            f"{path} is of {package}, which is not installed. Install it with: pip install {package}"
        )
    return import_module(package)


def _read_catboost(path: Path, kind: str | None = None) -> Any:
    catboost = _need("catboost", path)
    model = catboost.CatBoost()
    model.load_model(str(path))
    classes = getattr(model, "classes_", [])
    wanted = kind or ("CatBoostClassifier" if len(classes) else "CatBoostRegressor")
    loaded = getattr(catboost, wanted)()
    loaded.load_model(str(path))
    return loaded


def _read_skops(path: Path) -> Any:
    skops = _need("skops", path)
    with _working_directory():
        io = import_module(f"{skops.__name__}.io")
        return io.load(path, trusted=io.get_untrusted_types(file=path))


def _unpickle(path: Path) -> tuple[Any, list[str]]:
    import joblib
    from sklearn.exceptions import InconsistentVersionWarning

    with warnings.catch_warnings(record=True) as caught, _working_directory():
        warnings.simplefilter("always")
        model = joblib.load(path)
    aged = [w.message for w in caught if isinstance(w.message, InconsistentVersionWarning)]
    notes = [
        f"The pickle was written by scikit-learn {w.original_sklearn_version} and read by {w.current_sklearn_version}."
        for w in aged[:1]
    ]
    return model, notes


@contextmanager
def _working_directory() -> Iterator[None]:
    """Lets a pickle find the modules next to where the command runs, as the script that trained it did."""
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        yield
    finally:
        if added:
            sys.path.remove(here)


def _reason(error: Exception) -> str:
    """What a pickle lacks, and how to give it that."""
    if isinstance(error, ModuleNotFoundError):
        return (
            f"it needs the module {error.name!r}, which is not there. Install its package, or name the folder of the "
            "module: PYTHONPATH=FOLDER (the working directory is looked through)."
        )
    lacking = re.search(
        r"[Cc]an't get attribute '(?P<name>\w+)' on <module '(?P<module>[\w.]+)'", str(error)
    ) or re.search(r"module '(?P<module>[\w.]+)' has no attribute '(?P<name>\w+)'", str(error))
    if lacking and lacking["module"] in ("__main__", "__mp_main__", "batchserve.__main__"):
        return (
            f"it needs {lacking['name']!r}, which the program that trained it defined in its main file. Move it into a "
            "module, import it there, and store the model again."
        )
    if lacking:
        return (
            f"the module {lacking['module']!r} has no {lacking['name']!r}: it is of another version. Load the model "
            "with the packages used for training."
        )
    return f"{sentence(error)} Load it with the packages used for training."


def import_module_here(name: str) -> None:
    """Import a module, also one in the working directory, that registers converters. Raises ConversionFailed."""
    with _working_directory():
        try:
            import_module(name)
        except Exception as error:  # a module may raise anything
            raise ConversionFailed(
                f"The module {name!r} with converters cannot be imported: {sentence(error)}"
            ) from error
