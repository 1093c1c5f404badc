"""Running averages over training steps."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Meter:
    """Sums since the last log line, and the loss over the whole run; numbers that a checkpoint can hold."""

    steps: int = 0
    episodes: int = 0
    loss: float = 0.0
    accuracy: float = 0.0
    grad_norm: float = 0.0
    seconds: float = 0.0
    total_steps: int = 0
    total_loss: float = 0.0

    def update(self, loss: float, accuracy: float, grad_norm: float, episodes: int, seconds: float) -> None:
        """Add one step: means over its episodes, the norm of its gradient, and its wall-clock seconds."""
        self.steps += 1
        self.episodes += episodes
        self.loss += loss
        self.accuracy += accuracy
        self.grad_norm += grad_norm
        self.seconds += seconds
        self.total_steps += 1
        self.total_loss += loss

    @property
    def mean_loss(self) -> float:
        """Mean loss over all steps so far; 0 before the first."""
        return self.total_loss / max(self.total_steps, 1)

    def averages(self, score: str = "accuracy") -> dict[str, float]:
        """Means over the steps since the last ``flush``; ``score`` is what ``accuracy`` holds."""
        return {
            "loss": self.loss / self.steps,
            score: self.accuracy / self.steps,
            "grad_norm": self.grad_norm / self.steps,
            "episodes_per_second": self.episodes / max(self.seconds, 1e-9),
        }

    def shown(self, score: str = "accuracy") -> dict[str, str]:
        """``averages`` for a progress bar; empty right after a ``flush``."""
        if not self.steps:
            return {}
        averages = self.averages(score)
        return {
            "loss": f"{averages['loss']:.3f}",
            score: f"{averages[score]:.3f}",
            "episodes/s": f"{averages['episodes_per_second']:.1f}",
        }

    def flush(self, score: str = "accuracy") -> dict[str, float]:
        """``averages``, and start over."""
        averages = self.averages(score)
        self.load({"total_steps": self.total_steps, "total_loss": self.total_loss})
        return averages

    def state(self) -> dict[str, Any]:
        return asdict(self)

    def load(self, state: dict[str, Any]) -> None:
        """Put back what ``state`` gave; what it does not name is zero."""
        for name, value in asdict(Meter(**state)).items():
            setattr(self, name, value)
