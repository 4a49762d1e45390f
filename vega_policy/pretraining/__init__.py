"""Pre-training of a small Wan on clips of our simulators; writes the folder layout of the hub's checkpoints.

`settings` says what a run is, `stages` runs it: prompts are embedded, clips filmed (by the function that the
config names), the autoencoder trained (`autoencoder`), latents measured and kept (`latents`), the transformer
trained by flow matching (`matching`, `transformer`), and everything written and measured (`export`,
`report`). `learner` is the resumable loop that both trainings share. Nothing here needs LeRobot or Hydra, so
that it also runs where only torch and diffusers are installed:
`python -m vega_policy.pretraining RUN.yaml max_seconds=540`.
"""
