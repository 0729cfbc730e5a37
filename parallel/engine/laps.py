"""What the start of a process takes, part by part. No torch: loading it is the first part."""

import time


class Laps:
    """parts_s: seconds by name, in their order."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()
        self.parts_s: dict[str, float] = {}

    def mark(self, name: str) -> None:
        """Everything since the last mark was `name`."""
        self.parts_s[name] = time.monotonic() - self._began_s - self.total_s

    @property
    def total_s(self) -> float:
        return sum(self.parts_s.values())
