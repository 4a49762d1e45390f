"""Control a robot: `python scripts/deploy_policy.py checkpoint=... robot=vega_sim task="lift it"`."""

from vega_policy.cli.commands import deploy

if __name__ == "__main__":
    deploy.main()
