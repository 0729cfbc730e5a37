"""What is served, and how: what every route is given."""

import time
from dataclasses import dataclass, field

from ..tokenizer import Tokenizer
from .body import MOST_NAME_CHARS
from .errors import ApiError
from .replicas import Replicas
from .responses_store import Store
from .tool_server import ToolServers

BODY_LIMIT_BYTES = 32 << 20
QUIET_S = 10.0  # a stream with nothing to say for so long says that it waits: proxies cut what is silent


@dataclass(frozen=True)
class Served:
    """Who may come in is `gate`'s business."""

    name: str
    context_tokens: int
    tokenizer: Tokenizer
    replicas: Replicas
    body_limit_bytes: int = BODY_LIMIT_BYTES
    quiet_s: float = QUIET_S
    tools: ToolServers | None = None  # that run python and browser; None: those are refused
    store: Store = field(default_factory=Store)  # of responses
    started: int = field(default_factory=lambda: int(time.time()))  # Unix time, s

    def check_model(self, name: str) -> None:
        """Raises ApiError 404."""
        if name != self.name:
            message = f"no model {name[:MOST_NAME_CHARS]!r} here, only {self.name!r}"
            raise ApiError(404, message, "model", "model_not_found")
