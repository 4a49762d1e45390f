import pytest

from vega_policy import resources


def test_configs_of_the_repository_are_found_in_an_editable_install():
    assert (resources.resource("configs") / "train.yaml").is_file()


def test_configs_inside_the_package_come_first_as_in_a_wheel(tmp_path, monkeypatch):
    packaged = tmp_path / "vega_policy" / "configs"
    packaged.mkdir(parents=True)
    (tmp_path / "configs").mkdir()
    monkeypatch.setattr(resources, "PACKAGE", tmp_path / "vega_policy")
    assert resources.resource("configs") == packaged


def test_a_missing_folder_names_both_places(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "PACKAGE", tmp_path / "vega_policy")
    with pytest.raises(FileNotFoundError, match=r"vega_policy/assets nor in .*/assets"):
        resources.resource("assets")
