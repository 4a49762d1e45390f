"""Loss and gradient of a training step as one CUDA graph: thousands of kernels launched at once."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vega_policy.training.optimization import clip_gradient

WARM_UP = 3
"""Steps before a capture; in them libraries choose their kernels."""


class CapturedGradient:
    """Loss, gradient and its norm of batches that always lie at the same place.

    The same kernels run as without a graph, so that the numbers are the same. What is drawn or decided on
    the host is frozen in the graph: noise and the numbers of words have to be written to their places
    before each call.

    Args:
        loss: Reads the batch where it lies and gives the mean loss, a scalar, without waiting for the device.
        weights: What learns.
        most: Norm that the gradient is clipped to.

    Raises:
        ValueError: If the weights are not on a CUDA device.
    """

    def __init__(self, loss: Callable[[], Tensor], weights: Sequence[nn.Parameter], most: float) -> None:
        if not weights[0].is_cuda:
            raise ValueError(f"A CUDA graph needs a GPU; the weights are on {weights[0].device}.")
        self._compute, self._weights, self._most = loss, list(weights), most
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UP):
                self._run()
        torch.cuda.current_stream().wait_stream(beside)
        self._graph = torch.cuda.CUDAGraph()
        for weight in self._weights:
            weight.grad = None
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._loss, self._norm = self._run()
        self._gradients = [weight.grad for weight in self._weights]

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Loss and norm of the gradient, scalars; the gradient lies in the weights until the next call."""
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
