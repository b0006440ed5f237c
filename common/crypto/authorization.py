"""A run authorization: an operator's signature under one run and its exact configuration."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.crypto.identity import Name, PartyRecord
from common.crypto.keys import PartyKeys
from common.crypto.refusal import SealError

SIGNATURE_LABEL = b"coterie run authorization v1"
MOST_CHARACTERS = 16_384
_TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunAuthorization:
    """What an operator signs.

    Attributes:
        federation: Where the run takes place.
        run_id: 32 lower-case hexadecimal digits.
        config_digest: `RunConfig.digest()`, 64 lower-case hexadecimal digits.
        operator: Name of the operator.
        issued_at: UTC, such as `2026-01-31T12:00:00Z`.
    """

    federation: str
    run_id: str
    config_digest: str
    operator: str
    issued_at: str


class _Document(BaseModel):
    """An authorization as it travels."""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: Literal[1]
    federation: Name
    run_id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    config_digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    operator: Name
    issued_at: Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$")]
    signature: str


def authorize(keys: PartyKeys, *, federation: str, run_id: str, config_digest: str) -> str:
    """Sign a run as an operator; JSON text.

    Raises:
        SealError: `sender`: these are not an operator's keys; `context`: no run can have such an id, digest or name.
    """
    if keys.record.role != "operator":
        raise SealError("sender", "only an operator authorizes runs")
    run = RunAuthorization(
        federation=federation,
        run_id=run_id,
        config_digest=config_digest,
        operator=keys.record.name,
        issued_at=datetime.now(UTC).strftime(_TIME_FORMAT),
    )
    try:
        signature = base64.b64encode(keys.sign(SIGNATURE_LABEL, _signed(run))).decode()
        return _Document(version=1, signature=signature, **asdict(run)).model_dump_json()
    except (ValidationError, ValueError) as e:
        raise SealError("context", "such a run cannot be authorized") from e


def read_authorization(text: str, *, federation: str, operators: Mapping[str, PartyRecord]) -> RunAuthorization:
    """Verify an authorization against the operators that are pinned here.

    Raises:
        SealError: `length`, `context`: it is none, or of another federation; `sender`: no such operator is pinned;
            `signature`.
    """
    if len(text) > MOST_CHARACTERS:
        raise SealError("length", "a run's authorization is too long")
    try:
        document = _Document.model_validate_json(text)
        datetime.strptime(document.issued_at, _TIME_FORMAT).replace(tzinfo=UTC)
        signature = base64.b64decode(document.signature, validate=True)
    except (ValidationError, ValueError) as e:
        raise SealError("context", "a run's authorization is damaged") from e
    run = RunAuthorization(**document.model_dump(exclude={"version", "signature"}))
    if run.federation != federation:
        raise SealError("context", "a run's authorization is of another federation")
    operator = operators.get(run.operator)
    if operator is None or operator.role != "operator" or operator.name != run.operator:
        raise SealError("sender", "a run is authorized by an operator who is not known here")
    operator.verify(SIGNATURE_LABEL, _signed(run), signature)
    return run


def _signed(run: RunAuthorization) -> bytes:
    """The bytes that are signed: one spelling only, whatever the text's."""
    return json.dumps(asdict(run), sort_keys=True, separators=(",", ":")).encode()
