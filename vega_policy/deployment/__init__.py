"""From a checkpoint to a robot: policy server and client, safety limits, preflight, recording."""
