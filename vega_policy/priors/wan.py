"""Wan as a latent world simulator: one noised latent, read at a middle block (VEGA-3D, arXiv 2603.19235).

    z0 = normalised VAE mean        z = (1 - t) z0 + t noise        feature = blocks[layer](z, 1000 t, "")

With `clip=future` it simulates: slots of noise follow the frame's latent, which the network would turn into
the next latents of a video, and its first pass is read. The network receives the frame as in its training: as
a clean first latent at time 0 (Wan2.2-TI2V, and the small Wan once trained so), by VACE's mask, or by the
image channels of Wan2.1-I2V.

Networks are diffusers' own; blocks after the one that is read are dropped when the prior is built. This file
is the plain path; `wan_fast` computes the same features faster.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel, WanVACETransformer3DModel
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer, CLIPVisionModel, UMT5EncoderModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vega_policy import resource
from vega_policy.model.config import PriorConfig
from vega_policy.model.observation import resize
from vega_policy.priors import PRIORS, PriorEntry
from vega_policy.priors.base import (
    PROMPT_LENGTH,
    BasePrior,
    check_layers,
    empty_prompt,
    fingerprint_seed,
    local_folder,
    locate,
)
from vega_policy.priors.wan_fast import CapturedWan, FastWan, Words
from vega_policy.run_dir import read_json

logger = logging.getLogger(__name__)

SPAN = 4
"""Frames of a video in each latent but the first, which holds one."""

TRAINING = "training.json"
"""File beside exported weights of the small Wan that says which of its training's steps continued a frame."""

WORDS = 64
"""Most words of an instruction that are read; with the padding's token 64, which attention kernels like."""

Encoder = Callable[[Sequence[str]], list[Tensor]]
"""Sentences -> embedding of each without padding, [n d]."""


class LatentWorldSimulator(BasePrior):
    """A frozen Wan video diffusion model, read at one noise level and at one block or several."""

    networks: ClassVar = {"vae": AutoencoderKLWan, "transformer": WanTransformer3DModel}
    vae: Any
    transformer: Any
    prompt: Tensor
    latents_mean: Tensor
    latents_std: Tensor

    def __init__(
        self,
        parts: dict[str, Any],
        config: PriorConfig,
        grid: tuple[int, int],
        fingerprint: str,
        untrained: bool = False,
    ) -> None:
        """`parts` are `vae`, `transformer` and `prompt`, the empty prompt's embedding [n d_text] unpadded.

        With `prompt=instruction` the part `encode_words` is an `Encoder`.
        """
        vae, transformer, prompt = parts["vae"], parts["transformer"], parts["prompt"]
        self.layers = check_layers(config, len(transformer.blocks))
        self.patch: int = vae.spatial_compression_ratio * transformer.config.patch_size[-1]
        super().__init__(config, grid, fingerprint, self.patch)
        self.untrained, self.vae, self.transformer = untrained, vae, transformer
        transformer.blocks = transformer.blocks[: self.layers[-1] + 1]
        transformer.norm_out = transformer.proj_out = nn.Identity()
        vae.decoder = None
        self.block_width: int = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        joined = 1 if self.slot_pool == "mean" else 1 + self.slots
        self.width: int = self.block_width * len(self.layers) * joined
        self.register_buffer("prompt", pad_prompt(prompt)[None])
        self.register_buffer("latents_mean", torch.tensor(vae.config.latents_mean)[:, None, None, None])
        self.register_buffer("latents_std", torch.tensor(vae.config.latents_std)[:, None, None, None])
        self.encode_words: Encoder | None = parts.get("encode_words")
        self._words: dict[str, Words] = {}
        self.use_engine(config.engine)

    @classmethod
    def load(cls, config: PriorConfig, entry: PriorEntry, grid: tuple[int, int]) -> Self:
        """Load as `BasePrior.load`; without a path, load shipped weights or draw them from the seed."""
        if config.path is None and entry.shipped is None:
            return cls.from_seed(config, entry.architecture or {}, grid)
        if config.path is None:
            config = replace(config, path=str(resource("assets") / str(entry.shipped)))
        if config.clip == "future" and entry.architecture is not None:
            warn_of_training(local_folder(str(config.path)), config.future_slots)
        return super().load(config, entry, grid)

    @classmethod
    def load_inputs(cls, config: PriorConfig, folder: Path, parts: dict[str, Any]) -> dict[str, Any]:
        """Load the empty prompt, and with `prompt=instruction` what encodes instructions."""
        width = parts["transformer"].config.text_dim
        inputs: dict[str, Any] = {"prompt": empty_prompt(config, folder, width, encode_empty_prompt)}
        if config.prompt == "instruction":
            inputs["encode_words"] = make_words_encoder(config, folder, width)
        return inputs

    @classmethod
    def from_seed(
        cls, config: PriorConfig, architecture: dict[str, dict[str, Any]], grid: tuple[int, int]
    ) -> Self:
        """Build Wan with untrained weights of `config.seed`, from constructor arguments by network."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            vae = AutoencoderKLWan(**architecture["vae"]).eval()
            transformer = WanTransformer3DModel(**architecture["transformer"])
            prompt = torch.randn(1, architecture["transformer"]["text_dim"])
            set_latent_statistics(vae)
        dtype = getattr(torch, str(config.dtype))
        parts = {"vae": vae.to(dtype), "transformer": transformer.to(dtype), "prompt": prompt}
        if config.prompt == "instruction":
            parts["encode_words"] = make_words_encoder(config, None, prompt.shape[1])
        return cls(parts, config, grid, fingerprint_seed(config.seed, architecture), untrained=True)

    def encode_clips(
        self, clips: Tensor, generator: torch.Generator | None, instruction: Sequence[str] | None = None
    ) -> Tensor:
        """Return features of clips, [n t 3 h w] in [0, 1] -> [n t' d gh gw].

        A history is one video. Views are encoded one by one, so that no camera affects the next one's latent,
        and meet in the transformer. A frame's future is the frame, then its slots.
        """
        if self.clip == "frame":
            return self.encode_frames(clips[:, 0], generator)[:, None]
        if self.clip == "future":
            return self.encode_future(clips[:, 0], generator, instruction)
        if self.clip == "views":
            alone = self.encode_latent(rearrange(clips, "n t c h w -> (n t) c 1 h w"))
            latent = rearrange(alone, "(n t) z 1 h w -> n z t h w", t=clips.shape[1])
        else:
            latent = self.encode_latent(clips.transpose(1, 2))
        return self.run_blocks(self.add_noise(latent, generator))

    def encode_frames(self, frames: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return features of single frames on the prior's own grid, [n 3 h w] in [0, 1] -> [n d gh gw]."""
        engine = self.fast_engine
        if engine is not None:
            latent = torch.empty(len(frames), *engine.latent, device=frames.device)
            return engine(frames.float(), self.noise(latent, generator), self.noise_level)
        latent = self.encode_latent(frames[:, :, None])
        return self.run_blocks(self.add_noise(latent, generator))[:, 0]

    def encode_future(
        self, frames: Tensor, generator: torch.Generator | None, instruction: Sequence[str] | None
    ) -> Tensor:
        """Return features of frames and of their slots, [n 3 h w] in [0, 1] -> [n 1+k d gh gw].

        Below noise level 1 a slot holds the frame's latent beside noise, as if nothing moved.
        """
        engine = self.fast_engine
        if engine is not None:
            latent = torch.empty(len(frames), *engine.latent, device=frames.device)
            words = None if self.encode_words is None else self.words(instruction or [""] * len(frames))
            return engine(frames.float(), self.noise(latent, generator), self.noise_level, words)
        clean = self.encode_latent(frames[:, :, None])
        slots = self.add_noise(clean.expand(-1, -1, 1 + self.slots, -1, -1), generator)[:, :, 1:]
        return self.run_blocks(torch.cat([clean, slots], dim=2), instruction)

    def encode_latent(self, video: Tensor) -> Tensor:
        """Return the VAE's normalised mean, [n 3 t h w] in [0, 1] -> [n z t' h/8 w/8] float32."""
        posterior = self.vae.encode((2 * video - 1).to(self.vae.dtype)).latent_dist
        return (posterior.mode().float() - self.latents_mean) / self.latents_std

    def run_blocks(
        self, latent: Tensor, instruction: Sequence[str] | None = None, image: Tensor | None = None
    ) -> Tensor:
        """Return the outputs of the blocks that are read, noised latent [n z t h w] -> [n t d h/2 w/2]."""
        tokens, conditions = self.embed(latent, instruction, image)
        outputs = []
        for layer, block in enumerate(self.transformer.blocks):
            tokens = block(tokens, *conditions)
            outputs += [tokens] if layer in self.layers[:-1] else []
        return self.to_grid(torch.cat([*outputs, tokens], dim=-1) if outputs else tokens, latent)

    def embed(
        self, latent: Tensor, instruction: Sequence[str] | None = None, image: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Any]]:
        """Return a noised latent's tokens [n m d], and prompt, modulation and rotary tables of the blocks.

        `image` [n l c] are tokens of an image that cross-attention reads before the prompt.
        """
        network = self.transformer
        latent = latent.to(network.dtype)
        prompt = self.prompt.to(latent).expand(len(latent), -1, -1)
        if self.encode_words is not None:
            words, _ = self.words(instruction or [""] * len(latent))
            prompt = functional.pad(words, (0, 0, 0, PROMPT_LENGTH - words.shape[1])).to(latent)
        rotary = network.rope(latent)
        tokens = rearrange(network.patch_embedding(latent), "n d t gh gw -> n (t gh gw) d")
        time = self.times(len(latent), tokens)  # [n], or [n m] as Wan2.2-TI2V takes it
        length = None if time.ndim == 1 else time.shape[1]
        _, modulation, prompt, image = network.condition_embedder(
            time.flatten(), prompt, image, timestep_seq_len=length
        )
        prompt = prompt if image is None else torch.cat([image, prompt], dim=1)
        return tokens, (prompt, modulation.unflatten(-1, (6, -1)), rotary)

    def times(self, n: int, tokens: Tensor) -> Tensor:
        """Return the time of n videos, [n]; of a frame before its slots that of each token [n m], 0 first."""
        if not self.slots:
            return torch.full((n,), 1000 * self.noise_level, device=tokens.device)
        m = tokens.shape[1]
        time = torch.full((n, m), 1000 * self.noise_level, device=tokens.device)
        time[:, : m // (1 + self.slots)] = 0
        return time

    def words(self, instruction: Sequence[str]) -> Words:
        """Return the embedded words of n sentences, padded with zeros to one length, and their numbers.

        Each sentence is encoded once. Its words are cut to `WORDS`.

        Raises:
            ValueError: If the prior was built with the empty prompt.
        """
        if self.encode_words is None:
            raise ValueError("This prior reads the empty prompt; build it with prior.prompt=instruction.")
        new = [text for text in dict.fromkeys(instruction) if text not in self._words]
        for text, encoded in zip(new, self.encode_words(new) if new else (), strict=True):
            words = encoded[:WORDS]
            padded = functional.pad(words, (0, 0, 0, WORDS - len(words))).to(self.prompt)
            # the number lies on the device: a capture cannot copy it there
            self._words[text] = padded, torch.full((), float(len(words)), device=padded.device)
        chosen = [self._words[text] for text in instruction]
        return torch.stack([words for words, _ in chosen]), torch.stack([count for _, count in chosen])

    def to_grid(self, tokens: Tensor, latent: Tensor) -> Tensor:
        """Arrange the tokens of a latent [n z t h w] as maps, [n m d] -> [n t d gh gw]."""
        _, ph, pw = self.transformer.config.patch_size
        gh, gw = latent.shape[-2] // ph, latent.shape[-1] // pw
        return rearrange(tokens, "n (t gh gw) d -> n t d gh gw", gh=gh, gw=gw)

    def use_engine(self, engine: str) -> None:
        """Encode frames and their futures with another engine from now on: `plain`, `fast` or `auto`."""
        self.engine = engine
        self._engine: Engine | None = None
        self._engine_built = False

    @property
    def fast_engine(self) -> "Engine | None":
        """The engine for frames and futures, None for the plain path; built at first use, on its device."""
        if not self._engine_built:
            self._engine, self._engine_built = make_engine(self, self.engine), True
        return self._engine

    @contextmanager
    def nested(self) -> Iterator[None]:
        """Let the engine run without a CUDA graph of its own, so that a larger graph can capture it."""
        if self._engine is not None:
            self._engine.nested = True
        try:
            yield
        finally:
            if self._engine is not None:
                self._engine.nested = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Drop the engine and encoded sentences where the weights move or change their type."""
        self.use_engine(self.engine)
        self._words = {}
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the engine out of copies: captured graphs cannot be copied."""
        return self.__dict__ | {"_engine": None, "_engine_built": False}


class VideoConditioned(LatentWorldSimulator):
    """A Wan that reads the frame beside the latents: these are noised alike, the first one too."""

    def times(self, n: int, tokens: Tensor) -> Tensor:
        """Return the time of n videos, [n]."""
        return torch.full((n,), 1000 * self.noise_level, device=tokens.device)

    def noised(self, clean: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return a noised video of a frame's latent and its slots, [n z 1 h w] -> [n z 1+k h w]."""
        return self.add_noise(clean.expand(-1, -1, 1 + self.slots, -1, -1), generator)

    def continued(self, frames: Tensor) -> Tensor:
        """Return videos of a frame and grey frames as long as its slots, [n 3 h w] -> [n 3 1+4k h w]."""
        grey = torch.full_like(frames[:, :, None], 0.5).expand(-1, -1, SPAN * self.slots, -1, -1)
        return torch.cat([frames[:, :, None], grey], dim=2)


class ControlledWorldSimulator(VideoConditioned):
    """Wan2.1-VACE, its control's hint included, at control scale 1."""

    networks: ClassVar = {"vae": AutoencoderKLWan, "transformer": WanVACETransformer3DModel}

    def __init__(
        self, parts: dict[str, Any], config: PriorConfig, grid: tuple[int, int], fingerprint: str
    ) -> None:
        super().__init__(parts, config, grid, fingerprint)
        network = self.transformer
        self.hinted = [layer for layer in network.config.vace_layers if layer < len(network.blocks)]
        network.vace_blocks = network.vace_blocks[: len(self.hinted)]

    @classmethod
    def load(cls, config: PriorConfig, entry: PriorEntry, grid: tuple[int, int]) -> Self:
        """Load as `BasePrior.load`; refuse the fast engine."""
        if config.engine == "fast":
            raise ValueError(f"prior.engine=fast: {config.name!r} has no fast form. Take plain or auto.")
        return super().load(config, entry, grid)

    def encode_clips(
        self, clips: Tensor, generator: torch.Generator | None, instruction: Sequence[str] | None = None
    ) -> Tensor:
        """Return features of the only frame of each clip, [n 1 3 h w] in [0, 1] -> [n 1 d gh gw].

        A frame is its own reference image. With `clip=future` it is the kept part of a masked video instead,
        -> [n 1+k d gh gw].
        """
        if self.clip == "future":
            return self.encode_future(clips[:, 0], generator, instruction)
        video = rearrange(clips, "n 1 c h w -> n c 1 h w")
        grey = torch.full_like(video[:1], 0.5)  # the masked video: nothing is kept
        latent, masked = self.encode_latent(torch.cat([video, grey])).split([len(video), 1])
        clean = torch.cat([latent, latent], dim=2)  # reference, then frame
        noisy = self.add_noise(clean, generator)
        return self.run_controlled(noisy, self.control(latent, masked.expand_as(latent)))[:, 1:]

    def encode_future(
        self, frames: Tensor, generator: torch.Generator | None, instruction: Sequence[str] | None
    ) -> Tensor:
        """Return features of a masked video of which the frame is kept, [n 3 h w] -> [n 1+k d gh gw]."""
        kept = self.encode_latent(self.continued(frames))
        grey = torch.full_like(frames[:1, :, None], 0.5).expand(-1, -1, 1 + SPAN * self.slots, -1, -1)
        generated = self.encode_latent(grey).expand_as(kept)
        control = torch.cat([kept, generated, self.mask(kept)], dim=1)
        return self.run_controlled(self.noised(kept[:, :, :1], generator), control, instruction)

    def mask(self, latent: Tensor) -> Tensor:
        """Return the mask of the pixels to be generated: all but those of the first frame, [n p t h w].

        VACE samples the frames' mask at the latents' times (nearest, as in its pipeline): the first latent
        takes that of the second frame, which is generated.
        """
        frames = torch.ones(1 + SPAN * self.slots, device=latent.device)
        frames[0] = 0
        sampled = functional.interpolate(frames[None, None], latent.shape[2], mode="nearest-exact")[0, 0]
        pixels = self.vae.spatial_compression_ratio**2
        shape = (len(latent), pixels, -1, *latent.shape[-2:])
        return sampled[None, None, :, None, None].expand(shape)

    def control(self, latent: Tensor, masked: Tensor) -> Tensor:
        """Return VACE's control of a clean and a masked latent, both [n z 1 h w] -> [n 2z+64 2 h w].

        Channels: the kept part of the video (or the reference), the part to be generated, the mask of each
        pixel that a latent covers.
        """
        reference = torch.cat([latent, torch.zeros_like(latent)], dim=1)
        frame = torch.cat([masked, latent], dim=1)
        pixels = self.vae.spatial_compression_ratio**2
        shape = (len(latent), pixels, 1, *latent.shape[-2:])
        mask = torch.cat([latent.new_zeros(shape), latent.new_ones(shape)], dim=2)
        return torch.cat([torch.cat([reference, frame], dim=2), mask], dim=1)

    def run_controlled(
        self, latent: Tensor, control: Tensor, instruction: Sequence[str] | None = None
    ) -> Tensor:
        """Return the outputs of the blocks that are read, [n z t h w], [n c t h w] -> [n t d h/2 w/2]."""
        network = self.transformer
        tokens, conditions = self.embed(latent, instruction)
        prompt, modulation, rotary = conditions
        controls = network.vace_patch_embedding(control.to(network.dtype))
        controls = rearrange(controls, "n d t gh gw -> n (t gh gw) d")
        hints: dict[int, Tensor] = {}
        for layer, block in zip(self.hinted, network.vace_blocks, strict=True):
            hints[layer], controls = block(tokens, prompt, controls, modulation, rotary)
        outputs = []
        for layer, block in enumerate(network.blocks):
            tokens = block(tokens, *conditions)
            tokens = tokens + hints[layer] if layer in hints else tokens
            outputs += [tokens] if layer in self.layers[:-1] else []
        return self.to_grid(torch.cat([*outputs, tokens], dim=-1) if outputs else tokens, latent)


class ImageWorldSimulator(VideoConditioned):
    """Wan2.1-I2V, which reads the frame as further channels of the latents, and as tokens of CLIP."""

    networks: ClassVar = {
        "vae": AutoencoderKLWan,
        "transformer": WanTransformer3DModel,
        "image_encoder": CLIPVisionModel,
    }
    image_encoder: Any
    clip_mean: Tensor
    clip_std: Tensor

    def __init__(
        self, parts: dict[str, Any], config: PriorConfig, grid: tuple[int, int], fingerprint: str
    ) -> None:
        """Build as `LatentWorldSimulator`; refuse other clips.

        Raises:
            ValueError: If `clip` is not `future`.
        """
        if config.clip != "future":
            raise ValueError(
                f"prior.clip: {config.name!r} continues a frame (clip=future); got {config.clip}."
            )
        super().__init__(parts, config, grid, fingerprint)
        self.image_encoder = parts["image_encoder"]
        encoder = self.image_encoder.vision_model.encoder
        encoder.layers = encoder.layers[:-1]  # Wan reads the last layer but one, without a norm
        self.register_buffer("clip_mean", torch.tensor(OPENAI_CLIP_MEAN)[:, None, None])
        self.register_buffer("clip_std", torch.tensor(OPENAI_CLIP_STD)[:, None, None])

    def encode_future(
        self, frames: Tensor, generator: torch.Generator | None, instruction: Sequence[str] | None
    ) -> Tensor:
        """Return features of a video that begins with the frame, [n 3 h w] -> [n 1+k d gh gw]."""
        condition = self.encode_latent(self.continued(frames))
        is_frame = torch.zeros_like(condition[:, :1]).expand(-1, SPAN, -1, -1, -1).clone()
        is_frame[:, :, 0] = 1
        noisy = self.noised(condition[:, :, :1], generator)
        side = self.image_encoder.config.image_size
        pixels = (resize(frames, side, side) - self.clip_mean) / self.clip_std
        image = self.image_encoder(pixels.to(self.image_encoder.dtype)).last_hidden_state
        return self.run_blocks(
            torch.cat([noisy, is_frame, condition], dim=1), instruction, image.to(self.transformer.dtype)
        )


class Engine:
    """Runs the reductions of a prior, captured for the first batch size on CUDA.

    With `strict` other batch sizes are refused. Otherwise they run the same reductions uncompiled, so that no
    call but the first waits for a compiler.
    """

    def __init__(self, prior: Any, strict: bool) -> None:
        self.fast = FastWan(prior)
        self.latent = self.fast.latent
        self.nested = False  # a graph cannot be replayed while a larger one is captured
        self.captured: CapturedWan | None = None
        self._strict = strict

    def __call__(
        self, frames: Tensor, noise: Tensor, noise_level: float, words: Words | None = None
    ) -> Tensor:
        """Return features as `FastWan.forward`."""
        run: Callable[..., Tensor] = self.fast
        if frames.is_cuda:
            if self.captured is None:
                logger.info("Building the prior for batches of %d frames; this takes a while.", len(frames))
                self.captured = CapturedWan(self.fast, frames, noise, words=words)
            if self._strict or len(frames) == self.captured.batch:
                run = self.captured.run_nested if self.nested else self.captured
        return run(frames, noise, noise_level, words)


def obstacle(prior: Any) -> str | None:
    """Return why a `LatentWorldSimulator` has no fast form, or None if it has one."""
    vae, transformer = prior.vae, prior.transformer
    if (type(vae), type(transformer)) != (AutoencoderKLWan, WanTransformer3DModel):
        return f"its networks are {type(vae).__name__} and {type(transformer).__name__}, not Wan's own"
    if vae.use_tiling:
        return "its autoencoder works in tiles"
    if transformer.config.patch_size[0] != 1:
        return f"its patches span {transformer.config.patch_size[0]} frames"
    if transformer.config.added_kv_proj_dim is not None:
        return "its transformer also attends to a reference image"
    return None


def make_engine(prior: Any, engine: str) -> Engine | None:
    """Return the engine of a `LatentWorldSimulator` for `plain`, `fast` or `auto`; None is the plain path.

    Raises:
        ValueError: If `fast` is configured and the prior has no fast form.
    """
    if engine == "plain":
        return None
    reason = obstacle(prior)
    if engine == "fast" and reason is not None:
        raise ValueError(
            f"prior.engine=fast: this prior has no fast form: {reason}. Take prior.engine=plain."
        )
    if reason is not None:
        logger.info("prior.engine=auto takes the plain path: %s.", reason)
        return None
    made = Engine(prior, strict=engine == "fast")
    logger.info(
        "prior.engine=%s: exact reductions for frames of %dx%d, noise level %g.",
        engine,
        *made.fast.frame,
        made.fast.noise_level,
    )
    return made


def pad_prompt(prompt: Tensor) -> Tensor:
    """Pad an embedding with zeros to Wan's length, [n d] -> [512 d]."""
    return functional.pad(prompt, (0, 0, 0, PROMPT_LENGTH - len(prompt)))


def warn_of_training(folder: Path, slots: int) -> None:
    """Warn where the weights of the small Wan in a folder have not learned to continue a frame by `slots`."""
    if not (folder / TRAINING).is_file():
        logger.warning(
            "prior.clip=future: the weights in %s were trained with one noise level for all latents of a "
            "clip. A clean frame before noise is new to them, so that their slots are no trained prediction. "
            "Train them to continue a frame: vega-pretrain objective=image_to_video",
            folder,
        )
        return
    learned = (read_json(folder / TRAINING)["clips"]["frames"] - 1) // SPAN
    if slots > learned:
        logger.warning(
            "prior.future_slots=%d: the weights in %s were trained on clips with %d slots; those behind are "
            "new to them.",
            slots,
            folder,
            learned,
        )


def make_words_encoder(config: PriorConfig, folder: Path | None, width: int) -> Encoder:
    """Return what encodes instructions as in a prior's training; a text encoder is loaded at its first use.

    The small Wan has learned with the packaged MiniLM, Wan itself with the UMT5 encoder of its checkpoint.

    Raises:
        FileNotFoundError: If the checkpoint has no text encoder.
        ValueError: If the small Wan has another text width than MiniLM.
    """
    if PRIORS[config.name].architecture is None:
        assert folder is not None
        if not (folder / "text_encoder" / "config.json").is_file():
            advice = "prior.prompt=instruction needs the text encoder; prior.prompt=empty does not."
            folder = locate(config, ["text_encoder", "tokenizer"], advice)
        return _Lazy(partial(_load_umt5, folder))
    if width != MINILM_WIDTH:
        raise ValueError(
            f"prior.prompt=instruction: {config.name!r} reads words as MiniLM encodes them, {MINILM_WIDTH} "
            f"wide; these weights take {width}. Take prior.prompt=empty."
        )
    return _Lazy(_load_minilm)


MINILM_WIDTH = 384


class _Lazy:
    """An `Encoder` that is loaded at its first call."""

    def __init__(self, load: Callable[[], Encoder]) -> None:
        self._load, self._encode = load, None

    def __call__(self, sentences: Sequence[str]) -> list[Tensor]:
        self._encode = self._encode or self._load()
        return self._encode(sentences)


def _load_minilm() -> Encoder:
    from vega_policy.backbones.compact import TextEncoder

    encoder = TextEncoder(None, pretrained=True, frozen=True)

    def encode(sentences: Sequence[str]) -> list[Tensor]:
        words = [encoder([sentence]) for sentence in sentences]
        return [tokens[0][mask[0]] for tokens, mask in words]

    return encode


def _load_umt5(folder: Path) -> Encoder:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=False)
    text_encoder = folder / "text_encoder"
    encoder = UMT5EncoderModel.from_pretrained(text_encoder, dtype="auto", use_safetensors=True).eval()

    @torch.no_grad()
    def encode(sentences: Sequence[str]) -> list[Tensor]:
        tokens = tokenizer(
            list(sentences),
            padding="max_length",
            max_length=PROMPT_LENGTH,
            truncation=True,
            return_tensors="pt",
        )
        hidden = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        is_word = tokens.attention_mask.bool()
        return [x[mask].float().contiguous() for x, mask in zip(hidden, is_word, strict=True)]

    return encode


def encode_empty_prompt(folder: Path) -> Tensor:
    """Run a checkpoint's tokenizer and UMT5 encoder on "", -> [n d] float32, padding cut off."""
    return _load_umt5(folder)([""])[0]


@torch.no_grad()
def set_latent_statistics(vae: Any) -> None:
    """Give an untrained VAE the latent mean and deviation that it has on smooth random images."""
    coarse = torch.rand(16, 3, 6, 6)
    images = functional.interpolate(coarse, (96, 96), mode="bicubic").clamp(0, 1)
    latent = vae.encode(2 * images[:, :, None] - 1).latent_dist.mode()
    mean, deviation = latent.mean(dim=(0, 2, 3, 4)), latent.std(dim=(0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=deviation.tolist())
