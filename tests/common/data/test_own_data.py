"""A site's own files, as `site.toml` registers them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from common.config.settings import DataSettings
from common.data import check_data, load_examples, load_federation, schema_of
from common.data.tokens import HASHED_VOCABULARY
from common.errors import DataError
from common.schema import Federation
from common.site import Site

Register = Callable[..., Site]
OWN = DataSettings(name="own", partition="iid", clients=1, test_fraction=0.25)
TABLE = "id,age,rate,ward,outcome\n" + "\n".join(
    f"p{i},{40 + i},{60 + i}.5,{'ab'[i % 2]} ward,{('well', 'ill')[i % 2]}" for i in range(12)
)


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text + "\n", encoding="utf-8")


def error(site: Site, settings: DataSettings = OWN) -> DataError:
    """What loading refuses with; no cell of the file may show in it."""
    with pytest.raises(DataError) as caught:
        load_federation(settings, seed=0, site=site)
    assert "SECRET" not in f"{caught.value} {caught.value.hint}"
    assert caught.value.hint
    return caught.value


class TestTable:
    """csv and parquet."""

    def test_declared_table(self, tmp_path: Path, register: Register) -> None:
        """Features and classes keep the declared order; features are standardised by the declared constants."""
        write(tmp_path, "own.csv", TABLE)
        site = register(
            "csv:own.csv", label="outcome", features=["rate", "age"], classes=["ill", "well"],
            means=[60.5, 40.0], scales=[2.0, 1.0],
        )  # fmt: skip
        loaded = load_examples("own", settings=OWN, site=site)
        assert loaded.examples.inputs[2].tolist() == [1.0, 2.0]
        assert loaded.examples.targets[:2].tolist() == [1, 0]
        assert loaded.row_ids[:2] == ["p0", "p1"]
        assert loaded.schema.feature_names == ("rate", "age")

    def test_declared_schema_needs_no_file(self, register: Register) -> None:
        """A coordinator that knows the declaration builds the model without any data."""
        site = register("csv:nowhere.csv", label="y", features=["a", "b"], classes=["no", "yes"])
        schema = schema_of(OWN, site=site)
        assert (schema.kind, schema.input_shape, schema.class_names) == ("tabular", (2,), ("no", "yes"))

    def test_undeclared_features_are_all_numeric_columns(self, tmp_path: Path, register: Register) -> None:
        """The label, the group and text are no features; classes are then read from the file."""
        write(tmp_path, "own.csv", TABLE)
        schema = schema_of(OWN, site=register("csv:own.csv", label="outcome", group="ward"))
        assert schema.feature_names == ("age", "rate")
        assert schema.class_names == ("ill", "well")

    def test_whole_number_classes_sort_as_numbers(self, tmp_path: Path, register: Register) -> None:
        """Class 10 comes after class 9."""
        write(tmp_path, "own.csv", "x,label\n" + "\n".join(f"{i},{i}" for i in range(8, 12)))
        assert schema_of(OWN, site=register("csv:own.csv")).class_names == ("8", "9", "10", "11")

    def test_group_column_makes_the_natural_clients(self, tmp_path: Path, register: Register) -> None:
        """Each ward becomes a client, named by its slug."""
        write(tmp_path, "own.csv", TABLE)
        settings = DataSettings(name="own", partition="natural", clients=0)
        found = load_federation(settings, seed=0, site=register("csv:own.csv", label="outcome", group="ward"))
        assert [client.name for client in found.clients] == ["a-ward", "b-ward"]

    def test_without_group_the_site_is_one_client(self, tmp_path: Path, register: Register) -> None:
        """A site that joins a run on a natural partition is one client, named after its data."""
        write(tmp_path, "own.csv", TABLE)
        settings = DataSettings(name="own", partition="natural", clients=0)
        found = load_federation(settings, seed=0, site=register("csv:own.csv", label="outcome"))
        assert [client.name for client in found.clients] == ["own"]

    def test_missing_features_become_the_declared_mean(self, tmp_path: Path, register: Register) -> None:
        """An empty cell is 0 after standardisation."""
        write(tmp_path, "own.csv", "x,label\n5,a\n,b\nNA,b")
        site = register("csv:own.csv", means=[3.0])
        assert load_examples("own", settings=OWN, site=site).examples.inputs.flatten().tolist() == [2, 0, 0]

    def test_rows_without_a_label_are_dropped_in_training_only(self, tmp_path: Path, register: Register) -> None:
        """Prediction keeps every row, with target -1; "NA" is a class like any other."""
        write(tmp_path, "own.csv", "x,label\n1,NA\n2,\n3,b\n4,b")
        site = register("csv:own.csv")
        assert (check_data("own", site=site).kept, check_data("own", site=site).dropped) == (3, {"has no label": 1})
        loaded = load_examples("own", settings=OWN, site=site)
        assert loaded.examples.targets.tolist() == [0, -1, 1, 1]

    def test_parquet_gives_the_same_as_csv(self, tmp_path: Path, register: Register) -> None:
        """Types of the columns make no difference, booleans and whole numbers stored as fractions included."""
        pandas = pytest.importorskip("pandas")
        frame = pandas.DataFrame(
            {"x": [1.5, None, 3.0, 4.0], "flag": [True, False, True, True], "label": [0.0, 1.0, 1, 0]}
        )
        frame.to_parquet(tmp_path / "own.parquet")
        frame.astype({"label": int}).to_csv(tmp_path / "own.csv", index=False)
        a, b = (
            load_examples("own", settings=OWN, site=register(f"{kind}:own.{kind}", classes=["0", "1"]))
            for kind in ("parquet", "csv")
        )
        assert torch.equal(a.examples.inputs, b.examples.inputs)
        assert a.examples.inputs.tolist() == [[1.5, 1], [0, 0], [3, 1], [4, 1]]
        assert torch.equal(a.examples.targets, b.examples.targets)

    def test_new_file_is_read_as_the_registered_one(self, tmp_path: Path, register: Register) -> None:
        """A file on the command line takes features, constants and classes from the data the model was trained on."""
        write(tmp_path, "own.csv", TABLE)
        write(tmp_path, "new.csv", "rate,age,other\n70,50,1")
        site = register("csv:own.csv", label="outcome", means=[40.0, 60.0])
        loaded = load_examples(f"csv:{tmp_path / 'new.csv'}", settings=OWN, site=site)
        assert loaded.examples.inputs.tolist() == [[10, 10]]
        assert loaded.examples.targets.tolist() == [-1]
        assert loaded.schema.class_names == ("ill", "well")

    @pytest.mark.parametrize(
        ("text", "options", "message", "hint"),
        [
            ("x,label", {}, "has no rows", "header"),
            ("x,outcom\n1,2", {"label": "outcome"}, "no column `outcome`", "`outcom`"),
            ("x,label\n1,a", {"features": ["xx"]}, "no column `xx`", "`x`"),
            ("x,label\n1,a", {"group": "ward"}, "no column `ward`", "columns"),
            ("x,label\nSECRET,a", {"features": ["x"]}, "`x` holds 1 values that are not numbers", "features"),
            ("x,label\nSECRET,a", {}, "no numeric column", "features"),
            ("x,label\n1,SECRET\n2,a", {"classes": ["a", "b"]}, "1 labels are none of the 2 declared", "classes"),
            ("x,label\n1,\n2,", {}, "no row has a label", "label"),
            ("x,label\n1,a", {"means": [1.0, 2.0]}, "`means` has 2 numbers for 1 features", "features"),
            ("x,label\n1,a", {"scales": [1.0, 2.0]}, "`scales` has 2 numbers for 1 features", "features"),
            ("x,label\n1,a", {"scales": [0.0]}, "not positive", "divided"),
            ("x,label\n1e39,a\n1,a", {}, "1 values are not finite", "empty"),
            ("x,label\n1,a", {"features": ["x", "label"]}, "both a feature and the label", "once"),
            ("x,label\n1,a", {"classes": ["a", "a"]}, "names a class twice", "once"),
            ("x,label,g\n1,a,A b\n2,a,a-B", {"group": "g"}, "2 groups have only 1 names", "rename"),
            ('x,label\n1,a\n"SECRET', {}, "cannot be read as csv", "UTF-8"),
            ("x,label\n1,a", {}, "1 examples leave nothing", "test_fraction"),
        ],
    )
    def test_refusals(
        self, tmp_path: Path, register: Register, text: str, options: dict[str, object], *, message: str, hint: str
    ) -> None:
        """Each defect is named by file, column and count, with what to do, and without any value."""
        write(tmp_path, "own.csv", text)
        found = error(register("csv:own.csv", **options))
        assert message in str(found)
        assert hint in found.hint

    def test_missing_file(self, register: Register) -> None:
        """The path is named in full, because it starts from the folder of site.toml."""
        assert "nowhere.csv does not exist" in str(error(register("csv:nowhere.csv")))

    def test_a_file_of_another_kind(self, tmp_path: Path, register: Register) -> None:
        """What calls itself parquet and is not is refused."""
        write(tmp_path, "own.parquet", "SECRET")
        assert "cannot be read as parquet" in str(error(register("parquet:own.parquet")))


class TestArrays:
    """npz."""

    def test_bytes_become_scaled_images(self, tmp_path: Path, register: Register) -> None:
        """Grey images gain their channel; bytes are divided by 255 before the public constants apply."""
        images = np.full((4, 8, 8), 255, np.uint8)
        np.savez(tmp_path / "own.npz", inputs=images, label=np.array([0, 1, 2, 0]))
        site = register("npz:own.npz", means=[0.5], scales=[0.25], classes=["a", "b", "c"])
        loaded = load_examples("own", settings=OWN, site=site)
        assert loaded.schema.input_shape == (1, 8, 8)
        assert loaded.examples.inputs.unique().tolist() == [2.0]

    def test_tables_groups_and_undeclared_classes(self, tmp_path: Path, register: Register) -> None:
        """Two axes are a table; without declared classes there are as many as the largest label says."""
        np.savez(
            tmp_path / "own.npz", inputs=np.eye(6), label=np.array([0, 0, 0, 3, 3, 3]), ward=np.array(list("ABABAB"))
        )
        site = register("npz:own.npz", group="ward")
        found = load_federation(DataSettings(name="own", partition="natural", clients=0), seed=0, site=site)
        assert [client.name for client in found.clients] == ["a", "b"]
        assert (found.schema.kind, found.schema.num_classes) == ("tabular", 4)

    def test_pickles_are_never_opened(self, tmp_path: Path, register: Register) -> None:
        """An array of Python objects would run code when read."""
        np.savez(tmp_path / "own.npz", inputs=np.array([{"a": 1}], dtype=object), label=np.array([0]))
        assert "without unpickling" in str(error(register("npz:own.npz")))

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"input": np.eye(2), "label": np.zeros(2, int)}, "no column `inputs`"),
            ({"inputs": np.eye(2)}, "no column `label`"),
            ({"inputs": np.eye(2), "label": np.zeros(3, int)}, "shape (3,) for 2 examples"),
            ({"inputs": np.eye(2), "label": np.array([0, 2])}, "1 labels lie outside 0..1"),
            ({"inputs": np.eye(2), "label": np.array([0.5, 1])}, "is of type float64"),
            ({"inputs": np.zeros(2), "label": np.zeros(2, int)}, "has 1 axes"),
            ({"inputs": np.full((2, 2), np.nan), "label": np.zeros(2, int)}, "not finite"),
            ({"inputs": np.zeros((0, 2)), "label": np.zeros(0, int)}, "has no rows"),
        ],
    )
    def test_refusals(self, tmp_path: Path, register: Register, arrays: dict[str, np.ndarray], message: str) -> None:
        """Arrays that do not fit together are named."""
        np.savez(tmp_path / "own.npz", **arrays)
        assert message in str(error(register("npz:own.npz", classes=["a", "b"])))


class TestImages:
    """A folder a class."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """Two classes of two plain images each."""
        image = pytest.importorskip("PIL.Image")
        for name, shade in (("cat", 0), ("dog", 255)):
            (tmp_path / "own" / name).mkdir(parents=True)
            for i in range(2):
                image.new("RGB", (20, 12), (shade, shade, shade)).save(tmp_path / "own" / name / f"{i}.png")
        return tmp_path / "own"

    def test_images_are_resized_and_scaled(self, folder: Path, register: Register) -> None:
        """The folders' names are the classes, pixels lie in 0..1 before the public constants."""
        site = register("images:own", image_size=16, channels=3, means=[0.5] * 3, scales=[0.5] * 3)
        loaded = load_examples("own", settings=OWN, site=site)
        assert loaded.schema.input_shape == (3, 16, 16)
        assert loaded.schema.class_names == ("cat", "dog")
        assert loaded.examples.targets.tolist() == [0, 0, 1, 1]
        assert loaded.examples.inputs.mean(dim=(1, 2, 3)).tolist() == [-1, -1, 1, 1]
        assert loaded.row_ids[0] == "cat/0.png"

    def test_images_without_folders_can_be_predicted(self, folder: Path, register: Register) -> None:
        """A plain folder of images has no labels."""
        loaded = load_examples(f"images:{folder / 'cat'}", settings=OWN, site=register("images:own"))
        assert loaded.examples.targets.tolist() == [-1, -1]
        fashion = load_examples(f"images:{folder / 'cat'}", settings=DataSettings(), site=Site())
        assert fashion.examples.inputs.shape == (2, 1, 28, 28)
        assert fashion.examples.inputs.unique().tolist() == pytest.approx([-0.3 / 0.35])

    def test_a_damaged_image_is_counted(self, folder: Path, register: Register) -> None:
        """Its name is withheld: files can be named after patients."""
        (folder / "dog" / "SECRET.png").write_bytes(b"no image")
        assert "1 of 5 images cannot be read" in str(error(register("images:own")))

    def test_an_undeclared_folder_is_refused(self, folder: Path, register: Register) -> None:
        """Declared classes are all there are."""
        assert "2 labels are none of" in str(error(register("images:own", classes=["cat", "bird"])))

    def test_an_empty_folder_is_refused(self, tmp_path: Path, register: Register) -> None:
        """No image, no data."""
        (tmp_path / "own").mkdir()
        assert "has no images" in str(error(register("images:own")))


class TestText:
    """Running text, and labelled lines."""

    def test_running_text_predicts_the_next_character(self, tmp_path: Path, register: Register) -> None:
        """Targets are the inputs moved by one; the end of the text is held out."""
        write(tmp_path, "own.txt", "abcdefghij" * 20)
        settings = DataSettings(name="own", clients=1, sequence_length=10)
        found = load_federation(settings, seed=0, site=register("text:own.txt"))
        train = found.clients[0].train
        assert found.schema.per_position
        assert torch.equal(train.inputs[:, 1:], train.targets[:, :-1])
        assert (len(train), len(found.test)) == (16, 3)

    def test_listed_words(self, tmp_path: Path, register: Register) -> None:
        """A public list of words gives ids from 1; 0 is any other word. Its path starts from site.toml's folder."""
        write(tmp_path, "words.txt", "the\ncat")
        write(tmp_path, "own.txt", "The cat sat. The cat sat. The cat")
        site = register("text:own.txt", tokenizer="words", vocabulary="words.txt")
        settings = DataSettings(name="own", clients=1, sequence_length=2, test_fraction=0.4)
        loaded = load_examples("own", settings=settings, site=site)
        assert loaded.schema.vocabulary_size == 3
        assert loaded.examples.inputs[:2].tolist() == [[1, 2], [0, 0]]

    def test_labelled_lines(self, tmp_path: Path, register: Register) -> None:
        """With classes each line is `class<TAB>text`, hashed and padded with 0."""
        write(tmp_path, "own.txt", "good\tsplendid work\n\nbad\tno\nsplendid")
        settings = DataSettings(name="own", clients=1, sequence_length=3)
        site = register("text:own.txt", tokenizer="words", classes=["bad", "good"])
        loaded = load_examples("own", settings=settings, site=site)
        assert loaded.examples.targets.tolist() == [1, 0, -1]
        assert loaded.row_ids == ["1", "3", "4"]
        ids = loaded.examples.inputs.tolist()
        assert ids[0][0] == ids[2][0] > 0
        assert ids[2][1:] == [0, 0]
        assert loaded.schema.vocabulary_size == HASHED_VOCABULARY
        assert check_data("own", site=site).dropped == {"has no label": 1}

    @pytest.mark.parametrize(
        ("text", "options", "message"),
        [
            ("short", {}, "too short for one example"),
            ("some words", {"tokenizer": "words"}, "needs a list of words"),
            ("x", {"tokenizer": "words", "vocabulary": "none.txt"}, "none.txt cannot be read"),
            ("SECRET\ttext", {"classes": ["a"]}, "1 labels are none of"),
            ("no tab", {"classes": ["a"]}, "no labelled lines"),
        ],
    )
    def test_refusals(
        self, tmp_path: Path, register: Register, text: str, options: dict[str, object], message: str
    ) -> None:
        """Text that cannot be used says why."""
        write(tmp_path, "own.txt", text)
        assert message in str(error(register("text:own.txt", **options)))

    def test_other_encodings_are_refused(self, tmp_path: Path, register: Register) -> None:
        """Only UTF-8 is read."""
        (tmp_path / "own.txt").write_bytes("caf\xe9".encode("latin-1"))
        assert "UTF-8" in str(error(register("text:own.txt")))


def test_an_unknown_name_is_refused_with_the_nearest(federate: Callable[..., Federation]) -> None:
    """A misspelt data set is pointed at the right one."""
    with pytest.raises(DataError, match="no data set `hart`") as caught:
        federate(name="hart")
    assert "`heart`" in caught.value.hint


def test_a_source_of_another_shape_is_refused() -> None:
    """A model of patients cannot predict on digits."""
    with pytest.raises(DataError, match="image examples"):
        load_examples("digits", settings=DataSettings(name="heart"), site=Site())


def test_a_sites_own_name_goes_before_a_built_in_one(tmp_path: Path) -> None:
    """A run's configuration names `heart`; a site says which file that means here."""
    write(tmp_path, "own.csv", TABLE)
    site = Site.model_validate({"data": {"heart": {"source": "csv:own.csv", "label": "outcome"}}, "folder": tmp_path})
    assert schema_of(DataSettings(name="heart"), site=site).feature_names == ("age", "rate")
