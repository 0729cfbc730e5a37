"""Runs `serve` or `generate` on tiny as the command line does, with the fake worker in place of the ranks.

python drive.py serve PORT [REPLICAS] DRAIN_S
python drive.py generate MAX_TOKENS
"""

import asyncio
import json
import sys
from pathlib import Path

from gptoss_launch.launch.commands import generate, serve
from gptoss_launch.launch.resolve import make_plan
from gptoss_launch.launch.restarts import Restarts
from gptoss_launch.launch.settings import ServeSettings
from gptoss_launch.launch.tokenizer import load_tokenizer
from gptoss_launch.parallel.engine.request import Sampling
from gptoss_launch.parallel.errors import UserError


def main() -> None:
    what, *numbers = sys.argv[1:]
    replicas = int(numbers[1]) if len(numbers) == 3 else 1
    layout = {"machine": "cpu", "context_tokens": 4096, "dp": replicas, "ranks": 1}
    settings = ServeSettings(**layout, port=int(numbers[0]), drain_s=float(numbers[-1]))
    try:
        if what == "serve":
            door = serve.open_door("tiny", settings)
            plan = make_plan("tiny", settings, need_weights=True)
            asyncio.run(serve.serve(plan, door, "fake_worker", restarts=Restarts((0.1, 0.2, 0.4))))
        else:
            plan = make_plan("tiny", settings, need_weights=True)
            tokenizer = load_tokenizer(Path(plan.checkpoint))
            ids = generate.chat_prompt("Hello", None, None, tokenizer)
            request = generate.make_request(ids, int(numbers[0]), Sampling(), plan, tokenizer)
            answer = asyncio.run(generate.generate(plan, request, tokenizer, "fake_worker", harmony=True, show=False))
            print(json.dumps(answer.to_json() if answer else None))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
