"""Pre-training without Hydra: `python -m vega_policy.pretraining RUN.yaml [FIELD=VALUE ...]`.

RUN.yaml is what `python scripts/pretrain_prior.py --cfg job --resolve > RUN.yaml` prints; a field is named by
its path, such as `vae.learning.steps=100` or `stages=[vae]`.
"""

import sys
from pathlib import Path

import yaml

from vega_policy.pretraining.config import decode
from vega_policy.pretraining.pretrain import pretrain


def main() -> None:
    """Run, and say whether it is finished; a user's mistake ends in one message."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    values = yaml.safe_load(Path(sys.argv[1]).read_text())
    for override in sys.argv[2:]:
        path, equals, value = override.partition("=")
        if not equals:
            sys.exit(f"expected FIELD=VALUE, got {override!r}")
        *parents, name = path.split(".")
        node = values
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = yaml.safe_load(value)
    try:
        folder = pretrain(decode(values))
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    sys.stdout.write(f"weights: {folder}\n" if folder else "time is up: run the same command again\n")


if __name__ == "__main__":
    main()
