"""`jobs status|logs|cancel|requeue|exec|endpoint`: jobs that were submitted, by id or by run folder.

Results go to stdout, prose to stderr; --json gives one object. Loads no torch.
"""

import getpass
import ipaddress
import json as json_text
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import click

from ...parallel.errors import UserError

HEALTH_LIMIT_S = 3.0

_target = click.argument("target", metavar="ID|RUN")
_json = click.option("--json", is_flag=True, help="One JSON object on stdout, nothing else there.")


@click.group(no_args_is_help=False)
def command() -> None:
    """Follow, stop and enter jobs that were submitted, by their id or their run folder."""


def _print(fields: dict[str, Any], *, json: bool) -> None:
    if json:
        click.echo(json_text.dumps(fields))
        return
    width = max(map(len, fields))
    for name, value in fields.items():
        if value not in (None, ""):
            click.echo(f"{name:{width}}  {value}")


@command.command
@_target
@_json
def status(target: str, json: bool) -> None:
    """How a job is: its state, why, the rank that failed first, and its true exit code."""
    from ..job_status import STATES, find_job, status_of

    found = status_of(*find_job(target))
    if json:
        click.echo(json_text.dumps(found.to_json()))
        return
    words = STATES.get(found.state)
    failure = found.failure
    _print(
        {
            "job": found.job,
            "state": found.state + (f": {words}" if words and words != found.reason else ""),
            "reason": found.reason,
            "exit code": found.code,
            "failed first": f"rank {failure.rank} on {failure.host} (node {failure.node}) with {failure.code}"
            if failure
            else None,
            "attempt": found.attempt,
            "nodes": found.nodes,
            "start": found.start,
            "folder": found.folder,
            "said by": found.source,
        },
        json=False,
    )


@command.command
@_target
@click.option("-f", "--follow", is_flag=True, help="Go on until the job has ended.")
@click.option("--rank", type=click.IntRange(0), metavar="R", help="Of one rank.")
@click.option("--node", metavar="N|HOST", help="Of one node, by its place in the job or its name.")
@click.option("--errors", is_flag=True, help="Standard error of ranks alone.")
@_json
def logs(target: str, follow: bool, rank: int | None, node: str | None, errors: bool, json: bool) -> None:
    """What a job says: all of it, or ranks of the last attempt."""
    from ..job_logs import Tail, check_choice, log_files
    from ..job_status import find_job, wait_for_end

    job, folder = find_job(target)
    if not follow:
        check_choice(folder, rank, node)
    files = log_files(folder, job, rank, node, errors=errors)
    if json:
        click.echo(json_text.dumps({"job": job, "files": [str(file) for file in files]}))
        return
    tail, shown = Tail(), Path()

    def show() -> None:
        nonlocal shown
        for file, text in tail.read(log_files(folder, job, rank, node, errors=errors)):
            if file != shown and (shown != Path() or len(files) > 1):
                click.echo(f"==> {file.relative_to(folder)} <==", err=True)
            shown = file
            click.echo(text, nl=False)

    if follow:
        wait_for_end(job, folder, None, show)
    else:
        show()
        if shown == Path():
            click.echo(f"job {job} has said nothing yet", err=True)


@command.command
@_target
@click.option("--graceful", is_flag=True, help="Let it save and end by itself: it can go on with `jobs requeue`.")
@_json
def cancel(target: str, graceful: bool, json: bool) -> None:
    """End a job."""
    from .. import slurm_query
    from ..job_status import find_job, status_of
    from ..run_folder import CANCEL

    job, folder = find_job(target)
    found = status_of(job, folder)
    if found.ended:
        click.echo(f"job {job} has ended already: {found.state}", err=True)
    elif graceful and found.state == "RUNNING":
        try:
            (folder / CANCEL).touch()
        except OSError as error:
            hint = "only who owns the run folder can stop it gracefully"
            raise UserError(f"{folder / CANCEL}: {error.strerror}", hint) from None
        slurm_query.signal_batch(job, "USR1")
    else:
        slurm_query.cancel(job)
    fields = {"job": job, "was": found.state, "graceful": graceful and found.state == "RUNNING"}
    _print(fields, json=json)


@command.command
@_target
@_json
def requeue(target: str, json: bool) -> None:
    """Run a job again, under its id: from where it saved, if it did."""
    from .. import slurm_query
    from ..job_status import find_job, status_of
    from ..run_folder import CANCEL, SCRIPT

    job, folder = find_job(target)
    found = status_of(job, folder)
    if found.source in ("state.jsonl", "sacct"):
        again = f"submit it under a new id: sbatch {folder / SCRIPT}"
        raise slurm_query.UnknownJobError(f"Slurm has forgotten job {job}", again)
    (folder / CANCEL).unlink(missing_ok=True)
    slurm_query.requeue(job)
    _print({"job": job, "was": found.state}, json=json)


@command.command("exec")
@_target
@click.argument("words", metavar="-- COMMAND...", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("--node", metavar="N|HOST", help="Where: the place in the job or the name.  [default: 0]")
@_json
def exec_(target: str, words: tuple[str, ...], node: str | None, json: bool) -> int:
    """Run a command on a node of a running job, beside it; exits with the command's code."""
    from .. import slurm_query
    from ..job_status import find_job, status_of

    job, folder = find_job(target)
    found = status_of(job, folder)
    if found.state != "RUNNING":
        raise UserError(f"job {job} does not run: {found.state}", f"gptoss-launch jobs status {job}")
    names = slurm_query.hosts(found.nodes)
    if node is not None and node.isdigit() and int(node) < len(names):
        node = names[int(node)]
    if node is not None and node not in names:
        raise UserError(f"no node {node!r} in job {job}", f"known: {', '.join(names)}")
    terminal = sys.stdin.isatty() and sys.stdout.isatty() and not json
    line = slurm_query.exec_command(job, node or names[0], list(words), terminal=terminal)
    done = subprocess.run(line, capture_output=json, text=True, errors="replace", check=False)
    if json:
        fields = {"job": job, "node": node or names[0], "code": done.returncode}
        click.echo(json_text.dumps(fields | {"stdout": done.stdout, "stderr": done.stderr}))
    return done.returncode


@command.command
@_target
@click.option("--wait-s", type=click.FloatRange(0), default=0, metavar="SECONDS", help="Wait until it is ready.")
@_json
def endpoint(target: str, wait_s: float, json: bool) -> int:
    """Where a serve job answers: its URL, whether it is ready, and an ssh line to reach it by."""
    from ..job_status import find_job, login_host, status_of

    job, folder = find_job(target)
    deadline_s = time.monotonic() + wait_s
    while True:
        found = status_of(job, folder)
        place = read_endpoint(folder) if found.state == "RUNNING" else None
        health = health_of(place) if place else "not running"
        if health == "ready" or found.ended or time.monotonic() >= deadline_s:
            break
        time.sleep(0.5)
    if place is None:
        if found.state == "RUNNING":
            raise UserError(f"job {job} has no endpoint", "only a serve job has one, once it has begun")
        raise UserError(f"job {job} does not run: {found.state}, {found.reason}", f"gptoss-launch jobs status {job}")
    fields = {
        "job": job,
        "url": f"http://{bracketed(place['address'])}:{place['port']}/v1",
        "health": health,
        "node": place["node"],
        "ssh": ssh_line(place, login_host()),
    }
    _print(fields, json=json)
    return 124 if wait_s and health != "ready" else 0


def read_endpoint(folder: Path) -> dict[str, Any] | None:
    """{node, address, port} as the script wrote it, or None."""
    from ..run_folder import ENDPOINT

    try:
        return json_text.loads((folder / ENDPOINT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def health_of(place: dict[str, Any]) -> str:
    """ready, loading (alive, and not ready), or unreachable from here."""
    base = f"http://{bracketed(place['address'])}:{place['port']}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for path, word in (("/ready", "ready"), ("/health", "loading")):
        try:
            with opener.open(base + path, timeout=HEALTH_LIMIT_S):
                return word
        except (OSError, ValueError):
            pass
    return "unreachable from here"


def ssh_line(place: dict[str, Any], login: str) -> str:
    """For the user's own machine: the server's port there, through the login node; an address that only the node itself
    has is reached on the node."""
    try:
        local = ipaddress.ip_address(place["address"]).is_loopback
    except ValueError:
        local = place["address"] == "localhost"
    user, port, address = getpass.getuser(), place["port"], bracketed(place["address"])
    if local:
        return f"ssh -N -L {port}:{address}:{port} -J {user}@{login} {user}@{place['node']}"
    return f"ssh -N -L {port}:{address}:{port} {user}@{login}"


def bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address
