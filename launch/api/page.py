"""The chat page at /, and the plan at /plan, which it shows.

One file, page.html, that fetches nothing but this server's own API. Its Content-Security-Policy allows the one script
and the one style that are in it, by their hashes, so that no text which a model writes could ever run.
"""

import base64
import hashlib
import importlib.resources
import re
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from starlette.responses import HTMLResponse, JSONResponse, Response

from ...parallel.planning.plan import Plan


def page_routes(plan: Plan) -> APIRouter:
    html = (importlib.resources.files("gptoss_launch.launch.api") / "page.html").read_text(encoding="utf-8")
    headers = {
        "content-security-policy": policy(html),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    about = _public(plan)
    router = APIRouter()

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(html, headers=headers)

    @router.get("/plan")
    async def show_plan() -> Response:
        return JSONResponse(about)

    return router


def policy(html: str) -> str:
    """The Content-Security-Policy for a page with one inline style and one inline script."""

    def sha256(tag: str) -> str:
        [text] = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    rules = {
        "default-src": "'none'",
        "connect-src": "'self'",
        "img-src": "data:",
        "style-src": sha256("style"),
        "script-src": sha256("script"),
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _public(plan: Plan) -> dict[str, Any]:
    """Without where things lie on this machine."""
    about = plan.to_json()
    return about | {"checkpoint": Path(about["checkpoint"]).name if about["checkpoint"] else None}
