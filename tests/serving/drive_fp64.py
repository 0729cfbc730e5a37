"""Serves tiny with nothing fake, in fp64, which no flag offers: there rounding decides no token."""

import asyncio
import dataclasses

from gptoss_launch.launch.commands import serve
from gptoss_launch.launch.resolve import make_plan
from gptoss_launch.launch.settings import ServeSettings
from gptoss_launch.launch.supervise import WORKER


def main() -> None:
    settings = ServeSettings(machine="cpu", context_tokens=1024, ranks=1, dp=1, port=0)
    door = serve.open_door("tiny", settings)
    plan = make_plan("tiny", settings, need_weights=True)
    # plain: the CPU's own experts are for the dtypes that flags offer
    plan = dataclasses.replace(plan, dtype="fp64", residual_dtype="fp64", kv_dtype="fp64", kernels="plain")
    asyncio.run(serve.serve(plan, door, WORKER))


if __name__ == "__main__":
    main()
