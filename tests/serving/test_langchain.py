"""A turn with a tool as LangChain's users write it: called, answered and told, plain and streamed, on both routes."""

import asyncio

import pytest
from in_process import Call, ScriptedEngine, served

CALLS = (
    "<|channel|>analysis<|message|>I look.<|end|><|start|>assistant"
    '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Bern"}<|call|>'
)
TELLS = "<|channel|>final<|message|>It snows in Bern.<|return|>"


@pytest.mark.slow  # its import takes longer than the rest
@pytest.mark.parametrize("responses", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_turn_with_a_tool(tokenizer, markup, stream, responses):
    from langchain_core.messages import AIMessageChunk, HumanMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    @tool
    def weather(city: str) -> str:
        """The weather in a city."""
        return f"Snow in {city}"

    engine = ScriptedEngine(markup(CALLS))
    call = Call(served(tokenizer, engine))

    async def talk():
        async with call.http() as http:
            settings = {"base_url": "http://test/v1", "api_key": "secret", "http_async_client": http}
            settings |= {"use_responses_api": responses, "stream_usage": True, "max_retries": 0}
            model = ChatOpenAI(model="tiny", **settings).bind_tools([weather])

            async def say(messages):
                if not stream:
                    return await model.ainvoke(messages)
                whole = AIMessageChunk(content="")
                async for chunk in model.astream(messages):
                    whole += chunk
                return whole

            asked = HumanMessage("Weather in Bern?")
            first = await say([asked])
            [called] = first.tool_calls
            assert (called["name"], called["args"]) == ("weather", {"city": "Bern"})
            engine.script = markup(TELLS)
            return await say([asked, first, await weather.ainvoke(called)])

    last = asyncio.run(talk())
    assert last.text == "It snows in Bern." and not last.tool_calls
    told = tokenizer.decode(engine.asked[1].prompt_tokens)
    assert "<|message|>Snow in Bern<|end|>" in told and '{"city":"Bern"}' in told.replace(" ", "")
    assert last.usage_metadata["input_tokens"] == len(engine.asked[1].prompt_tokens)
