"""The variables of the environment that begin with BATCHSERVE_: which there are, and which value of each is in force.

A misspelt one would have no effect, which is noticed too late: it is refused with the nearest name.
"""

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from dotenv import dotenv_values
from pydantic import PrivateAttr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

__all__ = ["OF_CLIENTS", "OWN_PREFIX", "PREFIX", "InForce", "VariableSettings", "require_known"]

PREFIX = "BATCHSERVE_"
OF_CLIENTS = frozenset({"BATCHSERVE_URL", "BATCHSERVE_API_KEY"})
"""Those of the client and of the commands that use it."""
OWN_PREFIX = "BATCHSERVE_X_"
"""Names that begin so are for programs around batchserve, which reads none of them."""

_FILE = "_FILE"
_DOTENV = ".env"
# Kubernetes sets these in every pod of a namespace with a Service whose name begins with "batchserve".
_OF_SERVICES = re.compile(r"BATCHSERVE(_\w+)?_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)")
_ADDRESS_OF_SERVICE = re.compile(r"(tcp|udp|sctp)://")
_SECRET_NAME = re.compile(r"(^|_)(secret|password|token|credential|api_key)s?(_|$)")
_PASSWORD = re.compile(r"(://[^:/@]*:).*(?=@)")
_SECRET_PARAMETER = re.compile(
    r"([?&][^=&]*(?:password|passwd|secret|token|key|credential)[^=&]*=)[^&]*", re.IGNORECASE
)
_HIDDEN = "***"


@dataclass(frozen=True, slots=True)
class InForce:
    """A setting as it is in force."""

    variable: str
    value: Any
    """As JSON has it, without passwords."""
    source: str
    """`default`, `environment`, the variable that names a file with the value, `.env` or `command line`."""
    description: str

    @property
    def shown(self) -> str:
        if isinstance(self.value, dict | list):
            return json.dumps(self.value)
        return "" if self.value is None else str(self.value)


class VariableSettings(BaseSettings):
    """Settings from variables that all are known."""

    model_config = SettingsConfigDict(hide_input_in_errors=True)  # it may have passwords

    _given: frozenset[str] = PrivateAttr(frozenset())
    """The fields that the program itself has given."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self._given = frozenset(given)

    @model_validator(mode="before")
    @classmethod
    def _require_known(cls, values: Any) -> Any:
        require_known(os.environ, dotenv_values(_DOTENV), cls.model_fields)
        return values

    def in_force(self) -> list[InForce]:
        """All settings in their order."""
        values = self.model_dump(mode="json")
        return [
            InForce(_variable(name), _without_secrets(name, values[name]), self._source(name), field.description or "")
            for name, field in type(self).model_fields.items()
        ]

    def _source(self, name: str) -> str:
        if name in self._given:
            return "command line"
        if name not in self.model_fields_set:
            return "default"
        variable, environment = _variable(name), {name.upper() for name in os.environ}
        if variable not in environment:
            return _DOTENV
        return variable + _FILE if variable + _FILE in environment else "environment"


def require_known(environment: Mapping[str, str], dotenv: Mapping[str, str | None], settings: Collection[str]) -> None:
    """Raises ValueError that names each unknown variable, where it is, and the nearest name. `dotenv`: the lines of
    `.env`. `settings`: the names of the settings."""
    known = {_variable(name) for name in settings} | OF_CLIENTS
    faults = [
        *_faults(environment, "in the environment", known | {name + _FILE for name in known}),
        *_faults(dotenv, f"in {_DOTENV}", known),
    ]
    if faults:
        raise ValueError("; ".join(faults))


def _faults(variables: Mapping[str, str | None], place: str, known: Collection[str]) -> Iterator[str]:
    for given, value in variables.items():
        name = given.upper()
        if not name.startswith(PREFIX) or name in known or name.startswith(OWN_PREFIX) or _is_of_service(name, value):
            continue
        if name.removesuffix(_FILE) in known:
            yield f"{given} {place}: a variable that names a file is read from the environment alone"
            continue
        nearest = get_close_matches(name, known, n=1, cutoff=0.0)[0]
        yield f"{given} {place} is not a setting: the nearest name is {nearest}"


def _is_of_service(name: str, value: str | None) -> bool:
    if _OF_SERVICES.fullmatch(name):
        return True
    return name.endswith("_PORT") and _ADDRESS_OF_SERVICE.match(value or "") is not None


def _variable(name: str) -> str:
    return f"{PREFIX}{name.upper()}"


def _without_secrets(name: str, value: Any) -> Any:
    if value and _SECRET_NAME.search(name):
        return _HIDDEN
    if not isinstance(value, str) or "://" not in value:
        return value
    return _SECRET_PARAMETER.sub(rf"\1{_HIDDEN}", _PASSWORD.sub(rf"\1{_HIDDEN}", value))
