"""text: a UTF-8 file, read as one running text or, where classes are declared, as one example a line."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from common.config.settings import DataSettings
from common.data.collection import Collection, Integers, as_examples
from common.data.readers.labels import class_codes
from common.data.tokens import (
    CHARACTER_VOCABULARY,
    HASHED_VOCABULARY,
    Encoder,
    character_ids,
    hashed_word_ids,
    listed_word_ids,
    padded,
    windows,
)
from common.errors import DataError
from common.schema import DataSchema
from common.site import DataSource


def text_schema(source: DataSource, settings: DataSettings) -> DataSchema:
    """What text read by `source` looks like. Reads the public vocabulary if there is one, never the text."""
    _, vocabulary_size = _encoder(source)
    running = not source.classes
    return DataSchema(
        kind="tokens",
        input_shape=(settings.sequence_length,),
        num_classes=vocabulary_size if running else len(source.classes),
        vocabulary_size=vocabulary_size,
        per_position=running,
        class_names=tuple(source.classes),
    )


def read_text(
    source: DataSource, path: Path, settings: DataSettings, *, labelled: bool, tolerant: bool = False
) -> Collection:
    """The file as windows for next-token prediction, whose last `test_fraction` is held out; or as labelled lines.

    With declared `classes` each line is `class<TAB>text`; a line without a tab has no label. Empty lines are skipped.

    Raises:
        DataError: The file is not UTF-8 text, is too short for one window (unless `tolerant`), or a class is not
            declared.
    """
    schema = text_schema(source, settings)
    encode, _ = _encoder(source)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise DataError(f"{path} cannot be read as UTF-8 text", hint="save it as plain UTF-8") from None
    if source.classes:
        return _lines(text.splitlines(), encode, schema, source, where=path.name, labelled=labelled)
    collection = running_text([("", text)], encode, schema, settings)
    if not len(collection.examples) and not tolerant:
        raise DataError(
            f"{path.name} is too short for one example of {settings.sequence_length} tokens",
            hint="lower data.sequence_length, or give more text",
        )
    return collection


def running_text(
    texts: list[tuple[str, str]], encode: Encoder, schema: DataSchema, settings: DataSettings
) -> Collection:
    """Windows over several named texts, one group each; the last `test_fraction` of each is held out.

    Each text is cut before windows are made, so no held-out token but the first of a window is seen in training.
    """
    length = settings.sequence_length
    inputs, targets, held, group_of, ids = [], [], [], [], []
    for group, (name, text) in enumerate(texts):
        tokens = encode(text)
        cut = round(len(tokens) * (1 - settings.test_fraction))
        for part, is_held in ((tokens[:cut], False), (tokens[cut:], True)):
            x, y = windows(part, length)
            inputs.append(x)
            targets.append(y)
            held += [is_held] * len(x)
            group_of += [group] * len(x)
            ids += [f"{name}:{'test' if is_held else 'train'}:{i}" for i in range(len(x))]
    return Collection(
        schema=schema,
        examples=as_examples(np.concatenate(inputs), np.concatenate(targets)),
        row_ids=ids,
        groups=tuple(name for name, _ in texts) if texts[0][0] else (),
        group_of=np.array(group_of, np.int64) if texts[0][0] else None,
        held_out=np.array(held, bool),
        rows=len(held),
    )


def _lines(
    lines: list[str], encode: Encoder, schema: DataSchema, source: DataSource, *, where: str, labelled: bool
) -> Collection:
    """One example a line."""
    numbered = [(i + 1, *_split(line)) for i, line in enumerate(lines) if line.strip()]
    kept = [row for row in numbered if row[1] is not None] if labelled else numbered
    if not kept:
        raise DataError(f"{where} has no labelled lines", hint="write each line as class<TAB>text")
    _, targets = class_codes([label for _, label, _ in kept], source, where=where)
    rows: list[Integers] = [padded(encode(text), schema.input_shape[0]) for _, _, text in kept]
    return Collection(
        schema=schema,
        examples=as_examples(np.stack(rows), targets),
        row_ids=[str(number) for number, _, _ in kept],
        rows=len(numbered),
        dropped={"has no label": len(numbered) - len(kept)} if len(numbered) > len(kept) else {},
    )


def _split(line: str) -> tuple[str | None, str]:
    """Label and text of a line; the label is None where there is no tab."""
    label, tab, text = line.partition("\t")
    return (label.strip() or None, text) if tab else (None, line)


def _encoder(source: DataSource) -> tuple[Encoder, int]:
    """How the source's text becomes tokens, and the number of ids."""
    if source.tokenizer == "characters":
        return character_ids, CHARACTER_VOCABULARY
    if not source.vocabulary:
        if not source.classes:
            raise DataError(
                "predicting the next word needs a list of words",
                hint="name a public one: vocabulary = 'words.txt', one word a line",
            )
        return hashed_word_ids, HASHED_VOCABULARY
    path = Path(source.vocabulary)
    try:
        words = path.read_text(encoding="utf-8-sig").split()
    except (OSError, UnicodeDecodeError):
        raise DataError(f"the vocabulary {path} cannot be read as UTF-8 text", hint="write one word a line") from None
    if not words:
        raise DataError(f"the vocabulary {path} has no words", hint="write one word a line")
    return listed_word_ids(words), 1 + len(words)
