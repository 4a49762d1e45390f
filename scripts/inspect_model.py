"""What a policy consists of, without any weights: `python scripts/inspect_model.py experiment=libero_wan`.

Prints parameters (trainable, frozen), memory, tokens and arithmetic of each part, as far as it is kept, and
the published sizes of the prior's whole networks. The data's sizes are those of LIBERO (two cameras, 8
numbers of state, 7 of action); `+views=1 +state_dim=6 +action_dim=6` gives others.
"""

import sys

import hydra
from omegaconf import DictConfig, OmegaConf, open_dict

from vega_policy.cli.overrides import refuse_unknown_options

SIZES = {"views": 2, "state_dim": 8, "action_dim": 7}


@hydra.main(version_base=None, config_path="../configs", config_name="train")
def main(config: DictConfig) -> None:
    """Print the table of one policy; a user's mistake ends in one message."""
    from vega_policy.backbones.sizes import inspect_model, refuse_base
    from vega_policy.benchmarks.timing import table  # heavy imports, not needed for --help
    from vega_policy.model.config import ModelConfig
    from vega_policy.priors.sizes import published_sizes
    from vega_policy.training.config import from_hydra

    with open_dict(config):
        sizes = {name: config.pop(name, usual) for name, usual in SIZES.items()}
        if OmegaConf.is_missing(config.dataset, "repo_id"):
            config.dataset.repo_id = "none"
    try:
        policy = from_hydra(config).vega
        refuse_base(policy.base)
        parts = {name: getattr(policy, name) for name in ("prior", "fusion", "backbone", "head")}
        model = ModelConfig(**sizes, chunk_size=policy.chunk_size, frame_size=policy.frame_size, **parts)
        rows = [part.row() for part in inspect_model(model)]
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(", ".join(f"{name} {size}" for name, size in (sizes | {"frame_size": policy.frame_size}).items()))
    print(table(rows))
    sizes_of_prior = ", ".join(
        f"{part} {size:,}" for part, size in published_sizes(policy.prior.name).items()
    )
    if sizes_of_prior:
        print(f"prior {policy.prior.name}, published: {sizes_of_prior}")


if __name__ == "__main__":
    refuse_unknown_options()
    main()
