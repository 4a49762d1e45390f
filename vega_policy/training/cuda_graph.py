"""Loss and gradient of a training step as one CUDA graph.

A graph replays kernels on fixed memory without the host. So each batch, its noise and its times are copied to
memory that the graph reads, and its instructions are chosen by number from all of the dataset. A prior that
is not cached encodes the batch before: it is frozen, and replays a graph of its own (`wan_fast`).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vega_policy.backbones.compact import TextEncoder
from vega_policy.model.action_head import copy_to
from vega_policy.training.optim import clip_gradient

if TYPE_CHECKING:
    from vega_policy.training.config import TrainConfig

WARM_UP = 3  # steps before a capture, in which libraries choose their kernels
MOST_INSTRUCTIONS = 64  # a trainable text encoder reads all in each step, which costs too much beyond this

Forward = Callable[..., tuple[Tensor, dict[str, Tensor]]]
"""Batch, noise and time -> mean loss and metrics, as `VegaPolicy.forward`."""

Gradient = Callable[[], tuple[Tensor, Tensor]]
"""() -> loss and norm of the gradient that then lies, clipped, in the weights."""


class CapturedGradient:
    """Graph of a loss over fixed memory and of its gradient in `weights`, clipped to the norm `most`.

    The same kernels run as without a graph, with the same results. `loss` reads its batch from fixed memory
    and returns a scalar without waiting for the device; what it draws or decides on the host is frozen.

    Raises:
        ValueError: If the weights are not on a CUDA device.
    """

    def __init__(self, loss: Callable[[], Tensor], weights: Sequence[nn.Parameter], most: float) -> None:
        if not weights[0].is_cuda:
            raise ValueError(f"A CUDA graph needs a GPU; the weights are on {weights[0].device}.")
        self._compute, self._weights, self._most = loss, list(weights), most
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            for _ in range(WARM_UP):
                self._run()
        torch.cuda.current_stream().wait_stream(side_stream)
        self._graph = torch.cuda.CUDAGraph()
        for weight in self._weights:
            weight.grad = None
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._loss, self._norm = self._run()
        self._gradients = [weight.grad for weight in self._weights]

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Return loss and gradient norm; the gradient stays in the weights until the next call."""
        self._graph.replay()
        for weight, gradient in zip(self._weights, self._gradients, strict=True):
            weight.grad = gradient
        return self._loss, self._norm

    def _run(self) -> tuple[Tensor, Tensor]:
        for weight in self._weights:
            weight.grad = None
        loss = self._compute()
        loss.backward()
        return loss.detach(), clip_gradient(self._weights, self._most)


def check_capturable(config: "TrainConfig", device: torch.device, instructions: Sequence[str]) -> None:
    """Refuse a run on `device`, with these instructions in its training rows, that cannot be captured.

    Raises:
        ValueError: Names the first obstacle and what to set.
    """
    vega, data = config.vega, config.dataset
    few = vega.backbone.freeze_text_encoder or len(instructions) <= MOST_INSTRUCTIONS
    needs = (
        (device.type == "cuda", "a GPU", f"the device {device}"),
        (not torch.distributed.is_initialized(), "a single process, without a launcher", "one of several"),
        (config.sharding == "none", "sharding=none", f"sharding={config.sharding}"),
        (config.accumulate == 1, "accumulate=1", f"accumulate={config.accumulate}"),
        (vega.base.name == "none", "base=none", f"base={vega.base.name}"),
        (vega.backbone.name == "compact", "backbone=compact", f"backbone={vega.backbone.name}"),
        (data.cache != "none", "frames or features of a cache (dataset.cache=gpu)", "dataset.cache=none"),
        (
            few,
            f"backbone.freeze_text_encoder=true for more than {MOST_INSTRUCTIONS} instructions",
            f"{len(instructions)} of them and a trainable text encoder",
        ),
    )
    for met, needed, found in needs:
        if not met:
            raise ValueError(f"capture=true needs {needed}; got {found}. Set that, or capture=false.")


class CapturedStep:
    """Loss, clipped gradient and metrics of batches of one shape, captured at the first one.

    Results equal those without a graph up to the order of sums, except for the dropout of a trainable text
    encoder: it reads all instructions at once instead of the batch's, so its draws differ. `instructions` are
    all that batches may hold; `capture` makes the graph of a loss, the trainable weights and the largest norm
    `most`.
    """

    def __init__(
        self,
        forward: Forward,
        policy: Any,
        autocast: Callable[..., AbstractContextManager[Any]],
        instructions: Sequence[str],
        most: float,
        capture: Callable[..., Gradient] | None = None,
    ) -> None:
        self._forward, self._policy, self._autocast = forward, policy, autocast
        self._instructions, self._most = list(instructions), most
        self._capture = capture or CapturedGradient
        self._gradient: Gradient | None = None
        self._logged: dict[str, Tensor] = {}

    def __call__(
        self, batch: dict[str, Any], noise: Tensor | None = None, time: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Leave the gradient of a pre-processed batch in the weights; the first batch is captured.

        Returns scalars on the device, overwritten by the next call: the policy's metrics, and
        `gradient_norm`.
        """
        inputs = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        drawn = {"noise": noise, "time": time}
        inputs |= {name: value for name, value in drawn.items() if value is not None}
        if self._gradient is None:
            self._allocate(batch, inputs)
            self._gradient = self._captured()
        self._write(batch["task"], inputs)
        _, norm = self._gradient()
        return self._logged | {"gradient_norm": norm}

    def _allocate(self, batch: dict[str, Any], inputs: dict[str, Tensor]) -> None:
        """Allocate the memory that the graph reads."""
        self._inputs = {name: value.clone() for name, value in inputs.items()}
        action = inputs["action"]
        with self._autocast():
            encoder = self._policy.model.backbone.text_encoder
            self._words = WordTable(encoder, self._instructions, len(action), action.device)
        self._batch = batch | self._inputs | {"task": [""] * len(action)}

    def _captured(self) -> Gradient:
        """Capture the graph; warming up for it leaves random states as they were."""
        weights = [weight for weight in self._policy.parameters() if weight.requires_grad]
        devices = {weight.device for weight in weights if weight.is_cuda}
        with torch.random.fork_rng(devices):
            return self._capture(self._loss, weights, self._most)

    def _loss(self) -> Tensor:
        noise, time = self._inputs.get("noise"), self._inputs.get("time")
        with self._autocast():
            batch = self._batch | {"vega.words": self._words()}
            loss, self._logged = self._forward(batch, noise=noise, time=time, metrics_as_tensors=True)
        return loss

    def _write(self, instructions: list[str], inputs: dict[str, Tensor]) -> None:
        """Copy a batch to the memory that the graph reads."""
        shapes, expected = _shapes(inputs), _shapes(self._inputs)
        if shapes != expected:
            raise ValueError(
                f"capture=true: this step was captured for {expected}; got {shapes}. Set capture=false."
            )
        for name, held in self._inputs.items():
            held.copy_(inputs[name], non_blocking=True)
        self._words.choose(instructions)


class WordTable:
    """Encoded instructions of a batch of b samples, chosen by number from all instructions.

    A frozen text encoder encodes here, a trainable one in each call.
    """

    def __init__(
        self, encoder: TextEncoder, sentences: Sequence[str], batch: int, device: torch.device
    ) -> None:
        self._numbers = {sentence: number for number, sentence in enumerate(dict.fromkeys(sentences))}
        self._chosen = torch.zeros(batch, dtype=torch.int64, device=device)
        reader = _encode_once if encoder.frozen else _encode_always
        self._read = reader(encoder, list(self._numbers))

    def choose(self, sentences: list[str]) -> None:
        """Choose each sample's instruction, b of them.

        Raises:
            ValueError: If one is unknown.
        """
        unknown = [sentence for sentence in sentences if sentence not in self._numbers]
        if unknown:
            raise ValueError(
                f"capture=true: {unknown[0]!r} is none of the {len(self._numbers)} instructions that this "
                "step was captured for. Set capture=false."
            )
        numbers = torch.tensor([self._numbers[sentence] for sentence in sentences])
        self._chosen.copy_(copy_to(numbers, self._chosen))

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Return token features [b l c] and their mask [b l] of the chosen sentences."""
        words, is_word = self._read()
        return words[self._chosen], is_word[self._chosen]


def _encode_once(encoder: TextEncoder, sentences: list[str]) -> Callable[[], tuple[Tensor, Tensor]]:
    words, is_word = encoder(sentences)
    return lambda: (words, is_word)


def _encode_always(encoder: TextEncoder, sentences: list[str]) -> Callable[[], tuple[Tensor, Tensor]]:
    # One column of padding: outside a capture, transformers skips a mask that hides nothing. With padding the
    # mask is always used, so that warm-up and capture run the same kernels.
    tokens = {name: functional.pad(value, (0, 1)) for name, value in encoder.tokenize(sentences).items()}
    is_word = tokens["attention_mask"][:, :-1].bool()

    def read() -> tuple[Tensor, Tensor]:
        hidden = encoder.network(**tokens).last_hidden_state[:, :-1]
        return hidden.masked_fill(~is_word[..., None], 0.0), is_word

    return read


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors.items()}
