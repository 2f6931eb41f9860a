"""What the plain inputs of small jobs have in common, whatever their format."""

from dataclasses import dataclass, replace
from typing import Protocol

from batchserve.domain import Chunk, ModelVersion, Options, Signature
from batchserve.errors import BatchserveError
from batchserve.formats.protocol import Header, Records, Tensors
from batchserve.inference.matching import Match, match_input

__all__ = ["ModelUse", "Plain", "match_by_names"]


class Plain(Protocol):
    """The records of an input that can be scored with those of others, without a table."""

    @property
    def signature(self) -> Signature:
        """The model's, without the inputs that the options set."""

    @property
    def shared(self) -> Tensors:
        """Inputs set by the options."""

    @property
    def chunk(self) -> Chunk:
        """All records."""

    @property
    def inputs(self) -> Tensors:
        """The other inputs."""

    def write(self, outputs: Tensors) -> bytes | None:
        """The result of these answers, one for each record; None: the other road must write it."""


@dataclass(frozen=True, slots=True, eq=False)
class ModelUse:
    """A model under options, as a key of a cache. Signatures cannot be hashed: they are told apart by their identity,
    and kept with the key, so that no other one gets it."""

    model: ModelVersion
    options: Options

    def __hash__(self) -> int:
        return hash((id(self.model.signature), self.options.format, self.options.key))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ModelUse)
            and self.model.signature is other.model.signature
            and self.options == other.options
        )


def match_by_names(header: Header, use: ModelUse) -> Match | None:
    """The match of every input with these columns. None: it depends on their values; or they are refused, which the
    road for all inputs tells."""
    try:
        match = match_input(replace(header, read_sample=_no_sample), use.model, use.options)
        match.require_writable()
    except (BatchserveError, _SampleNeededError):
        return None
    return match


class _SampleNeededError(Exception):
    pass


def _no_sample() -> Records:
    raise _SampleNeededError
