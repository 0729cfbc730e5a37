"""Runs `serve` or `generate` on tiny as the command line does, with the fake worker in place of the ranks.

python drive.py serve PORT [REPLICAS] DRAIN_S
python drive.py node RANK OF HEAD_PORT KEY_FILE REPLICAS DRAIN_S    (on 127.0.0.1, which the command line refuses)
python drive.py part RANK OF HEAD_PORT KEY_FILE RANKS DRAIN_S    (likewise, of one replica with true ranks)
python drive.py generate MAX_TOKENS
"""

import asyncio
import json
import sys
from pathlib import Path

from gptoss_launch.launch.commands import generate, serve
from gptoss_launch.launch.follower import follow
from gptoss_launch.launch.nodes import Nodes, read_node_key
from gptoss_launch.launch.resolve import make_plan
from gptoss_launch.launch.restarts import Restarts
from gptoss_launch.launch.settings import ServeSettings
from gptoss_launch.launch.supervise import WORKER
from gptoss_launch.launch.tokenizer import load_tokenizer
from gptoss_launch.parallel.engine.request import Sampling
from gptoss_launch.parallel.errors import UserError


def main() -> None:
    what, *words = sys.argv[1:]
    restarts = Restarts((0.1,) if what == "node" else (0.1, 0.2, 0.4))
    try:
        if what in ("node", "part"):
            rank, count, port = map(int, words[:3])
            dp, ranks = (int(words[4]), 1) if what == "node" else (1, int(words[4]))
            worker = "fake_worker" if what == "node" else WORKER
            layout = {"machine": "cpu", "context_tokens": 4096, "dp": dp, "ranks": ranks, "nnodes": count}
            key_file = Path(words[3])
            nodes = Nodes(count, rank, "127.0.0.1", port, read_node_key(key_file))
            settings = ServeSettings(**layout, port=0, drain_s=float(words[5]), node_key_file=key_file)
            if rank:
                asyncio.run(follow(nodes, "tiny", settings.drain_s, worker, restarts=restarts))
            else:
                door = serve.open_door("tiny", settings, nodes)
                plan = make_plan("tiny", settings, need_weights=True)
                asyncio.run(serve.serve(plan, door, worker, restarts=restarts, nodes=nodes))
        elif what == "serve":
            layout = {"machine": "cpu", "context_tokens": 4096, "dp": int(words[1]) if words[2:] else 1, "ranks": 1}
            settings = ServeSettings(**layout, port=int(words[0]), drain_s=float(words[-1]))
            door = serve.open_door("tiny", settings)
            plan = make_plan("tiny", settings, need_weights=True)
            asyncio.run(serve.serve(plan, door, "fake_worker", restarts=restarts))
        else:
            settings = ServeSettings(machine="cpu", context_tokens=4096, dp=1, ranks=1)
            plan = make_plan("tiny", settings, need_weights=True)
            tokenizer = load_tokenizer(Path(plan.checkpoint))
            ids = generate.chat_prompt("Hello", None, None, tokenizer)
            request = generate.make_request(ids, int(words[0]), Sampling(), plan, tokenizer)
            answer = asyncio.run(generate.generate(plan, request, tokenizer, "fake_worker", harmony=True, show=False))
            print(json.dumps(answer.to_json() if answer else None))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
