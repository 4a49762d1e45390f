import pytest

import vega_policy
from vega_policy import resource


def test_configs_of_the_repository_are_found_in_an_editable_install():
    assert (resource("configs") / "train.yaml").is_file()


def test_configs_inside_the_package_come_first_as_in_a_wheel(tmp_path, monkeypatch):
    packaged = tmp_path / "vega_policy" / "configs"
    packaged.mkdir(parents=True)
    (tmp_path / "configs").mkdir()
    monkeypatch.setattr(vega_policy, "PACKAGE", tmp_path / "vega_policy")
    assert resource("configs") == packaged


def test_a_missing_folder_names_both_places(tmp_path, monkeypatch):
    monkeypatch.setattr(vega_policy, "PACKAGE", tmp_path / "vega_policy")
    with pytest.raises(FileNotFoundError, match=r"no folder assets in .*vega_policy or "):
        resource("assets")
