"""List parameters, memory and FLOPs of a policy: `python scripts/inspect_model.py experiment=libero_wan`.

No weights are needed. The data's sizes are those of LIBERO; `+views=1 +state_dim=6` sets others.
"""

from omegaconf import DictConfig, OmegaConf, open_dict

from vega_policy.cli.app import Command

SIZES = {"views": 2, "state_dim": 8, "action_dim": 7}


def run(config: DictConfig) -> str:
    """Return the table of one policy."""
    from vega_policy.backbones.sizes import inspect_model, refuse_base
    from vega_policy.benchmarks.timing import table
    from vega_policy.model.config import ModelConfig
    from vega_policy.priors.sizes import published_sizes
    from vega_policy.training.config import from_hydra

    with open_dict(config):
        sizes = {name: config.pop(name, usual) for name, usual in SIZES.items()}
        if OmegaConf.is_missing(config.dataset, "repo_id"):
            config.dataset.repo_id = "none"
    policy = from_hydra(config).vega
    refuse_base(policy.base)
    parts = {name: getattr(policy, name) for name in ("prior", "fusion", "backbone", "head")}
    model = ModelConfig(**sizes, chunk_size=policy.chunk_size, frame_size=policy.frame_size, **parts)
    sizes["frame_size"] = policy.frame_size
    lines = [", ".join(f"{name} {size}" for name, size in sizes.items())]
    lines.append(table([part.row() for part in inspect_model(model)]))
    published = published_sizes(policy.prior.name)
    if published:
        whole = ", ".join(f"{part} {size:,}" for part, size in published.items())
        lines.append(f"prior {policy.prior.name}, published: {whole}")
    return "\n".join(lines)


main = Command(
    config="train",
    run=run,
    summary="List parameters, memory, tokens and FLOPs of each part of a policy; no weights are needed.",
    examples=["python scripts/inspect_model.py experiment=libero_wan +views=1"],
).main

if __name__ == "__main__":
    main()
