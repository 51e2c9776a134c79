"""What a PyTorch user could train with instead, each written at its best.

Keras's `fit`, and a loop in plain PyTorch, with and without `torch.compile`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from peer import KerasFit, Peer
from workloads import Training, Workload


class ByHand:
    """The tutorial's MLP as one writes it in PyTorch; the data lie on the device.

    Args:
        workload: The MLP.
        compiled: Whether model, loss and the optimizer's step are compiled.
    """

    def __init__(self, workload: Workload, *, compiled: bool) -> None:

        self.steps = workload.steps
        self._size = workload.batch_size
        flat = Training(workload).model.get_weights()
        layers: list[Any] = []
        for kernel, bias in zip(flat[::2], flat[1::2], strict=True):
            linear = torch.nn.Linear(*kernel.shape)
            with torch.no_grad():
                linear.weight.copy_(torch.tensor(kernel.T))
                linear.bias.copy_(torch.tensor(bias))
            layers += [linear, torch.nn.ReLU()]
        self._model = model = torch.nn.Sequential(*layers[:-1])
        self._initial = {k: v.clone() for k, v in model.state_dict().items()}
        x, y = workload.data
        self._x, self._y = torch.tensor(x), torch.tensor(y).long()
        self._loss = torch.nn.CrossEntropyLoss()
        self._compiled = compiled
        self.restore()

    def restore(self) -> None:
        self._model.load_state_dict(self._initial)
        self._optimizer = torch.optim.RMSprop(
            self._model.parameters(), lr=1e-3, alpha=0.9, eps=1e-7, foreach=True
        )

        def forward(x: Any, y: Any) -> tuple[Any, Any]:
            logits = self._model(x.float())
            return self._loss(logits, y), (logits.argmax(1) == y).sum()

        self._forward, self._update = forward, self._optimizer.step
        if self._compiled:
            self._forward = torch.compile(forward)
            self._update = torch.compile(self._optimizer.step)

    def first_loss(self) -> float:
        self.restore()
        loss, _ = self._forward(self._x[: self._size], self._y[: self._size])
        return float(loss)

    def epoch(self) -> float:
        order = torch.randperm(len(self._x))
        total, hits = torch.zeros(()), torch.zeros((), dtype=torch.int64)
        for rows in order.split(self._size):
            loss, right = self._forward(self._x[rows], self._y[rows])
            self._optimizer.zero_grad()
            loss.backward()
            self._update()
            total += loss.detach()
            hits += right
        return float(total) / self.steps

    def about(self) -> str:
        return ""

    def close(self) -> None:
        """Nothing to stop."""


PEERS: dict[str, Callable[[Workload], Peer]] = {
    "keras.fit": lambda w: KerasFit(w, [(1, "auto")]),
}
"""For every workload."""

MLP_PEERS: dict[str, Callable[[Workload], Peer]] = {
    "loop by hand": lambda w: ByHand(w, compiled=False),
    "loop by hand, torch.compile": lambda w: ByHand(w, compiled=True),
}
