"""What the backends of csrc/ have in common: they are built and loaded when their status is first asked for."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod

import torch

from gspn_dit.ops.backend import Status


class Compiled(ABC):
    """A backend's status, from a library that is loaded once, by whichever thread comes first."""

    def __init__(self) -> None:
        self._loading = threading.Lock()
        self._loaded: Status | None = None

    @abstractmethod
    def load(self) -> str:
        """Build the library if need be, load it, and say what it is. Any exception is the reason that it is missing."""

    def status(self, device: torch.device | None = None) -> Status:
        """Whether the library is there; the first call builds it."""
        if self._loaded is None:
            with self._loading:
                if self._loaded is None:
                    self._loaded = self._load()
        return self._loaded

    def _load(self) -> Status:
        try:
            return Status(True, self.load())
        except Exception as error:  # whatever goes wrong in a build, the reference still works
            return Status(False, str(error))
