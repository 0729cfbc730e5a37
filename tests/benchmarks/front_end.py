"""What a streamed token costs the HTTP process, with 500 streams for a minute and a stub in place of the engine.

    python tests/benchmarks/front_end.py [--streams 500] [--seconds 60] [--words 60] [--step-s 0.1] [--out FILE]

Prints one line of JSON. cpu_us_per_token: all CPU time of the HTTP process, requests and start of streams included.
late_p99_s: by how much the event loop was late, by the clock, so other work on the machine counts; turn_p99_s: what one
turn of it computed, CPU time. slowness: CPU time of a fixed piece of work, against that on
a quiet core; divide by it to compare machines.
"""

import argparse
import json
import platform
import sys
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import http_load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--words", type=int, default=40, help="of an answer; tiny takes five or six tokens for each")
    parser.add_argument("--step-s", type=float, default=0.1)
    parser.add_argument("--out", type=Path, help="a file that the line is appended to")
    given = parser.parse_args()
    row = http_load.measure(given.streams, given.seconds, given.words, given.step_s)
    about = {
        "benchmark": "front_end",
        "words": given.words,
        "step_s": given.step_s,
        "python": platform.python_version(),
    }
    line = json.dumps(about | row | {"date": date.today().isoformat()})
    print(line)
    if given.out:
        with given.out.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
