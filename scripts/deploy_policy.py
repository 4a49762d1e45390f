"""Control a robot: `python scripts/deploy_policy.py checkpoint=... robot=vega_sim task="lift it"`."""

from vega_policy.cli.deploy import main

if __name__ == "__main__":
    main()
