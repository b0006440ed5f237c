"""A dry run in words, for the site's administrator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def lines(document: dict[str, Any]) -> Iterator[str]:
    """The answer, and what it rests on."""
    if document["joins"]:
        yield f"{document['site']} joins run {document['run']}, if an operator whom it knows has signed it."
    else:
        yield f"{document['site']} does not join run {document['run']}:"
        yield from (f"  - {reason}" for reason in document["reasons"])
    data, model, release, privacy = (document[key] for key in ("data", "model", "release", "privacy"))
    if data:
        yield f"data:    {data['name']}, {data['rows']} rows to train on, {data['held_out']} held out (told to nobody)"
    if model:
        steps = f", {data['steps_a_round']} steps a round" if data else ""
        yield f"model:   {model['name']}, {model['parameters']:,} parameters{steps}, {document['rounds']} rounds"
    if release:
        also = ", ".join(release["metrics"]) or "nothing"
        yield f"leaves:  {release['sealed_bytes']:,} bytes a round, sealed to the coordinator alone"
        yield f"         the updated model ({release['update_bytes']:,} bytes, compression {release['compression']})"
        yield f"         beside it: {also}; weight: {release['weight']}"
    if privacy:
        yield from _privacy(privacy)


def _privacy(privacy: dict[str, Any]) -> Iterator[str]:
    ledger = privacy["ledger"]
    if privacy["unit"] == "none":
        yield "privacy: none. From the first round on, no epsilon describes what was released about this data."
    else:
        whom = (
            "the coordinator adds the noise and is trusted"
            if privacy["trust"] == "coordinator"
            else "noise is added here"
        )
        yield (
            f"privacy: unit {privacy['unit']}, {whom}; noise multiplier {privacy['noise_multiplier']:.4g} for epsilon "
            f"{privacy['epsilon_calibrated']:.4g} of the run by itself"
        )
        yield (
            f"         by this site's ledger epsilon {_number(privacy['epsilon_round'])} after one round, "
            f"{_number(privacy['epsilon_run'])} after all {privacy['participations']} ({privacy['relation']})"
        )
    budget = ledger["budget"]
    yield (
        f"ledger:  epsilon {_number(ledger['spent'])} of {budget['epsilon']:g} spent at delta {budget['delta']:g}; "
        f"{_number(ledger['spent_after'])} after this run"
    )


def _number(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.4g}"
