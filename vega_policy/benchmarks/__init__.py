"""What each part costs on this machine: `python scripts/benchmark.py prior`, `policy`, `train`, `simulate`.

Each part is a function that yields rows (plain dictionaries); `report` prints them as a table and writes
them as JSON beside the machine's name. Nothing here imports LeRobot.
"""
