"""The leader's socket: all that has come is taken in at once, so that nothing waits for many steps behind a prompt."""

import socket
from pathlib import Path

from gptoss_launch.parallel.engine.front_ends import FrontEnds
from gptoss_launch.parallel.engine.request import Request
from gptoss_launch.parallel.engine.wire import Cancel, Generate, encode


def test_a_cancel_behind_long_prompts_is_heard_in_the_same_poll(tmp_path: Path) -> None:
    front_ends = FrontEnds(tmp_path / "s")
    asked = [Generate(Request(str(number), tuple(range(70_000, 80_000)), 5)) for number in range(3)]
    sent = [*asked, Cancel("2")]
    with front_ends._listener, front_ends._selector, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "s"))
        client.settimeout(5)
        assert list(front_ends.poll(5)) == [] and client.recv(1000)  # greeted
        client.sendall(b"".join(map(encode, sent)))  # 150 kB, which the kernel takes
        assert [message for _, message in front_ends.poll(5)] == sent
        client.sendall(encode(Cancel("1")))
        client.close()
        heard = [message for _ in range(2) for _, message in front_ends.poll(0)]
        assert heard == [Cancel("1"), None]
