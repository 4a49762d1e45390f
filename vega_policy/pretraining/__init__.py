"""Pre-training of a small Wan on clips of our simulators; requires no LeRobot."""
