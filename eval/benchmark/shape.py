"""What `visar bench --shapes` asks of a model of a published size: its counts, a session of it, and its stock loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch

from visar.engine.cached_session import CachedSession
from visar.engine.memory import COPIES


class Shape(ABC):
    """A model, its images, and the settings that its authors recommend. Weights are random."""

    name: str
    guidance: float
    top_k: int
    top_p: float = 1.0
    stock_tokens: ClassVar[int]  # over which the stock loop is timed

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Tokens of an image."""

    @property
    @abstractmethod
    def passes(self) -> int:
        """Passes of plain decoding, which forced tokens do not take."""

    @property
    @abstractmethod
    def vocab(self) -> int:
        """The number of image tokens."""

    @property
    @abstractmethod
    def weights(self) -> int:
        """Weights that every pass reads."""

    @property
    @abstractmethod
    def parameters(self) -> int:
        """All weights that are made."""

    @property
    @abstractmethod
    def rows(self) -> int:
        """Rows of the cache for an image: 2 with guidance."""

    @abstractmethod
    def cache(self, rows: int, slots: int) -> int:
        """Numbers of keys and values."""

    @abstractmethod
    def slots(self, window: int) -> int:
        """Slots of a row of the cache: those of the prompt, of the image, and of a window past its end."""

    @abstractmethod
    def numbers(self, batch: int) -> int:
        """Numbers that a pass must read halfway through `batch` images."""

    def refused(self, device: torch.device) -> str:
        """Why the model cannot be on a device, whatever its memory; nothing if it can."""
        return ""

    @abstractmethod
    def make(self, dtype: torch.dtype, device: torch.device) -> Any:
        """The model, of random weights, made in its dtype on its device without a copy in another."""

    @abstractmethod
    def session(self, model: Any, batch: int, window: int) -> CachedSession:
        """A fresh session of what `make` gave."""

    @abstractmethod
    def stock_ms(self, model: Any, batch: int, tokens: int) -> float:
        """Milliseconds per token of the loop that its users run today, over so many `tokens`, sampling included."""

    def streamed(self, batch: int, dtype: torch.dtype) -> int:
        """Bytes that a pass must read halfway through `batch` images."""
        return self.numbers(batch) * dtype.itemsize

    def needed(self, batch: int, window: int, dtype: torch.dtype, device: torch.device) -> int:
        """Bytes that measuring it takes, estimated: weights, cache, and what is made of the logits.

        On a CPU linear layers have a second copy of their weights, in the order in which it reads them.
        """
        copies = 2 if device.type == "cpu" else 1
        weights = (self.parameters + (copies - 1) * self.weights) * dtype.itemsize
        cache = self.cache(self.rows * batch, self.slots(window)) * dtype.itemsize
        return weights + cache + COPIES * batch * window * self.vocab * 4
