"""The model card of a checkpoint: what it is, what it learned from, how, and what was measured.

Written here and not by LeRobot's `generate_model_card`, which asks a server to check it: training needs none.
"""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from vega_policy.training.config import TrainConfig
from vega_policy.training.provenance import code_revision, hardware

_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

A vision-language-action policy with the eyes of VEGA-3D ([arXiv 2603.19235](https://arxiv.org/abs/2603.19235)):
a frozen video diffusion model, read in the middle, mixed token by token with a semantic encoder.

| | |
|---|---|
{% for key, value in facts.items() -%}
| {{ key }} | {{ value }} |
{% endfor %}
## Measured

{% if scores -%}
| | |
|---|---|
{% for key, value in scores.items() -%}
| {{ key }} | {{ value }} |
{% endfor -%}
{% else -%}
Nothing was measured while it learned. `python scripts/eval_policy.py checkpoint=... env=...` plays it.
{% endif %}
## Use

```python
from lerobot.policies.factory import make_pre_post_processors
from vega_policy.modeling_vega import VegaPolicy

path = "{{ place }}"
policy = VegaPolicy.from_pretrained(path)
before, after = make_pre_post_processors(policy.config, pretrained_path=path)
policy.reset()  # at the start of every episode
action = after(policy.select_action(before(observation)))
```

`observation` holds {{ inputs }} and `task`, the instruction; frames are float32 `[3 h w]` in [0, 1].

The prior's weights are not in here: they come from their own source, and others than those of the
fingerprint above are refused.
"""

_SCORES = {
    "held_out_loss": "loss on held-out episodes",
    "held_out_action_error": "mean absolute action error on held-out episodes, in the dataset's units",
    "success": "closed-loop success while training",
    "episodes": "episodes of that",
}


def model_card(config: TrainConfig, step: int, scores: Mapping[str, float], data: str) -> ModelCard:
    """The card of the checkpoint after some step.

    Args:
        config: The run.
        step: Steps made.
        scores: What was measured after that step.
        data: The dataset in a few words.
    """
    policy = config.vega
    header = ModelCardData(
        license="apache-2.0",
        library_name="lerobot",
        pipeline_tag="robotics",
        tags=["lerobot", "robotics", "vega"],
        datasets=[config.dataset.repo_id],
        model_name="vega",
    )
    measured = {_SCORES[name]: f"{value:.4g}" for name, value in scores.items() if name in _SCORES}
    return ModelCard.from_template(
        header,
        template_str=_TEMPLATE,
        name=policy.repo_id or "vega",
        place=policy.repo_id or "FOLDER/pretrained_model",
        inputs=", ".join(f"`{key}`" for key in policy.input_features or ()),
        facts=_facts(config, step, data),
        scores=measured,
    )


def _facts(config: TrainConfig, step: int, data: str) -> dict[str, Any]:
    policy, machine, code = config.vega, hardware(), code_revision()
    prior = policy.prior
    changed = ", with changed files" if code["changed"] else ""
    return {
        "dataset": data,
        "cameras": ", ".join(policy.image_features),
        "prior": f"{prior.name}, layer {prior.layer}, noise level {prior.noise_level}, "
        f"fingerprint {prior.fingerprint}",
        "fusion": policy.fusion.name,
        "backbone": policy.backbone.name,
        "action expert": policy.expert.name,
        "steps": f"{step} of {config.steps}, seed {config.seed}",
        "batch": f"{config.batch_size} a process, {config.accumulate} accumulated",
        "learning rate": policy.optimizer_lr,
        "code": f"{code['revision']}{changed}",
        "hardware": ", ".join(machine["gpus"]) or f"{machine['processor']}, {machine['cores']} cores",
    }
