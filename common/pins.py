"""The public records of everybody that a party knows: `parties.json`. A record that is pinned is never replaced."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from common.crypto import PartyRecord
from common.errors import RefusedError

LARGEST = 4 << 20
"""Bytes of a document of records: more is refused unread."""


Claim = Literal["malicious coordinator", "curious coordinator"]


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    format: int
    federation: str
    parties: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pins:
    """One coordinator, and sites and operators by name; no two parties share a name."""

    federation: str
    coordinator: PartyRecord
    sites: Mapping[str, PartyRecord]
    operators: Mapping[str, PartyRecord]

    @classmethod
    def of(cls, federation: str, records: Iterable[PartyRecord]) -> Self:
        """Pins of these records.

        Raises:
            RefusedError: A name appears twice (capitals do not count), or there is not exactly one coordinator.
        """
        ordered = sorted(records, key=lambda record: record.name)
        if len({record.name.casefold() for record in ordered}) < len(ordered):
            raise RefusedError("two records have one name", hint="restore parties.json from a copy")
        coordinators = [record for record in ordered if record.role == "coordinator"]
        if len(coordinators) != 1:
            raise RefusedError(f"there are {len(coordinators)} coordinators", hint="restore parties.json from a copy")
        named = {
            role: MappingProxyType({r.name: r for r in ordered if r.role == role}) for role in ("site", "operator")
        }
        return cls(federation=federation, coordinator=coordinators[0], sites=named["site"], operators=named["operator"])

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read what `to_text` wrote.

        Raises:
            RefusedError: The text is not such a document, or a record in it is not sound.
        """
        if len(text) > LARGEST:
            raise RefusedError("the document of records is too large", hint="restore parties.json from a copy")
        try:
            document = _Document.model_validate_json(text)
        except (ValidationError, RecursionError) as e:
            raise RefusedError("this is no document of public records", hint="restore it from a copy") from e
        if document.format != 1:
            raise RefusedError(
                f"format {document.format} of the public records is not known", hint="install a newer Coterie"
            )
        return cls.of(document.federation, map(PartyRecord.from_document, document.parties))

    def to_text(self) -> str:
        """JSON: nothing in it is secret."""
        parties = [record.to_document() for record in self.records()]
        return json.dumps({"format": 1, "federation": self.federation, "parties": parties}, indent=1) + "\n"

    def records(self) -> list[PartyRecord]:
        """All records, the coordinator's first, each kind by name."""
        return [self.coordinator, *self.sites.values(), *self.operators.values()]

    def find(self, name: str) -> PartyRecord | None:
        """The record of a name, whatever its role."""
        return next((record for record in self.records() if record.name == name), None)

    def taken(self, name: str) -> bool:
        """Whether a new party cannot have this name: names that differ in capitals only are mistaken for each other."""
        return any(record.name.casefold() == name.casefold() for record in self.records())

    def plus(self, records: Iterable[PartyRecord]) -> Self:
        """These pins and new ones.

        Guarantee: What is pinned stays. A record that is pinned already changes nothing.

        Raises:
            RefusedError: A name is pinned with other keys.
        """
        new = []
        for record in records:
            pinned = self.find(record.name)
            if pinned is None:
                new.append(record)
            elif pinned != record:
                raise RefusedError(
                    f"`{record.name}` is pinned with other keys, and a pinned record is never replaced",
                    hint="a party that lost its keys comes back under a new name",
                )
        return type(self).of(self.federation, [*self.records(), *new])


def secagg_claim(*, agreed: bool) -> Claim:
    """Whom secure aggregation hides single updates from, while not too many sites help it.

    A coordinator that brought the sites each other's keys could have brought its own instead, and would see all that is
    masked for them; one that only looks on sees nothing either way.

    Args:
        agreed: Whether the sites' keys were agreed outside of the coordinator.
    """
    return "malicious coordinator" if agreed else "curious coordinator"
