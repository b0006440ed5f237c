"""A dry run in words, for the site's administrator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from common.guarantee import against


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
        if release["sums"]:
            yield from _sums(release["sums"], also, release["weight"])
        else:
            size, how = release["update_bytes"], release["compression"]
            yield f"         the updated model ({size:,} bytes, compression {how})"
            yield f"         beside it: {also}; weight: {release['weight']}"
    if privacy:
        yield from _privacy(privacy)


def _sums(sums: dict[str, Any], also: str, weight: str) -> Iterator[str]:
    helpers = {0: "", 1: " and one site that helps it"}.get(
        sums["colluding"], f" and {sums['colluding']} sites that help it"
    )
    yield f"         the update, masked ({sums['update_bytes']:,} bytes); in it: {also}, weight: {weight}"
    yield f"         the coordinator{helpers} can read sums only, of {sums['fewest']} to {sums['members']} updates"
    if sums["against"] == "malicious coordinator":
        yield "         whatever it does: the sites' keys were agreed without it"
    else:
        yield "         unless it exchanged keys of sites that it brought: compare them with the others"
    if sums["not_with"]:
        yield f"         no sum with {', '.join(sums['not_with'])}: their keys came through the coordinator"
    yield f"         keys for {sums['epoch_rounds']} rounds: {sums['setup_bytes']:,} bytes before the first of them"
    for warning in sums["warnings"]:
        yield f"         note: {warning}"


def _privacy(privacy: dict[str, Any]) -> Iterator[str]:
    ledger = privacy["ledger"]
    if privacy["unit"] == "none":
        yield "privacy: none. From the first round on, no epsilon describes what was released about this data."
    else:
        whom = {
            "coordinator": "the coordinator adds the noise and is trusted",
            "cohort": "each site of a sum adds its share of the noise",
        }.get(privacy["trust"], "noise is added here")
        yield (
            f"privacy: unit {privacy['unit']}, {whom}; noise multiplier {privacy['noise_multiplier']:.4g} for epsilon "
            f"{privacy['epsilon_calibrated']:.4g} of the run by itself"
        )
        yield (
            f"         by this site's ledger epsilon {_number(privacy['epsilon_round'])} after one round, "
            f"{_number(privacy['epsilon_run'])} after all {privacy['participations']} ({privacy['relation']})"
        )
        if shares := privacy["shares"]:
            yield f"         {shares['mechanism']} noise of {shares['honest']} sites is enough: it holds "
            yield f"         {against(privacy['trust'], shares['colluding'])}"
    budget = ledger["budget"]
    yield (
        f"ledger:  epsilon {_number(ledger['spent'])} of {budget['epsilon']:g} spent at delta {budget['delta']:g}; "
        f"{_number(ledger['spent_after'])} after this run"
    )


def _number(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.4g}"
