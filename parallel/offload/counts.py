"""What became of the experts that steps needed, where not all are on the device. No torch: a leader reads it."""

from dataclasses import dataclass


@dataclass
class Counts:
    """What the cache did since the start: experts found and not found on the device, bytes brought in, the time for
    which the host waited to learn which experts a step needs, and that for which the device stood still until experts
    had come, or the CPU had computed them. ahead, ahead_hits: experts brought in before their layer asked, and those
    of them that it then needed."""

    hits: int = 0
    misses: int = 0
    moved_bytes: int = 0
    waited_s: float = 0.0
    stalled_s: float = 0.0
    ahead: int = 0
    ahead_hits: int = 0
