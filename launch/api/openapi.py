"""The server's OpenAPI document at /openapi.json, made from the very models that read the requests.

Routes read their bodies themselves, for errors in OpenAI's shape, so FastAPI does not know them: BODIES does. No page
shows the document, since those that do fetch scripts from the network.
"""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .completions import CompletionRequest
from .gate import OPEN
from .responses_schema import CompactRequest, ResponsesRequest
from .schema import ChatRequest
from .tokens import DetokenizeRequest, TokenizeRequest

# path of a POST: what its body is read with
BODIES: Mapping[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/responses/input_tokens": ResponsesRequest,
    "/v1/responses/compact": CompactRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}

_ERRORS = {
    "400": "What was sent is wrong; param names the field",
    "401": "No key, or a wrong one",
    "404": "No such model",
    "413": "The body is too large",
    "429": "Too many requests; Retry-After says when to come back",
    "503": "No replica can answer now",
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
                "retryable": {"type": "boolean"},
            },
        }
    },
}


def add_openapi(app: FastAPI, bodies: Mapping[str, type[BaseModel]] = BODIES) -> None:
    """Serves the document; to be called once all routes are there."""
    document = describe(app, bodies)

    async def show(request: Request) -> Response:
        return JSONResponse(document)

    app.add_route("/openapi.json", show, include_in_schema=False)


def describe(app: FastAPI, bodies: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
    document = app.openapi()
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas.pop("HTTPValidationError", None)
    schemas.pop("ValidationError", None)
    schemas["Error"] = _ERROR
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, methods in document["paths"].items():
        for method, about in methods.items():
            about["responses"].pop("422", None)  # never sent: errors are 400, in OpenAI's shape
            about["responses"] |= {
                status: {
                    "description": what,
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
                }
                for status, what in _ERRORS.items()
            }
            if method == "post" and path in bodies:
                schema = bodies[path].model_json_schema(ref_template="#/components/schemas/{model}")
                schemas |= schema.pop("$defs", {})
                schemas[bodies[path].__name__] = schema
                reference = {"$ref": f"#/components/schemas/{bodies[path].__name__}"}
                about["requestBody"] = {"required": True, "content": {"application/json": {"schema": reference}}}
            if path not in OPEN:
                about["security"] = [{"key": []}]
    return document
