"""Where entities come from: a column, an array, or code of one's own; what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from common.config.settings import DataSettings
from common.data import check_data, load_examples, load_federation, schema_of
from common.schema import Examples, Federation
from common.site import Site
from tests.common.data.test_own_data import Register, error, write

VISITS = "visit,patient,age,ward,outcome\n" + "\n".join(
    f"{i},p{i // 3},{40 + i},{'ab'[i // 15]},{('well', 'ill')[i % 2]}" for i in range(30)
)
"""Ten patients of three visits each; five in each ward."""


def places(examples: Examples) -> list[int]:
    return examples.inputs[:, 0].long().tolist()


class TestFiles:
    """The key `entity` of site.toml."""

    @pytest.fixture
    def site(self, tmp_path: Path, register: Register) -> Callable[..., Site]:
        """Ten patients of three visits, as csv or parquet."""

        def make(kind: str = "csv", **options: object) -> Site:
            write(tmp_path, "own.csv", VISITS)
            if kind == "parquet":
                pandas = pytest.importorskip("pandas")
                pandas.read_csv(tmp_path / "own.csv").to_parquet(tmp_path / "own.parquet")
            return register(f"{kind}:own.{kind}", label="outcome", entity="patient", **options)

        return make

    @pytest.mark.parametrize("kind", ["csv", "parquet"])
    def test_a_tables_column(self, site: Callable[..., Site], kind: str) -> None:
        """Rows of one patient have one number, and go together."""
        found = load_federation(DataSettings(name="own", partition="iid", clients=3), seed=0, site=site(kind))
        for part in (found.test, *(client.train for client in found.clients)):
            assert set(torch.bincount(part.entities).tolist()) <= {0, 3}

    @pytest.mark.parametrize("kind", ["csv", "parquet"])
    def test_the_column_is_no_feature(self, tmp_path: Path, register: Register, kind: str) -> None:
        """A number of a patient is no measurement, also where all numeric columns are taken and in prediction."""
        pandas = pytest.importorskip("pandas")
        frame = pandas.DataFrame({"patient": [i // 2 for i in range(8)], "age": range(40, 48), "label": [0, 1] * 4})
        getattr(frame, f"to_{kind}")(tmp_path / f"own.{kind}", index=False)
        site = register(f"{kind}:own.{kind}", entity="patient")
        settings = DataSettings(name="own")
        assert schema_of(settings, site=site).feature_names == ("age",)
        assert load_examples("own", settings=settings, site=site).examples.inputs[:, 0].tolist() == list(range(40, 48))

    def test_prediction_needs_no_entity(self, tmp_path: Path, site: Callable[..., Site]) -> None:
        """A file of new patients may lack the column, and no row is dropped."""
        write(tmp_path, "new.csv", "visit,age\n1,50\n2,60")
        loaded = load_examples(f"csv:{tmp_path / 'new.csv'}", settings=DataSettings(name="own"), site=site())
        assert (len(loaded.examples), loaded.examples.entities) == (2, None)

    def test_prediction_from_another_format(self, tmp_path: Path, register: Register) -> None:
        """An image folder has no entities, and needs none to be predicted on."""
        image = pytest.importorskip("PIL.Image")
        (tmp_path / "new").mkdir()
        image.new("L", (8, 8)).save(tmp_path / "new" / "0.png")
        np.savez(tmp_path / "own.npz", inputs=np.zeros((4, 8, 8)), label=[0, 1, 0, 1], who=[0, 0, 1, 1])
        site = register("npz:own.npz", entity="who", classes=["a", "b"], image_size=8)
        settings = DataSettings(name="own")
        assert len(load_examples(f"images:{tmp_path / 'new'}", settings=settings, site=site).examples) == 1

    @pytest.mark.parametrize("kind", ["csv", "parquet"])
    def test_rows_of_unknown_entities_are_dropped(self, tmp_path: Path, register: Register, kind: str) -> None:
        """A row that could be anybody's is not taken for an entity of its own; how many there were is told."""
        pandas = pytest.importorskip("pandas")
        who = ["a", None, "NA", " ", "-1", "a", "b", "a"]
        frame = pandas.DataFrame({"x": range(8), "who": who, "label": ["n", "y", "n", "y", "n", "y", None, "n"]})
        getattr(frame, f"to_{kind}")(tmp_path / f"own.{kind}", index=False)
        report = check_data("own", site=register(f"{kind}:own.{kind}", entity="who"))
        assert (report.rows, report.kept) == (8, 3)
        assert report.dropped == {"has no label": 1, "has no entity": 4}
        assert (report.entities, report.largest_entity) == (1, 3)

    def test_names_are_read_as_they_are_written(self, tmp_path: Path, register: Register) -> None:
        """Leading zeros and digits beyond a float's count: none of these is another's."""
        names = ["7", "007", "9007199254740993", "9007199254740992", "7.0"]
        write(tmp_path, "own.csv", "x,who,label\n" + "\n".join(f"{i},{n},{i % 2}" for i, n in enumerate(names)))
        report = check_data("own", site=register("csv:own.csv", entity="who"))
        assert (report.entities, report.largest_entity) == (4, 2)

    @pytest.mark.parametrize(
        "who", [["a", "b", "a", "", "NA", "b"], np.array([5, 9, 5, -1, -7, 9]), np.array([5, 9, 5, -1, -1, 9], np.int8)]
    )
    def test_an_array(self, tmp_path: Path, register: Register, who: object) -> None:
        """Strings or whole numbers; inputs, labels, groups and names of what is kept stay together."""
        np.savez(
            tmp_path / "own.npz", inputs=np.arange(6.0)[:, None], label=[0, 1, 1, 2, 0, 1], who=who, ward=[*"XYXYXY"]
        )
        site = register("npz:own.npz", entity="who", group="ward")
        settings = DataSettings(name="own", partition="iid", clients=1, test_fraction=0.5)
        found = load_federation(settings, seed=0, site=site)
        parts = sorted((places(p), p.targets.tolist()) for p in (found.test, found.clients[0].train))
        assert parts == [([0, 2], [0, 1]), ([1, 5], [1, 1])]
        report = check_data("own", site=site)
        assert (report.rows, report.kept, report.dropped) == (6, 4, {"has no entity": 2})
        assert (report.entities, report.largest_entity, dict(report.groups)) == (2, 2, {"x": 2, "y": 2})

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({}, "no column `who`"),
            ({"who": np.zeros(3, int)}, "shape (3,) for 2 examples"),
            ({"who": np.array([0.5, 1])}, "is of type float64"),
            ({"who": np.array([b"SECRET", b"b"])}, "is of type |S6"),
            ({"who": np.array(["", "?"])}, "no row has an entity"),
        ],
    )
    def test_arrays_that_do_not_fit_are_refused(
        self, tmp_path: Path, register: Register, arrays: dict[str, np.ndarray], message: str
    ) -> None:
        """As a label or a group that does not fit is."""
        np.savez(tmp_path / "own.npz", inputs=np.eye(2), label=np.zeros(2, int), **arrays)
        assert message in str(error(register("npz:own.npz", entity="who")))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("x,label\n1,a", "no column `who`"),
            ("x,who,label\n1,,a\n2,?,b", "no row has an entity"),
            ("x,who,label\n1,p,\n2,q,", "no row has a label"),
        ],
    )
    def test_tables_that_do_not_fit_are_refused(
        self, tmp_path: Path, register: Register, text: str, message: str
    ) -> None:
        """A column that is not there, or says nothing, is not passed over: epsilon would be told per entity."""
        write(tmp_path, "own.csv", text)
        assert message in str(error(register("csv:own.csv", entity="who")))

    def test_data_that_come_with_coterie_have_none(self, federate: Callable[..., Federation]) -> None:
        """Every row of theirs stands alone."""
        for name in ("heart", "shakespeare"):
            found = federate(name=name, partition="natural", clients=0)
            assert {part.entities for c in found.clients for part in (c.train, c.test)} | {found.test.entities} == {
                None
            }
        report = check_data("heart", site=Site())
        assert (report.entities, report.largest_entity) == (0, 0)


OWN_CODE = """
import torch
from common.schema import ClientData, DataSchema, Examples, Federation

def part(*entities, **fields):
    n = len(entities)
    return Examples(**{"inputs": torch.zeros(n, 1), "targets": torch.zeros(n, dtype=torch.int64),
                       "entities": torch.tensor(entities, dtype=torch.int64), **fields})

def make(one, two, held, own=None):
    own = held if own is None else own
    clients = (ClientData(name="one", train=one, test=own), ClientData(name="two", train=two, test=own))
    return Federation(schema=DataSchema(kind="tabular", input_shape=(1,), num_classes=2), clients=clients, test=held)

def sound(settings, seed): return make(part(1, 1, 2**62), part(4, 5), part(3, 3))
def nothing_held(settings, seed): return make(part(1, 1), part(4, 5), part(entities=None))
def shared(settings, seed): return make(part(1, 1, 2), part(2, 1), part(3))
def leaked(settings, seed): return make(part(1, 1), part(2), part(3, 2), own=part(3))
def leaked_to_a_client(settings, seed): return make(part(1, 1), part(2), part(3), own=part(3, 2, 1))
def some(settings, seed): return make(part(1, 1), part(2), part(0, entities=None))
def negative(settings, seed): return make(part(1, -1, -1), part(2), part(3))
def short(settings, seed): return make(part(1, 1, entities=torch.tensor([1])), part(2), part(3))
def floats(settings, seed): return make(part(1, 1, entities=torch.zeros(2)), part(2), part(3))
"""


class TestOwnCode:
    """Entities that a site's own function sets."""

    def test_they_are_carried_through(self, tmp_path: Path, register: Register) -> None:
        """To the clients, into the pool, and into the counts."""
        write(tmp_path, "mine.py", OWN_CODE)
        site = register("python:mine.py:sound")
        found = load_federation(DataSettings(name="own"), seed=0, site=site)
        assert [client.train.entities.tolist() for client in found.clients] == [[1, 1, 2**62], [4, 5]]
        pooled = load_federation(DataSettings(name="own", pooled=True), seed=0, site=site).clients[0]
        assert pooled.train.entities.tolist() == [1, 1, 2**62, 4, 5]
        report = check_data("own", site=site)
        assert (report.entities, report.largest_entity, report.kept) == (5, 2, 7)
        assert len(load_examples("own", settings=DataSettings(name="own"), site=site).examples.entities) == 7

    def test_an_empty_part_needs_none(self, tmp_path: Path, register: Register) -> None:
        """Nobody is in it."""
        write(tmp_path, "mine.py", OWN_CODE)
        settings = DataSettings(name="own", pooled=True)
        found = load_federation(settings, seed=0, site=register("python:mine.py:nothing_held"))
        assert found.clients[0].train.entities.tolist() == [1, 1, 4, 5]

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            ("shared", "2 entities are trained on by more than one client"),
            ("leaked", "1 entities are both trained on and held out"),
            ("leaked_to_a_client", "2 entities are both trained on and held out"),
            ("some", "some parts have entities and some have none"),
            ("negative", "2 entities are negative"),
            ("short", "entities are torch.int64[1]"),
            ("floats", "entities are torch.float32[2]"),
        ],
    )
    def test_refusals(self, tmp_path: Path, register: Register, function: str, message: str) -> None:
        """Numbers that do not fit, or that divide an entity, are refused before anything trains on them."""
        write(tmp_path, "mine.py", OWN_CODE)
        assert message in str(error(register(f"python:mine.py:{function}"), DataSettings(name="own")))
