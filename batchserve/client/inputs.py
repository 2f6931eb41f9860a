"""Files and folders as inputs: which of their files are scored, as which jobs, and which are left out."""

import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath
from typing import Literal

from batchserve.client.data import MEDIA_TYPES, is_image, named_images
from batchserve.client.ledger import LEDGER
from batchserve.client.names import COMPRESSED, stem_of
from batchserve.errors import InvalidInput

__all__ = ["Found", "InputFile", "LeftOut", "find_inputs", "require_distinct"]

Kind = Literal["table", "archive", "image"]

_ARCHIVE = ".zip"
_NO_TABLES = (_ARCHIVE, ".onnx")
_TABLES = (
    *(suffix for suffix, kind in MEDIA_TYPES.items() if not kind.startswith("image/") and suffix not in _NO_TABLES),
    ".xlsx",
)
"""Suffixes of the files in a folder that are scored, each as a job. A file that is named may have any suffix."""
_HIDDEN = (".", "~$")
"""How the names of files begin that programs make for themselves; the latter are those of Excel."""
_RESULTS = (".predictions", ".partial", ".errors")
"""How the names of results end, without their suffixes."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file that is one input."""

    path: Path
    name: str
    """Its path below the folder that was named; of a file that was named, its name."""
    kind: Kind
    bytes: int = 0
    fault: str | None = None
    """Why it cannot be sent."""

    @property
    def stem(self) -> str:
        """The path of its result below the folder of the results, without `.predictions` and suffix."""
        return PurePosixPath(self.name).with_name(stem_of(self.name)).as_posix()


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A file or folder that is not an input."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True)
class Found:
    """The inputs that paths name: files, each a job of its own, or else images, which are one job."""

    files: list[InputFile] = field(default_factory=list)
    images: Path | list[Path] | None = None
    """The folder of the images, or their paths."""
    left_out: list[LeftOut] = field(default_factory=list)


def find_inputs(paths: Sequence[str | os.PathLike[str]]) -> Found:
    """The inputs that these files and folders are or hold, in the order of the paths, and in a folder of their names.

    Raises InvalidInput for tables among images, for folders with neither, and for a path that does not exist.
    """
    given, search = [Path(path) for path in paths], _Search()
    for path in given:
        if path.is_dir():
            search.add_folder(path)
        elif path.is_file():
            search.add(path, path.name, is_named=True)
        else:
            raise InvalidInput(f"there is no file {str(path)!r}")
    return search.result(given)


def require_distinct(files: Iterable[InputFile]) -> None:
    """Raises InvalidInput where the results of two files would have one name."""
    stems: dict[str, InputFile] = {}
    for file in files:
        other = stems.setdefault(file.stem, file)
        if other is not file:
            raise InvalidInput(
                f"the results of {str(other.path)!r} and {str(file.path)!r} would have one name, "
                f"'{file.stem}.predictions': rename one of them, or predict them into two folders"
            )


class _Search:
    """What was found so far. `files`: by their absolute paths, so that a file that is named twice is one input."""

    def __init__(self) -> None:
        self.files: dict[str, InputFile] = {}
        self.left_out: list[LeftOut] = []

    def add_folder(self, top: Path) -> None:
        """The files in a folder and below it. Links to files are followed, links to folders are not."""
        folders = [top]
        while folders:
            folder = folders.pop()
            try:
                inside = sorted(folder.iterdir(), key=lambda path: path.name)
            except OSError as error:
                if folder == top:
                    raise InvalidInput(f"the folder {str(top)!r} {_reason(error)}") from None
                self._add(InputFile(folder, folder.relative_to(top).as_posix(), "table", fault=_reason(error)))
                continue
            names = {name for path in inside for name in (path.name, stem_of(path.name))}
            for path in inside:
                if _is_result(path.name, names):
                    self.left_out.append(LeftOut(path, "a result"))
                elif not self._is_folder(path):
                    self.add(path, path.relative_to(top).as_posix())
            folders += reversed([path for path in inside if self._is_entered(path)])

    def add(self, path: Path, name: str, *, is_named: bool = False) -> None:
        if path.name.startswith(_HIDDEN) and not is_named:
            if path.name != LEDGER:
                self.left_out.append(LeftOut(path, "hidden"))
            return
        kind = _kind(path, is_named=is_named)
        if kind is None:
            self.left_out.append(LeftOut(path, "its suffix is not that of a table or an image"))
            return
        try:
            status = path.stat()
        except OSError as error:
            reason = "is a link to nothing" if path.is_symlink() else _reason(error)
            self._add(InputFile(path, name, kind, fault=reason))
            return
        if not stat.S_ISREG(status.st_mode):
            self.left_out.append(LeftOut(path, "not a regular file"))
            return
        fault = None if status.st_size else "is empty: expected a header or records, got 0 bytes"
        self._add(InputFile(path, name, kind, status.st_size, fault))

    def result(self, paths: list[Path]) -> Found:
        files = list(self.files.values())
        images = [file for file in files if file.kind == "image"]
        tables = [file for file in files if file.kind == "table"]
        if tables and images:
            raise InvalidInput(
                f"{_several(tables)} would be a job each, and {_several(images)} one job of images: predict tables and "
                "images apart, for example by naming the files of one kind in place of their folder"
            )
        if images:
            left_out = [LeftOut(file.path, "an archive next to images") for file in files if file.kind == "archive"]
            left_out += [LeftOut(file.path, file.fault) for file in images if file.fault and not file.path.exists()]
            return Found(images=_one_job(paths, images), left_out=self.left_out + left_out)
        if not files:
            names = ", ".join(f"*{suffix}" for suffix in _TABLES)
            raise InvalidInput(
                f"there are no tables and no images in {', '.join(repr(str(path)) for path in paths)}: expected files "
                f"named {names}, {named_images()}"
            )
        return Found(files, left_out=self.left_out)

    def _is_folder(self, path: Path) -> bool:
        if not path.is_dir():
            return False
        if not self._is_entered(path):
            is_hidden = path.name.startswith(_HIDDEN)
            reason = "hidden" if is_hidden else "a link to a folder: name it to have its files scored"
            self.left_out.append(LeftOut(path, reason))
        return True

    @staticmethod
    def _is_entered(path: Path) -> bool:
        return path.is_dir() and not path.is_symlink() and not path.name.startswith(_HIDDEN)

    def _add(self, file: InputFile) -> None:
        self.files.setdefault(os.path.abspath(file.path), file)  # noqa: PTH100 - `absolute` leaves `..`


def _is_result(name: str, names: set[str]) -> bool:
    """Whether a file is named after another one, or a folder, that is next to it: `a.predictions.csv` after `a.csv`,
    `a.errors.jsonl` also after `a.predictions.csv`. `names`: of all, with and without their suffixes."""
    stem = stem_of(name)
    of = next((stem.removesuffix(end) for end in _RESULTS if stem.endswith(end)), None)
    return of is not None and not ({of, f"{of}.predictions"} - {stem}).isdisjoint(names)


def _kind(path: Path, *, is_named: bool) -> Kind | None:
    if is_image(path):
        return "image"
    suffix = path.suffix.lower()
    if suffix == _ARCHIVE:
        return "archive"
    inner = PurePath(path.stem).suffix.lower() if suffix in COMPRESSED else suffix
    return "table" if is_named or inner in _TABLES else None


def _one_job(paths: list[Path], images: list[InputFile]) -> Path | list[Path]:
    """What `content_of` takes for these images. Raises InvalidInput for a folder of images among other paths."""
    if len(paths) == 1:
        return paths[0]
    if (folder := next((path for path in paths if path.is_dir()), None)) is not None:
        raise InvalidInput(f"the images in {str(folder)!r} are one job: predict that folder alone, or name its files")
    return [file.path for file in images]


def _several(files: Sequence[InputFile]) -> str:
    more = len(files) - 1
    return repr(str(files[0].path)) + (f" and {more:,} more" if more else "")


def _reason(error: OSError) -> str:
    return f"cannot be read: {error.strerror or error}"
