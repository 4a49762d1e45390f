"""Training: a short loop on accelerate with LeRobot's datasets, processors and checkpoint format.

`config` and `options` say what a run is, `setup` builds it, `trainer` is the loop.
`checkpoints`, `integrity`, `retention` and `folders` keep it; `guards` stop it in time; `parallel` spreads it
over processes; `held_out` and `simulation` measure it; `progress`, `loggers`, `provenance`, `model_card` and
`hub` show it; `sweep` compares several. `pretraining` trains a small prior instead of a policy.
"""
