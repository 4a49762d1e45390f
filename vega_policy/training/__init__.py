"""Training on accelerate with LeRobot's datasets, processors and checkpoint format; `train.train` runs it."""
