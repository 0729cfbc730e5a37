"""A resolved job -> the text of its batch script, over the templates in slurm/. A pure function of its arguments.

Values reach the shell quoted for it (shlex), and sbatch quoted for sbatch (`slurm_options`). Submits nothing.
"""

import importlib.resources
import re
import shlex
from functools import cache

from .slurm_options import sbatch_line
from .slurm_settings import Job, Kind

# kind: (what USR1, ahead of the time limit, is passed on as; the exit code that means "stopped as asked, can go on";
#        functions of its template that the nodes need; values that they need)
_NODE_PARTS: dict[Kind, tuple[str, int, str, str]] = {
    "serve": (
        "TERM",
        0,
        "on_node keep_joined",
        "",
    ),  # a server that is asked to end drains, ends with 0, and starts again
    "finetune": ("USR1", 75, "signal_ranks on_node", " torchrun ranks_per_node rendezvous"),
    "bench": ("TERM", 75, "on_node", ""),
    "preflight": ("TERM", 75, "on_node", ""),
}
_PLACE = re.compile(r"@([A-Z0-9_]+)@")


@cache
def _template(name: str) -> str:
    return (importlib.resources.files("gptoss_launch.slurm") / name).read_text(encoding="utf-8")


def _array_word(text: str) -> str:
    """Quoted for an array, where a bare comma looks like a mistake to shellcheck."""
    quoted = shlex.quote(text)
    return f"'{text}'" if quoted == text and "," in text else quoted


def render_script(job: Job, folder: str, version: str) -> str:
    """The whole script. folder: absolute path of the run folder. version: of gptoss-launch, for the header."""
    launching = job.launching
    usr1_as, stopped_code, functions, values = _NODE_PARTS[job.kind]
    places = {
        "KIND": job.kind,
        "VERSION": version,
        "OPTIONS": "\n".join(sbatch_line(name, value) for name, value in sorted(job.options)),
        "RUN_FOLDER": shlex.quote(folder),
        "PYTHON": shlex.quote(launching.python),
        "PAYLOAD": " ".join(map(_array_word, job.command)),
        "CONTAINER_IMAGE": shlex.quote(launching.container_image or ""),
        "CONTAINER_MOUNTS": shlex.quote(launching.container_mounts or ""),
        "SETUP": shlex.quote(launching.setup or ""),
        "INTERFACE": shlex.quote(launching.interface or ""),
        "MAX_REQUEUES": str(launching.max_requeues or 0),
        "ENVIRONMENT": "\n".join(f"export {name}={shlex.quote(value)}" for name, value in job.env)
        or "# (env: names no variables)",
        "USR1_AS": usr1_as,
        "STOPPED_CODE": str(stopped_code),
        "NODE_FUNCTIONS": functions,
        "NODE_VALUES": values,
        "PORT": "" if job.port is None else str(job.port),
        "HOST": shlex.quote(job.host) if job.host else "",
        "RANKS_PER_NODE": "" if launching.ranks_per_node is None else str(launching.ranks_per_node),
        "RENDEZVOUS": launching.rendezvous,
    }
    frame = _template("job.sbatch.frame").replace("@NODE@\n", _template(f"{job.kind}.sbatch.node") + "\n")
    # In one pass: a value that looks like a place is not filled in again.
    return _PLACE.sub(lambda place: places[place[1]], frame)
