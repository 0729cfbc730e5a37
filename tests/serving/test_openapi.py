"""The OpenAPI document: it describes what is there, and nothing that schemathesis makes of it is a 5xx."""

import asyncio

import pytest
from scripted import Application, Scripted

EXAMPLES = 50  # of each operation, well formed and malformed
ANSWER = "<|channel|>final<|message|>Hello, world<|return|>"


@pytest.fixture(scope="module")
def application(tokenizer, tiny_plan, markup):
    return Application(Scripted(markup(ANSWER)), tokenizer, tiny_plan)


@pytest.fixture(scope="module")
def document(application) -> dict:
    async def get() -> dict:
        async with application.client() as client:
            return (await client.get("/openapi.json")).json()

    return asyncio.run(get())


def references(value) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*(references(one) for one in value.values()))
    return set().union(*(references(one) for one in value)) if isinstance(value, list) else set()


def test_the_document_describes_every_route_and_its_body(document):
    assert {"/v1/chat/completions", "/v1/models", "/health", "/ready", "/metrics", "/plan"} <= document["paths"].keys()
    for path, methods in document["paths"].items():
        for method, about in methods.items():
            assert "422" not in about["responses"] and "400" in about["responses"]
            assert ("security" in about) == (path.startswith("/v1/") or path in ("/plan", "/tokenize", "/detokenize"))
            assert method != "post" or path.endswith("/cancel") or "requestBody" in about, (
                f"no row for {path} in openapi.BODIES"
            )
    schemas = document["components"]["schemas"]
    assert references(document) <= {f"#/components/schemas/{name}" for name in schemas}
    assert schemas["ChatRequest"]["required"] == ["model", "messages"]
    assert schemas["ChatRequest"]["additionalProperties"] is False


@pytest.mark.slow
def test_schemathesis_finds_no_5xx(application, skip_or_fail):
    try:
        import schemathesis
        from hypothesis import HealthCheck, Phase, given, settings
    except ImportError:
        skip_or_fail("no schemathesis: pip install schemathesis")
    schema = schemathesis.openapi.from_asgi("/openapi.json", application.asgi)
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    seen: dict[str, set[int]] = {}
    quick = settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )

    def check(case) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body = case.body | {"model": "tiny"}  # no model of another name is here
        answer = case.call()
        seen.setdefault(case.operation.label, set()).add(answer.status_code)
        assert answer.status_code < 500, (case.as_curl_command(), answer.text)

    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in modes if operation.method == "post" else modes[:1]:
            quick(given(operation.as_strategy(generation_mode=mode))(check))()
    assert {200, 400} <= seen["POST /v1/chat/completions"]
    assert len(seen) >= 6
