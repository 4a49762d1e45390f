"""Training: a short loop on accelerate with LeRobot's datasets, processors and checkpoint format.

`config` says what a run is, `setup` builds it, `trainer` is the loop, `checkpoints` and `folders` keep it.
"""
