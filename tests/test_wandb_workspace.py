"""The laid-out dashboard: it shows what runs log; without package or account it says what to do."""

import sys

import pytest

from bimamba.loggers import SECTIONS as LOGGED
from bimamba.wandb_workspace import SECTIONS, main, workspace


def test_sections_are_those_of_the_logger_and_their_keys_too():
    assert set(SECTIONS) == set(LOGGED)
    keys = [key for panels in SECTIONS.values() for _, _, shown in panels for key in shown]
    assert all(key.split("/")[0] in LOGGED for key in keys) and len(keys) == len(set(keys))


@pytest.mark.parametrize("project", ["bimamba", "/x", "x/", "a/b/c"])
def test_a_malformed_project(project):
    with pytest.raises(SystemExit, match="error: expected ENTITY/PROJECT, got"):
        main([project])


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(SystemExit, match="pip install wandb-workspaces"):
        main(["lab/bimamba"])


def test_the_view_has_every_panel():
    pytest.importorskip("wandb_workspaces")
    view = workspace("lab", "bimamba", "BiMamba")
    assert [s.name for s in view.sections] == list(SECTIONS)
    assert [len(s.panels) for s in view.sections] == [len(panels) for panels in SECTIONS.values()]
    view._to_model()  # what would be sent


def test_without_an_account(monkeypatch, tmp_path):
    pytest.importorskip("wandb_workspaces")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SystemExit, match="wandb login"):
        main(["lab/bimamba"])
