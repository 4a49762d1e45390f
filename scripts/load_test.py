"""Ask a policy server as fast as it answers: `python scripts/load_test.py --clients 1 4 16`.

Start it with a high rate limit: `python scripts/serve_policy.py checkpoint=... \
server.limits.requests_per_second=10000`.
"""

import argparse
import sys
from pathlib import Path

from vega_policy.deployment.client import PolicyUnavailableError, ServerAddress
from vega_policy.deployment.latency_benchmark import load_table as table
from vega_policy.deployment.latency_benchmark import measure


def main() -> None:
    """Measure each number of clients and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="ws://127.0.0.1:8765")
    parser.add_argument("--token-file", type=Path)
    parser.add_argument("--ca-file", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seconds", type=float, default=10.0, help="for each number of clients")
    parser.add_argument("--side", type=int, default=256, help="height and width of the frames in pixels")
    options = parser.parse_args()
    address = ServerAddress(options.url, options.token_file, options.ca_file)
    try:
        loads = [
            measure(address, clients=clients, seconds=options.seconds, side=options.side)
            for clients in options.clients
        ]
    except (PolicyUnavailableError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(table(loads))


if __name__ == "__main__":
    main()
