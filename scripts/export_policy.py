"""Write a policy to be published: `python scripts/export_policy.py outputs/RUN/checkpoints/last FOLDER`."""

from vega_policy.cli.commands import export_policy

if __name__ == "__main__":
    export_policy.main()
