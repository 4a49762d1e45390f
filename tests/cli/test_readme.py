"""The Python example of README runs as it stands."""

import re
from pathlib import Path

import numpy as np

from tests.training_runs import tiny_run
from vega_policy.training.train import train

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO = "outputs/demo/train/checkpoints/last/pretrained_model"


def test_the_example_counts_successes_of_ten_episodes(root, tmp_path, capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    assert snippet.count(DEMO) == 1
    checkpoint = train(tiny_run(root, tmp_path / "run", steps=2))
    left: dict = {}
    shortened = snippet.replace(DEMO, str(checkpoint / "pretrained_model")).replace("1_000_010", "1_000_001")
    assert shortened.count("1_000_001") == 1
    exec(shortened, left)
    assert capsys.readouterr().out.splitlines()[-1] == f"{int(left['terminated'])} of 10 episodes succeed"
    assert left["action"].shape == (1, 7)
    assert np.isfinite(left["action"].numpy()).all()
    left["env"].close()
