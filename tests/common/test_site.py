"""`site.toml`, the registry that never travels."""

import pytest

from common.errors import SiteError
from common.site import Site, load_site

WRONG = {
    "not TOML": "[data",
    "unknown table": "[modles.x]\nsource = 'a.py:f'\n",
    "unknown key": "[data.icu]\nsource = 'csv:a.csv'\nlable = 'y'\n",
    "no source": "[data.icu]\nlabel = 'y'\n",
    "unknown format": "[data.icu]\nsource = 'xlsx:a.xlsx'\n",
    "no path": "[data.icu]\nsource = 'csv:'\n",
    "empty builder": "[models.x]\nsource = ''\n",
    "colour": "[data.icu]\nsource = 'images:x'\nchannels = 2\n",
    "own folder": "folder = '/'\n",
    "entity of images": "[data.icu]\nsource = 'images:x'\nentity = 'who'\n",
    "entity of text": "[data.icu]\nsource = 'text:x.txt'\nentity = 'who'\n",
    "entity of code": "[data.icu]\nsource = 'python:x.py:f'\nentity = 'who'\n",
    "entity is the label": "[data.icu]\nsource = 'csv:x.csv'\nlabel = 'who'\nentity = 'who'\n",
    "entity is a feature": "[data.icu]\nsource = 'csv:x.csv'\nfeatures = ['who']\nentity = 'who'\n",
    "entity is the input": "[data.icu]\nsource = 'npz:x.npz'\ninputs = 'who'\nentity = 'who'\n",
}


def test_without_a_file_the_registry_is_empty():
    """A party without own models and data needs none."""
    assert load_site(None) == Site()


def test_names_sources_and_folder_are_read(tmp_path):
    """Relative paths start from the file's folder, wherever the command runs."""
    path = tmp_path / "site.toml"
    path.write_text("[models.net]\nsource = 'n.py:build'\n[data.icu]\nsource = 'csv:icu.csv'\nfeatures = ['age']\n")
    site = load_site(path)
    assert site.models["net"].source == "n.py:build"
    assert (site.data["icu"].source, site.data["icu"].features) == ("csv:icu.csv", ["age"])
    assert site.folder == tmp_path


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG)
def test_a_wrong_registry_is_refused_by_the_file_s_name(tmp_path, text):
    """With a hint; nothing in it is skipped."""
    path = tmp_path / "site.toml"
    path.write_text(text)
    with pytest.raises(SiteError, match=r"site\.toml") as caught:
        load_site(path)
    assert caught.value.hint


def test_an_entity_that_cannot_be_read_says_which_formats_can(tmp_path):
    """Nobody is left to believe that a patient is protected where a row is."""
    path = tmp_path / "site.toml"
    path.write_text(WRONG["entity of text"])
    with pytest.raises(SiteError, match=r"`data\.icu\.entity`: is for csv, parquet and npz"):
        load_site(path)


def test_a_missing_registry_is_refused(tmp_path):
    """Somebody who names a file means it."""
    with pytest.raises(SiteError, match="cannot be read"):
        load_site(tmp_path / "none.toml")


def test_the_folder_never_leaves_the_machine(tmp_path):
    """It is not part of what a registry is written as."""
    (tmp_path / "site.toml").write_text("")
    assert str(tmp_path) not in load_site(tmp_path / "site.toml").model_dump_json()
