"""The stages of a run, each of which goes on where an earlier start stopped."""

import json
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME

from vega_policy.pretraining import autoencoder, transformer
from vega_policy.pretraining import export as report
from vega_policy.pretraining.autoencoder import (
    channels_last,
    measure_statistics,
    pictures_in_two_dimensions,
    write_latents,
    write_picture_latents,
)
from vega_policy.pretraining.clips import Clips
from vega_policy.pretraining.config import STAGES, PretrainSettings
from vega_policy.pretraining.export import load_transformer, load_vae, take_weights, write_part, write_rest
from vega_policy.pretraining.trainer import StageTrainer, learn
from vega_policy.pretraining.transformer import EMPTY, PromptTable, read_prompts, write_prompts
from vega_policy.priors import PRIORS
from vega_policy.priors.weights import fingerprint_files


class Run:
    """One run on one device.

    Args:
        settings: The run.

    Raises:
        ValueError: If the prior is none whose weights come from a seed, or a finished run has other steps.
    """

    def __init__(self, settings: PretrainSettings) -> None:
        self.settings = settings
        self.folder = Path(settings.output_dir)
        self.weights = self.folder / settings.prior
        self.device = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        entry = PRIORS.get(settings.prior)
        if entry is None or entry.architecture is None:
            small = ", ".join(name for name, one in PRIORS.items() if one.architecture)
            raise ValueError(f"prior: {settings.prior!r} is not one of those that are trained here: {small}")
        self.architecture = entry.architecture
        self.deadline = None if settings.max_seconds is None else time.time() + settings.max_seconds
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.backends.cudnn.benchmark = True  # few shapes of small convolutions, whose best kernel differs

    def stage(self, name: str) -> bool:
        """Run a stage; False if the time was up before it was done."""
        work: dict[str, Callable[[], bool]] = {
            "prompts": self.embed_prompts,
            "clips": self.make_clips,
            "vae": self.train_vae,
            "transformer": self.train_transformer,
            "report": self.report,
            "film": self.film,
        }
        return work[name]()

    @property
    def prompts(self) -> Path:
        """File of the instructions' embeddings."""
        return Path(self.settings.prompts or self.folder / "prompts.safetensors")

    def embed_prompts(self) -> bool:
        """Embed what the robot is told in the clips' tasks, unless that was done."""
        if not self.prompts.is_file():
            listed = _function(self.settings.clips.instructions)(**self.settings.clips.order)
            write_prompts(self.prompts, listed)
        return True

    def make_clips(self) -> bool:
        """Film the clips that are missing."""
        clips = self.settings.clips
        write = _function(clips.write)
        return write(Path(clips.folder), processes=clips.processes, deadline=self.deadline, **clips.order)

    def clips(self) -> tuple[Clips, Clips]:
        """Clips to learn from, and held-out ones."""
        return Clips.open(Path(self.settings.clips.folder), self.settings.clips.held_out)

    def train_vae(self) -> bool:
        """Train the autoencoder, measure its latents, and write it."""
        if (self.weights / "vae").is_dir():
            return True
        clips, held_out = self.clips()
        network = pictures_in_two_dimensions(self._fresh(AutoencoderKLWan, "vae"))
        if self.settings.vae.channels_last:
            channels_last(network)
        learner = StageTrainer(network, self.settings.vae.learning, self.folder / "vae")
        loss = autoencoder.autoencoder_loss(network, clips, self.settings.vae, self.device)
        watch = autoencoder.watch(network, held_out, self.device)
        if not learn(learner, loss, watch, self.settings, self.deadline):
            return False
        with learner.averaged():
            measure_statistics(network, clips, self.device)
            write_part(network, self.weights / "vae")
        return True

    def train_transformer(self) -> bool:
        """Train the transformer on the latents of the autoencoder that was written, and write it."""
        if (self.weights / "transformer").is_dir():
            return True
        clips, held_out = self.clips()
        prompts = read_prompts(self.prompts)
        table = PromptTable(prompts, self.device)
        vae = load_vae(self.weights, self.device)
        mark = fingerprint_files(self.weights, ["vae"])
        latents, unseen = (
            write_latents(self.folder / f"latents-{name}-{mark}-{part.mark}.npy", vae, part, self.device)
            for name, part in (("learned", clips), ("held_out", held_out))
        )
        pictures = self.folder / f"latents-pictures-{mark}-{clips.mark}.npy"
        singles = write_picture_latents(pictures, vae, clips, self.device)
        network = self._fresh(WanTransformer3DModel, "transformer")
        settings = self.settings.transformer
        learner = StageTrainer(network, settings.learning, self.folder / "transformer")
        loss = transformer.matching_loss(
            network, latents, singles, clips.instructions, table, settings, self.device
        )
        watch = transformer.watch(network, unseen, held_out.instructions, table, self.device)
        if not learn(learner, loss, watch, self.settings, self.deadline):
            return False
        with learner.averaged():
            write_rest(self.weights, prompts[EMPTY], self.settings.report.sample_shift)
            write_part(network, self.weights / "transformer")
        return True

    def report(self) -> bool:
        """Measure what was written on held-out clips, and write its card."""
        clips, held_out = self.clips()
        vae, network = load_vae(self.weights, self.device), load_transformer(self.weights, self.device)
        table = PromptTable(read_prompts(self.prompts), self.device)
        folder = self.folder / "report"
        folder.mkdir(exist_ok=True)
        figures = report.measure(vae, network, held_out, table, self.settings)
        report.write_reconstructions(folder / "reconstructions.png", vae, held_out)
        report.write_card(self.weights, figures, self._learned(clips, held_out), self.settings)
        return True

    def film(self) -> bool:
        """Film what comes out of noise; needs the weights alone, and pyav."""
        vae, network = load_vae(self.weights, self.device), load_transformer(self.weights, self.device)
        path = self.folder / "report" / "sample.mp4"
        path.parent.mkdir(exist_ok=True)
        report.write_film(path, vae, network, read_prompts(self.prompts), self.settings)
        return True

    def _learned(self, clips: Clips, held_out: Clips) -> dict[str, Any]:
        steps = {
            f"{part}_steps": json.loads(
                (self.folder / part / "checkpoints" / "last" / "step.json").read_text()
            )["step"]
            for part in ("vae", "transformer")
        }
        start = self.settings.start
        return {
            "start": None if start is None else fingerprint_files(Path(start), ["vae", "transformer"]),
            "clips": len(clips),
            "held_out": len(held_out),
            "frames": clips.shape[0],
            "size": clips.shape[1],
            "suites": list(self.settings.clips.order["suites"]),
            "shots": sorted(set(clips.shots)),
            **steps,
        }

    def _fresh(self, cls: Any, part: str) -> Any:
        """A network with the weights of the seed, or of `start`."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.settings.seed)
            network = cls(**self.architecture[part])
        if self.settings.start is not None:
            path = Path(self.settings.start) / part / SAFETENSORS_WEIGHTS_NAME
            if not path.is_file():
                raise FileNotFoundError(f"start: {path} does not exist; give a folder that a run has written")
            take_weights(network, path)
        return network.to(self.device)


def pretrain(settings: PretrainSettings) -> Path | None:
    """Run the stages that the settings name.

    Args:
        settings: The run.

    Returns:
        Folder of the weights; None if the time was up before all was done: call again.
    """
    run = Run(settings)
    for stage in STAGES:
        if stage in settings.stages and not run.stage(stage):
            return None
    return run.weights


def _function(path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)
