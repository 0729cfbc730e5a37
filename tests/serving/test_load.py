"""Two hundred streams at once on tiny, through HTTP: each gets what it gets alone, token for token."""

import asyncio
from pathlib import Path

import openai
import pytest

STREAMS = 200
PROGRAM = (str(Path(__file__).with_name("drive_fp64.py")),)
Said = tuple[str, str, str | None]  # reasoning, content, why it ended


async def stream(client: openai.AsyncOpenAI, index: int) -> Said:
    """One answer. Prompts of several lengths, some with the same beginning, drawn in several ways."""
    text = f"Question {index % 20}: " + "say it again, " * (index % 7) + str(index)
    ways = ({"temperature": 0}, {"seed": index}, {"seed": index, "top_p": 0.8})
    answer = await client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": text}],
        max_tokens=6 + index % 9,
        stream=True,
        **ways[index % 3],
    )
    reasoning = content = ""
    reason = None
    async for chunk in answer:
        delta = chunk.choices[0].delta
        content += delta.content or ""
        reasoning += getattr(delta, "reasoning_content", None) or ""
        reason = chunk.choices[0].finish_reason or reason
    return reasoning, content, reason


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_hundred_streams_as_one_by_one(start) -> None:
    served = start(program=PROGRAM)

    async def ask() -> tuple[list[Said], list[Said]]:
        async with openai.AsyncOpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=500) as client:
            together = await asyncio.gather(*(stream(client, index) for index in range(STREAMS)))
            alone = [await stream(client, index) for index in range(STREAMS)]
        return list(together), alone

    together, alone = asyncio.run(ask())
    assert together == alone
    assert {reason for _, _, reason in together} <= {"stop", "length"}
    assert len({said for said in together}) > STREAMS / 3
    served.process.terminate()
    served.gone_within()
    assert served.process.wait() == 0
