"""The traps of batch scripts: what Slurm accepts, and what then fails at night, hangs, or is silently ignored.

A table of checks over the lines of a script. Reads text, not shell: it may miss what hides behind variables, and knows
no cluster.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Finding:
    """line: from 1."""

    line: int
    message: str
    hint: str


@dataclass(frozen=True)
class _Script:
    """options: (line, name, value) of #SBATCH lines that count. code: (line, text) of commands, continued lines put
    together; in a here document that is not expanded, `$` has a backslash in front. folder: where the script is."""

    text: str
    options: tuple[tuple[int, str, str], ...]
    code: tuple[tuple[int, str], ...]
    folder: Path

    def option(self, name: str) -> tuple[int, str] | None:
        return next(((line, value) for line, one, value in reversed(self.options) if one == name), None)

    def find(self, pattern: str) -> Iterator[tuple[int, str]]:
        for line, text in self.code:
            if re.search(pattern, text):
                yield line, text

    @property
    def nodes(self) -> str:
        found = self.option("nodes")
        return found[1] if found else "1"


_SHORT = {
    **{"A": "account", "a": "array", "c": "cpus-per-task", "D": "chdir", "d": "dependency", "e": "error"},
    **{"G": "gpus", "J": "job-name", "N": "nodes", "n": "ntasks", "o": "output", "p": "partition", "t": "time"},
    **{"w": "nodelist", "x": "exclude", "q": "qos", "C": "constraint"},
}
_LAUNCHER = r"\b(torchrun|torch\.distributed\.(run|launch)|accelerate\s+launch|deepspeed)\b"
_RANK_VARIABLE = r"\$\{?SLURM_(PROCID|NODEID|LOCALID)\b"


def lint(text: str, folder: Path) -> list[Finding]:
    """Every trap that is found, by line. folder: where the script is, for relative paths in it."""
    script = _read(text, folder)
    found = [finding for check in _CHECKS for finding in check(script)]
    return sorted(found, key=lambda finding: (finding.line, finding.message))


def _read(text: str, folder: Path) -> _Script:
    options: list[tuple[int, str, str]] = []
    code: list[tuple[int, str]] = []
    whole, began, document = "", 0, None  # document: (the word that ends it, whether it is expanded)
    for number, raw in enumerate(text.split("\n"), 1):
        line = raw.rstrip("\r")
        if document:
            if line.strip() == document[0]:
                document = None
            else:
                code.append((number, line if document[1] else line.replace("$", "\\$")))
            continue
        if not whole and line.startswith("#SBATCH"):
            if not code:
                options += [(number, name, value) for name, value in _options(line)]
            continue
        if not whole and (line.lstrip().startswith("#") or not line.strip()):
            continue
        began = began or number
        whole += line[:-1] + " " if line.endswith("\\") else line
        if not line.endswith("\\"):
            code.append((began, _without_comment(whole)))
            if start := re.search(r"(?<!<)<<-?\s*([\"']?)(\w+)\1(?!<)", whole):
                document = (start[2], not start[1])
            whole, began = "", 0
    if whole:
        code.append((began, _without_comment(whole)))
    return _Script(text, tuple(options), tuple(code), folder)


def _options(line: str) -> Iterator[tuple[str, str]]:
    """(long name, value) of each option on an #SBATCH line."""
    words: list[str] = re.findall(r"""(?:"(?:\\.|[^"])*"|'[^']*'|[^\s"'])+""", line.removeprefix("#SBATCH"))
    at = 0
    while at < len(words) and not words[at].startswith("#"):
        word, at = words[at], at + 1
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
        elif word.startswith("-") and len(word) > 1:
            name, equals, value = _SHORT.get(word[1], word[1]), word[2:], word[2:].removeprefix("=")
        else:
            continue
        if not equals and at < len(words) and not words[at].startswith(("-", "#")):
            value, at = words[at], at + 1
        yield name, value.strip("\"'")


def _without_comment(line: str) -> str:
    return re.sub(r"(^|\s)#\s.*$", "", line)


# --- the checks


def _first_line(script: _Script) -> Iterator[Finding]:
    if not script.text.startswith("#!"):
        yield Finding(1, "the first line names no interpreter: sbatch refuses the script", "#!/bin/bash")
    for number, line in enumerate(script.text.split("\n"), 1):
        if line.endswith("\r"):
            yield Finding(
                number, "lines end in CR LF, as on Windows: sbatch refuses the script", "sed -i 's/\\r$//' FILE"
            )
            return


def _misplaced(script: _Script) -> Iterator[Finding]:
    begun = script.code[0][0] if script.code else None
    for number, line in enumerate(script.text.split("\n"), 1):
        if begun and number > begun and line.startswith("#SBATCH"):
            message = f"an #SBATCH line after the first command (line {begun}) is ignored without a word"
            yield Finding(number, message, "move it above the first command")
        if re.match(r"\s+#SBATCH\s+-|#+\s+SBATCH\s+-|##SBATCH\s+-", line):
            yield Finding(number, "looks like an #SBATCH line and is a comment", "#SBATCH must begin the line")


def _unexpanded(script: _Script) -> Iterator[Finding]:
    for line, name, value in script.options:
        if "$" in value or "`" in value:
            message = f"#SBATCH expands no variables: --{name} is literally {value}"
            yield Finding(line, message, f"give it on the command line: sbatch --{name}=... FILE")


def _output(script: _Script) -> Iterator[Finding]:
    for line, name, value in script.options:
        if name in ("output", "error") and "/" in value and "$" not in value:
            parent = Path(value).parent
            if "%" not in str(parent) and str(parent) != "/dev" and not (script.folder / parent).is_dir():
                message = f"the folder of --{name}, {parent}, does not exist: the job would die without a trace"
                yield Finding(line, message, f"mkdir -p {parent} before sbatch")


def _requeue_log(script: _Script) -> Iterator[Finding]:
    requeue = script.option("requeue") or next(script.find(r"scontrol\s+requeue"), None)
    if requeue and (script.option("open-mode") or (0, ""))[1] != "append":
        yield Finding(requeue[0], "a requeued job writes its log anew, over the old one", "#SBATCH --open-mode=append")


def _requeue_bound(script: _Script) -> Iterator[Finding]:
    if not re.search(r"SLURM_RESTART_COUNT|max_?requeue|max_?restart|max_?retr", script.text, re.IGNORECASE):
        for line, _ in script.find(r"scontrol\s+requeue"):
            message = "requeues itself without a bound: a job that always fails never leaves the queue"
            yield Finding(line, message, "compare ${SLURM_RESTART_COUNT:-0} with a limit first")


def _gpus_per_task(script: _Script) -> Iterator[Finding]:
    hint = "--gpus-per-node, so that all GPUs of a node are seen by its ranks"
    message = "--gpus-per-task hides a rank's peers, and NCCL fails with 'invalid device ordinal'"
    if found := script.option("gpus-per-task"):
        yield Finding(found[0], message, hint)
    for line, _ in script.find(r"\bsrun\b.*--gpus-per-task"):
        yield Finding(line, message, hint)


def _tasks(script: _Script) -> Iterator[Finding]:
    found = script.option("ntasks-per-node")
    if found and found[1] not in ("", "1") and any(script.find(_LAUNCHER)):
        message = f"{found[1]} tasks a node, and each starts a launcher that itself starts a rank for each GPU"
        yield Finding(found[0], message, "#SBATCH --ntasks-per-node=1")


def _early_rank(script: _Script) -> Iterator[Finding]:
    for line, text in script.find(_RANK_VARIABLE):
        # Inside '...' or behind a backslash it is left to the shell on the node.
        outside = re.sub(r"'[^']*'", "", text)
        if re.search(rf"(?<!\\){_RANK_VARIABLE}", outside) and re.search(rf"\bsrun\b|{_LAUNCHER}", outside):
            variable = re.search(_RANK_VARIABLE, outside)
            name = f"SLURM_{variable[1]}" if variable else "the variable"
            message = f"{name} is expanded by the batch shell, so that it is 0 on every node"
            yield Finding(line, message, f"srun bash -c '... ${name} ...', in single quotes")


def _without_srun(script: _Script) -> Iterator[Finding]:
    if script.nodes in ("", "1"):
        return
    srun = any(script.find(r"\bsrun\b"))
    for line, _ in script.find(rf"^\s*(exec\s+|time\s+)?(\S*python3?\s+-m\s+)?{_LAUNCHER}"):
        if not srun:
            message = f"{script.nodes} nodes are asked for, and without srun it runs on the first alone"
            yield Finding(line, message, "srun --ntasks-per-node=1 torchrun ...")


def _port(script: _Script) -> Iterator[Finding]:
    flags = r"--(master|main_process)[-_]port[= ]\d{4,5}\b|--rdzv[-_]endpoint[= ]\S+:\d{4,5}\b"
    for line, _ in script.find(rf"MASTER_PORT\s*=\s*[\"']?\d{{4,5}}\b|{flags}"):
        message = "a fixed port: two jobs on one node meet there, and one joins or kills the other"
        yield Finding(line, message, "MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))")


def _head(script: _Script) -> Iterator[Finding]:
    for line, _ in script.find(r"hostname\s+(-i\b|--ip-address)"):
        message = "hostname --ip-address may be 127.0.1.1 or two addresses: other nodes do not find the first one"
        yield Finding(line, message, 'scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1')
    if script.nodes not in ("", "1"):
        for line, _ in script.find(r"(MASTER_ADDR\s*=\s*[\"']?|--master[-_]addr[= ]|endpoint[= ])(localhost|127\.)"):
            message = "every node would be its own head: it hangs until the rendezvous times out"
            yield Finding(line, message, "the first of scontrol show hostnames")


def _c10d(script: _Script) -> Iterator[Finding]:
    for line, text in script.find(r"--rdzv[-_]backend[= ]c10d"):
        if re.search(r"--node[-_]rank", text):
            message = "c10d ignores --node-rank: ranks follow the order of host names, node10 before node2"
            yield Finding(line, message, "static rendezvous: --node-rank, --master-addr and --master-port alone")


def _export(script: _Script) -> Iterator[Finding]:
    where = [(line, f"--{name}={value}") for line, name, value in script.options if name == "export"]
    where += list(script.find(r"\b(srun|sbatch)\b.*--export"))
    for line, text in where:
        value = re.search(r"--export[= ](\"[^\"]*\"|'[^']*'|\S+)", text)
        parts = value[1].strip("\"'").split(",") if value else []
        if any("=" in part for part in parts) and any(
            "=" not in part and part not in ("ALL", "NONE", "NIL") for part in parts
        ):
            message = "--export is cut at commas: a value with one loses what follows"
            yield Finding(line, message, "export NAME=value in the script")
    none = script.option("export")
    if none and none[1] in ("NONE", "NIL") and "SLURM_EXPORT_ENV" not in script.text and any(script.find(r"\bsrun\b")):
        message = "--export=NONE reaches srun, whose steps then have no PATH"
        yield Finding(none[0], message, "unset SLURM_EXPORT_ENV before srun")


def _srun(script: _Script) -> Iterator[Finding]:
    if script.nodes in ("", "1"):
        return
    for line, text in script.find(r"(^|[;&|(]\s*|\s)srun\s.*(" + _LAUNCHER + r"|python|bash|\.sh)"):
        # srun -w head hostname and the like ask one node something
        if re.search(r"--nodes[= ]1\b|\s-N\s*1\b", text):
            continue
        if not re.search(r"--kill-on-bad-exit|\s-K", text):
            message = "when one node fails, the others wait for it and hold their GPUs for hours"
            yield Finding(line, message, "srun --kill-on-bad-exit=1 --wait=60")
        elif not re.search(r"--wait|\s-W", text):
            message = "how long the other nodes may go on after the first ended is the site's choice"
            yield Finding(line, message, "srun --wait=60")


def _cpus(script: _Script) -> Iterator[Finding]:
    found = script.option("cpus-per-task")
    if found and "SRUN_CPUS_PER_TASK" not in script.text:
        for line, text in script.find(r"(^|[;&|(]\s*|\s)srun\s.*(" + _LAUNCHER + r"|python|bash)"):
            if not re.search(r"--cpus-per-task|\s-c\s*\d", text):
                message = "since Slurm 22.05 srun does not take --cpus-per-task from sbatch: ranks share one CPU"
                yield Finding(line, message, "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK")
                return


def _signals(script: _Script) -> Iterator[Finding]:
    signal = script.option("signal")
    if signal and "USR1" in signal[1] and "B:" not in signal[1] and any(script.find(_LAUNCHER)):
        message = "USR1 goes to torchrun, which dies of it, and its ranks never see it"
        yield Finding(
            signal[0], message, "#SBATCH --signal=B:USR1@180, a trap, and a wrapper that passes it to the ranks"
        )
    trap = next(script.find(r"^\s*trap\s+(?!['\"]?['\"]?\s*(-|EXIT))\S.*\b(USR1|USR2|TERM|SIGUSR1|SIGTERM)\b"), None)
    if signal and "B:" in signal[1] and trap is None:
        yield Finding(signal[0], "the batch shell gets a signal and has no trap for it: it dies", "trap ... USR1")
    if trap:
        for line, text in script.find(r"^\s*(exec\s+)?srun\b"):
            if line > trap[0] and not re.search(r"&\s*$", text):
                message = f"a trap (line {trap[0]}) runs only after a command in the foreground has ended"
                yield Finding(line, message, "srun ... & wait $!")


def _secret(script: _Script) -> Iterator[Finding]:
    for line, _ in script.find(
        r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9-]{20,}|\w*(TOKEN|SECRET|PASSWORD|API_KEY)=[\"']?[A-Za-z0-9_-]{8,})"
    ):
        message = "looks like a secret: whoever reads the script, or `scontrol show job`, has it"
        yield Finding(line, message, "export it in the shell that submits; sbatch passes it on")


_CHECKS: tuple[Callable[[_Script], Iterator[Finding]], ...] = (
    _first_line,
    _misplaced,
    _unexpanded,
    _output,
    _requeue_log,
    _requeue_bound,
    _gpus_per_task,
    _tasks,
    _early_rank,
    _without_srun,
    _port,
    _head,
    _c10d,
    _export,
    _srun,
    _cpus,
    _signals,
    _secret,
)
