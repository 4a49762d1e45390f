"""What README shows as Python runs as it stands."""

import re
from pathlib import Path

import numpy as np

from tests.training_runs import tiny_run
from vega_policy.training.train import train

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO = "outputs/demo/train/checkpoints/last/pretrained_model"


def test_the_snippet_plays_an_episode(root, tmp_path, capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    assert snippet.count(DEMO) == 1
    checkpoint = train(tiny_run(root, tmp_path / "run", steps=2))
    left: dict = {}
    exec(snippet.replace(DEMO, str(checkpoint / "pretrained_model")), left)
    assert left["success"] or left["cut"]
    assert capsys.readouterr().out.strip().endswith("success" if left["success"] else "failure")
    assert left["action"].shape == (1, 7)
    assert np.isfinite(left["action"].numpy()).all()
    left["world"].close()
