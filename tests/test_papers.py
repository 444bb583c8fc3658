"""The papers at the top of the tree say what the tree has."""
import re
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parents[1]
settings = ConfigParser(delimiters=["="])
settings.read(ROOT / "settings.ini")


def test_each_shipped_data_set_has_its_origin_and_licence():
    folders = {p.name for p in (ROOT / "data").iterdir() if p.is_dir()}
    assert folders == set(re.findall(r"^data/(\w+)", (ROOT / "NOTICE").read_text(), re.M))
    for folder in folders - {"longer", "pilot", "records", "registration", "withdrawn"}:  # written by the project itself
        source = (ROOT / "data" / folder / "SOURCE.md").read_text()
        assert "Origin" in source and re.search("Licence|Terms|LICENSE", source), folder


def test_what_is_cited_is_this_version():
    version = settings["DEFAULT"]["version"]
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {version}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_files_that_contributors_are_sent_to_are_there():
    said = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"\b(?:nbs|tests|\.ci|data)/[\w./]*\w", said)
    assert len(named) > 8 and not [name for name in named if not (ROOT / name).exists()]
