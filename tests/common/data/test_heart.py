"""The heart data: four hospitals, mended and encoded with public constants."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from common.config.settings import DataSettings
from common.data import LoadedExamples, load_examples, schema_of
from common.data.builtin import heart
from common.data.pinned import FILES
from common.errors import DataError
from common.schema import Federation
from common.site import Site

RUN = DataSettings(name="heart", partition="natural", clients=0)
HEADER = "id,age,sex,dataset,cp,trestbps,chol,fbs,restecg,thalch,exang,oldpeak,slope,ca,thal,num"


def feature(loaded: LoadedExamples, name: str) -> torch.Tensor:
    return loaded.examples.inputs[:, loaded.schema.feature_names.index(name)]


def patients(path: Path, *lines: str, header: str = HEADER) -> str:
    """A csv of patients, as a source."""
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return f"csv:{path}"


class TestDefects:
    """What the published file gets wrong."""

    def test_two_repeated_patients_are_dropped(self) -> None:
        """920 rows make 918 patients."""
        found = heart.load()
        assert (found.rows, len(found.examples), sum(found.dropped.values())) == (920, 918, 2)

    def test_row_304_is_a_patient_of_hungary(self) -> None:
        """It is labelled Cleveland in the file."""
        found = heart.load()
        assert found.group_of is not None
        assert found.groups[found.group_of[list(found.row_ids).index("304")]] == "hungary"

    def test_zero_cholesterol_and_pressure_mean_not_measured(self) -> None:
        """172 zeros and 30 empty cells (one in a repeated row) are missing cholesterol, all of Switzerland's."""
        found = heart.load()
        assert found.missing["chol"] == 201
        assert found.missing["trestbps"] == 60
        assert found.group_of is not None
        column = heart.SCHEMA.feature_names.index("chol-missing")
        assert found.examples.inputs[found.group_of == found.groups.index("switzerland"), column].all()

    def test_a_damaged_file_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """One changed byte is noticed, and the hint says to reinstall."""
        content = bytearray((FILES / "heart_disease_uci.csv").read_bytes())
        content[-10] ^= 1
        (tmp_path / "heart_disease_uci.csv").write_bytes(content)
        monkeypatch.setattr("common.data.pinned.FILES", tmp_path)
        with pytest.raises(DataError, match="damaged") as caught:
            heart.load()
        assert "reinstall" in caught.value.hint


class TestEncoding:
    """How a patient becomes 18 numbers."""

    def test_schema_is_known_without_reading(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """A coordinator without the file can build the model."""
        monkeypatch.setattr("common.data.pinned.FILES", tmp_path)
        schema = schema_of(RUN, site=Site())
        assert (schema.input_shape, schema.num_classes, len(schema.feature_names)) == ((18,), 2, 18)

    def test_constants_are_round_and_not_the_datas_own(self) -> None:
        """Standardised columns are near, but not at, mean 0: nothing was computed from the patients."""
        inputs = heart.load().examples.inputs[:, :5]
        assert all(float(v).is_integer() for pair in heart.STANDARD.values() for v in pair)
        assert inputs.mean(0).abs().max() < 0.5
        assert inputs.mean(0).abs().min() > 1e-3

    def test_a_patient_is_encoded_by_the_public_rule(self, tmp_path: Path) -> None:
        """One row worked by hand."""
        line = "7,65,Male,X,non-anginal,150,,TRUE,normal,115,FALSE,3,,,,2"
        loaded = load_examples(patients(tmp_path / "p.csv", line), settings=RUN, site=Site())
        expected = [1, 1, 0, -1, 2, 1, 1, 0, 0, 0, 1, 0, 1, 0, 0, 1, 0, 0]
        assert loaded.examples.inputs.tolist() == [expected]
        assert loaded.examples.targets.tolist() == [1]
        assert loaded.row_ids == ["7"]

    def test_everything_missing_is_still_encoded(self, tmp_path: Path) -> None:
        """A patient without any measurement is all zeros but for the indicators."""
        loaded = load_examples(patients(tmp_path / "p.csv", "9,,,,,,,,,,,,,,,"), settings=RUN, site=Site())
        assert loaded.examples.inputs.tolist() == [[0.0] * 15 + [1.0] * 3]
        assert loaded.examples.targets.tolist() == [-1]


class TestNewPatients:
    """Files in the published layout."""

    def test_the_published_file_is_encoded_as_in_training(self, federate: Callable[..., Federation]) -> None:
        """What a model sees in prediction is what it saw in training, row for row."""
        trained = heart.load()
        loaded = load_examples(f"csv:{FILES / 'heart_disease_uci.csv'}", settings=RUN, site=Site())
        places = [loaded.row_ids.index(row_id) for row_id in trained.row_ids]
        assert len(loaded.row_ids) == 920
        assert torch.equal(loaded.examples.inputs[places], trained.examples.inputs)
        assert torch.equal(loaded.examples.targets[places], trained.examples.targets)

    def test_labels_ids_and_other_columns_may_be_absent(self, tmp_path: Path) -> None:
        """Only the used columns are needed; rows are then numbered from 1."""
        header = ",".join(heart.COLUMNS)
        source = patients(tmp_path / "p.csv", *["55,130,230,140,1,male,false,0,asymptomatic,normal"] * 2, header=header)
        loaded = load_examples(source, settings=RUN, site=Site())
        assert loaded.examples.targets.tolist() == [-1, -1]
        assert loaded.row_ids == ["1", "2"]
        assert feature(loaded, "sex").tolist() == [1, 1]

    def test_parquet_gives_the_same_as_csv(self, tmp_path: Path) -> None:
        """Typed columns are read like the text of a csv."""
        pandas = pytest.importorskip("pandas")
        frame = pandas.read_csv(FILES / "heart_disease_uci.csv")
        frame.to_parquet(tmp_path / "p.parquet")
        a = load_examples(f"parquet:{tmp_path / 'p.parquet'}", settings=RUN, site=Site())
        b = load_examples(f"csv:{FILES / 'heart_disease_uci.csv'}", settings=RUN, site=Site())
        assert torch.equal(a.examples.inputs, b.examples.inputs)
        assert a.row_ids == b.row_ids

    def test_a_missing_column_names_the_nearest(self, tmp_path: Path) -> None:
        """`thalach`, as other copies of the data write it, is pointed at."""
        source = patients(tmp_path / "p.csv", "1", header=HEADER.replace("thalch", "thalach"))
        with pytest.raises(DataError, match="no column `thalch`") as caught:
            load_examples(source, settings=RUN, site=Site())
        assert "`thalach`" in caught.value.hint

    @pytest.mark.parametrize(
        ("column", "value"),
        [("age", "SECRET"), ("chol", "inf"), ("cp", "SECRET"), ("sex", "SECRET"), ("num", "SECRET")],
    )
    def test_a_bad_cell_is_counted_and_never_quoted(self, tmp_path: Path, column: str, value: str) -> None:
        """A cell may be a patient's name: the message has the column and a count."""
        cells = dict.fromkeys(HEADER.split(","), "") | {column: value}
        source = patients(tmp_path / "p.csv", ",".join(cells.values()))
        with pytest.raises(DataError, match=f"column `{column}` holds 1 values") as caught:
            load_examples(source, settings=RUN, site=Site())
        assert value not in str(caught.value) + caught.value.hint

    def test_other_formats_are_refused(self, tmp_path: Path) -> None:
        """Images do not fit a model of patients."""
        with pytest.raises(DataError, match="takes no images file") as caught:
            load_examples(f"images:{tmp_path}", settings=RUN, site=Site())
        assert "csv:PATH" in caught.value.hint


def test_a_linear_model_reaches_its_known_accuracy(federate: Callable[..., Federation]) -> None:
    """Pooled logistic regression over ten folds measures about 0.81 (AUC 0.89); well below means a broken encoding."""
    linear = pytest.importorskip("sklearn.linear_model")
    metrics = pytest.importorskip("sklearn.metrics")
    accuracies, scores, targets = [], [], []
    for fold in range(10):
        (client,) = federate(name="heart", partition="natural", clients=0, folds=10, fold=fold, pooled=True).clients
        model = linear.LogisticRegression(max_iter=1000).fit(client.train.inputs, client.train.targets)
        score = model.predict_proba(client.test.inputs)[:, 1]
        accuracies.append(((score > 0.5) == client.test.targets.numpy()).mean())
        scores.extend(score)
        targets.extend(client.test.targets.tolist())
    assert np.mean(accuracies) >= 0.795
    assert metrics.roc_auc_score(targets, scores) >= 0.86
