"""`submit serve|finetune|bench|preflight`: a job for Slurm, written down whole before anything is submitted.

The job's id, and nothing else, goes to stdout. Loads no torch.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ...parallel.errors import UserError
from ..slurm_options import EITHER, FLAGS, KNOWN, REFUSED, VALUES, read_option
from ..slurm_settings import KINDS, Job, Kind, make_job, read_assignment, read_sections, site_file
from ..version import own_version

# Of sbatch's options, those that --help shows; the others are taken as well.
_SHOWN = {
    "partition": "Partition.",
    "account": "Account to charge.",
    "qos": "Quality of service.",
    "time": "Time limit, as sbatch takes it: minutes, H:M:S or D-H.",
    "nodes": "Nodes.",
    "gpus-per-node": "GPUs a node.",
    "cpus-per-task": "CPUs a node: there is one task on each.",
    "mem": "Host memory a node.",
    "constraint": "Features that nodes must have.",
    "exclude": "Nodes not to use.",
    "nodelist": "Nodes to use.",
    "reservation": "Reservation.",
    "dependency": "Jobs to wait for.",
    "mail-type": "When to send mail.",
}


def sbatch_options(command: Any) -> Any:
    """Decorator: every option of sbatch by its own names. They arrive as keyword arguments `sbatch_NAME`."""
    for name in reversed([*_SHOWN, *sorted({*KNOWN, *REFUSED} - {*_SHOWN, "wait"})]):
        short = {**VALUES, **FLAGS, **EITHER}.get(name, "")
        names = [f"--{name}", *([f"-{short}"] if short else []), f"sbatch_{name.replace('-', '_')}"]
        more: dict[str, Any] = {"help": _SHOWN.get(name), "hidden": name not in _SHOWN}
        if name in FLAGS or name in ("get-user-env", "parsable", "quiet", "test-only", "verbose"):
            more |= {"is_flag": True, "default": None}
        elif name in EITHER:
            more |= {"is_flag": False, "flag_value": "true"}
        command = click.option(*names, metavar=None if more.get("is_flag") else "VALUE", **more)(command)
    return command


def _flags(flags: dict[str, Any]) -> dict[str, "str | bool"]:
    names = {f"sbatch_{name.replace('-', '_')}": name for name in (*KNOWN, *REFUSED)}
    given = {names[key]: value for key, value in flags.items() if value is not None}
    return {name: read_option(name, value) for name, value in given.items()}


@click.group(no_args_is_help=False)
def command() -> None:
    """Submit a job to Slurm.

    Settings come from --config, a YAML file with the sections slurm (sbatch's options), env (variables) and run (what
    is run, and how), and from flags, which win. What holds for all jobs of a site stands in
    ~/.config/gptoss-launch/site.yaml.
    """


def _add(kind: Kind, help_text: str) -> None:
    @command.command(kind, help=help_text, epilog="All options of sbatch are taken, by their own names.")
    @click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="YAML with slurm, env and run.")
    @click.option("--set", "assignments", multiple=True, metavar="SECTION.KEY=VALUE", help="One setting; repeatable.")
    @sbatch_options
    @click.option("--render", is_flag=True, help="Print the script and submit nothing.")
    @click.option("--dry-run", is_flag=True, help="The same, and ask sbatch whether it would take it.")
    @click.option("--wait", is_flag=True, help="Wait for the job, and exit with its code.")
    @click.option("--timeout-s", type=click.FloatRange(0), metavar="SECONDS", help="With --wait: exit 124 after that.")
    @click.option("--follow", is_flag=True, help="Show its log, on stderr, until it has ended.")
    def of_kind(
        config: Path | None,
        assignments: tuple[str, ...],
        render: bool,
        dry_run: bool,
        wait: bool,
        timeout_s: float | None,
        follow: bool,
        **flags: Any,
    ) -> int:
        return submit(
            kind,
            config,
            assignments,
            _flags(flags),
            render=render,
            dry_run=dry_run,
            wait=wait,
            timeout_s=timeout_s,
            follow=follow,
        )


for _kind, _help in zip(
    KINDS,
    (
        "Serve a model on one node or several. `jobs endpoint` says where it answers.",
        "Fine-tune on one node or several; requeued at its time limit until it is done.",
        "Measure speed on one node.",
        "Look at every node before hours are spent on it.",
    ),
    strict=True,
):
    _add(_kind, _help)


def submit(
    kind: Kind,
    config: Path | None,
    assignments: tuple[str, ...],
    flags: dict[str, "str | bool"],
    *,
    render: bool,
    dry_run: bool,
    wait: bool,
    timeout_s: float | None,
    follow: bool,
) -> int:
    """The exit code. Raises UserError, SlurmRefusedError."""
    from .. import run_folder, slurm_query
    from ..slurm_script import render_script
    from ..slurm_settings import absolute_path

    job, plan = with_plan(read_job(kind, config, assignments, flags))
    check_training(job)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = Path(job.launching.folder or absolute_path(f"runs/{_file_name(str(job.option('job-name')))}-{stamp}"))
    script = render_script(job, str(folder), own_version())
    for line in remarks(job):
        click.echo(line, err=True)
    if render or dry_run:
        click.echo(script, nl=False)
        if not slurm_query.has("sbatch"):
            click.echo("no sbatch on the PATH: nothing was checked; take the script to a login node", err=True)
        elif dry_run:
            click.echo(slurm_query.test_only(script), err=True)
        return 0
    if not slurm_query.has("sbatch"):
        raise UserError("no sbatch on the PATH: this is no machine that submits to Slurm", "--render prints the script")
    run_folder.create_run_folder(folder, script, job.to_yaml(), plan)
    output = f"{folder}/slurm-%j.out" if job.output_is_default else None
    try:
        _make_output_folder(job)
        number = slurm_query.submit(folder / run_folder.SCRIPT, output)
    except UserError:
        run_folder.remove_run_folder(folder)
        raise
    run_folder.append_state(folder, number, "SUBMITTED", kind)
    try:
        run_folder.remember(number, folder)
    except OSError as error:
        click.echo(f"job {number} is found by its folder only: {error}", err=True)
    click.echo(number)
    click.echo(f"run folder {folder}", err=True)
    click.echo(f"gptoss-launch jobs status {number} says how it is, jobs logs -f {number} what it says", err=True)
    return _stay(number, folder, timeout_s, follow=follow) if wait or follow else 0


def read_job(kind: Kind, config: Path | None, assignments: tuple[str, ...], flags: dict[str, "str | bool"]) -> Job:
    """Command line > YAML > site file > defaults."""
    layers: list[dict[str, dict[str, Any]]] = []
    if site_file().exists():
        layers.append(read_sections(site_file(), None))
    if config is not None:
        layers.append(read_sections(config, kind))
    for text in assignments:
        section, key, value = read_assignment(text, kind)
        layers.append({section: {key: value}})
    layers.append({"slurm": flags})
    return make_job(kind, layers)


def with_plan(job: Job) -> tuple[Job, dict[str, Any] | None]:
    """The job and, where serve names the machine that it is for, the plan that it will run; its GPUs are asked for.

    Without a name the plan is made on the node, of what is there.
    """
    if job.kind != "serve" or "machine" not in job.payload:
        return job, None
    import dataclasses

    from ..resolve import make_plan
    from ..settings import ServeSettings

    fields = {one.metadata["flag"].replace("-", "_"): one for one in dataclasses.fields(ServeSettings)}
    given = {
        fields[key].name: fields[key].metadata["read"](value) for key, value in job.payload.items() if key in fields
    }
    nodes = str(job.option("nodes"))
    settings = ServeSettings(**given, nnodes=int(nodes) if nodes.isdigit() else 1)
    plan = make_plan(job.command[1], settings, need_weights=False)
    if plan.nodes < settings.nnodes:
        message = f"the plan for {plan.machine} gives work to {plan.nodes} of {settings.nnodes} nodes"
        raise UserError(message, f"--nodes={plan.nodes}, or more replicas: --set run.dp=...")
    needed = plan.gpus_of(0)
    if needed:
        asked = str(job.option("gpus-per-node") or "")
        count = asked.rpartition(":")[2]
        if not asked and not any(job.option(name) for name in ("gpus", "gres")):
            job = dataclasses.replace(job, options=(*job.options, ("gpus-per-node", str(needed))))
        elif count.isdigit() and int(count) < needed:
            raise UserError(
                f"the plan for {plan.machine} needs {needed} GPUs a node, gpus-per-node is {asked}",
                f"--gpus-per-node={needed}, or fewer --set run.ranks=... and run.dp=...",
            )
    return job, plan.to_json()


def check_training(job: Job) -> None:
    """Raises UserError for settings of finetune that its ranks would refuse, hours later and on all nodes.

    Where another interpreter or a container runs them, files and presets are its own."""
    if job.kind != "finetune" or job.launching.container_image or job.launching.python != sys.executable:
        return
    from ..finetune_settings import load_finetune_settings

    settings = load_finetune_settings(job.command[2], job.command[3:])
    for name, words in (("model", "a folder or a hub id"), ("data", "FILE.jsonl"), ("run", "a folder of all nodes")):
        if not getattr(settings, name):
            raise UserError(f"finetune: no {name}", f"set: [{name}=...] under run:, {words}; or in run.config")


def remarks(job: Job) -> list[str]:
    """What a person should know before the job waits in a queue."""
    lines = []
    if job.kind != "preflight" and not any(job.option(name) for name in ("gpus-per-node", "gpus", "gres")):
        lines.append("no gpus-per-node: the job asks for no GPU")
    if not any(job.option(name) for name in ("cpus-per-task", "cpus-per-gpu", "exclusive")):
        lines.append("no cpus-per-task: a node's ranks may have to share one CPU")
    if job.option("time") is None:
        lines.append("no time: the partition's default limit holds")
    if job.kind == "serve" and "api_key_file" not in job.payload:
        lines.append("no api_key_file: whoever reaches the node's port may use the server")
    return lines


def _stay(job: int, folder: Path, timeout_s: float | None, *, follow: bool) -> int:
    from ..job_logs import Tail, log_files
    from ..job_status import code_of, wait_for_end

    tail = Tail()

    def show() -> None:
        for _, text in tail.read(log_files(folder, job, None, None, errors=False)):
            click.echo(text, nl=False, err=True)

    beat: Callable[[], None] = show if follow else lambda: None
    status = wait_for_end(job, folder, timeout_s, beat)
    click.echo(f"job {job}: {status.state}, {status.reason}", err=True)
    return code_of(status)


def _make_output_folder(job: Job) -> None:
    """A missing folder of --output or --error is a job that dies without a word."""
    for name in ("output", "error"):
        path = job.option(name)
        if isinstance(path, str) and "/" in path and "%" not in path.rpartition("/")[0]:
            try:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"--{name} {path}: {error.strerror}", "name a writable folder") from None


def _file_name(text: str) -> str:
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_.") else "_" for letter in text)
