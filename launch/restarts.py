"""How often a replica that dies is started again, and after which pause. Knows no processes and no clock."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Restarts:
    """One pause for each restart within within_s, in seconds: one that dies at once dies more slowly each time."""

    pauses_s: tuple[float, ...]
    within_s: float = 600.0

    def recent(self, begun_s: Sequence[float], now_s: float) -> int:
        """How many of the restarts that began at begun_s count now."""
        return sum(now_s - begun < self.within_s for begun in begun_s)

    def pause_s(self, begun_s: Sequence[float], now_s: float) -> float | None:
        """How long to wait with the next one; None: there may be no more."""
        recent = self.recent(begun_s, now_s)
        return self.pauses_s[recent] if recent < len(self.pauses_s) else None


RESTARTS = Restarts((1.0, 5.0, 25.0))
NO_RESTARTS = Restarts(())
