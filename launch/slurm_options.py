"""The options of sbatch, each by its own name, and how a value is written on an #SBATCH line.

The table is `sbatch --help` of Slurm 22.05, with what 23.02 to 24.11 added. Options that the script sets itself, or
that would break it, are refused with the reason. Whether a partition or a node count exists, only sbatch knows.
"""

from typing import Any

from ..parallel.errors import UserError, did_you_mean

# Options with a value, and their one-letter names ("" for none).
VALUES = {
    **{"account": "A", "begin": "b", "clusters": "M", "constraint": "C", "cpus-per-task": "c", "dependency": "d"},
    **{"distribution": "m", "error": "e", "exclude": "x", "gpus": "G", "input": "i", "job-name": "J", "licenses": "L"},
    **{"extra-node-info": "B", "nodefile": "F", "nodelist": "w", "nodes": "N", "output": "o", "partition": "p"},
    **{"core-spec": "S", "qos": "q", "time": "t"},
    **dict.fromkeys(
        "acctg-freq bb bbf cluster-constraint comment container container-id cores-per-socket "
        "cpu-freq cpus-per-gpu deadline delay-boot extra gpu-bind gpu-freq gpus-per-node gres "
        "gres-flags hint mail-type mail-user mcs-label mem mem-bind mem-per-cpu mem-per-gpu mincpus network nice "
        "ntasks-per-core power prefer priority profile propagate reservation segment "
        "sockets-per-node switches thread-spec threads-per-core time-min tmp tres-per-task wait-all-nodes "
        "wckey".split(),
        "",
    ),
}
# Options without a value: `key: true` in YAML.
FLAGS = {
    **{"hold": "H", "no-kill": "k", "overcommit": "O", "oversubscribe": "s"},
    **dict.fromkeys(
        "contiguous ignore-pbs kill-on-invalid-dep no-requeue reboot requeue spread-job stepmgr use-min-nodes".split(),
        "",
    ),
}
EITHER = {"exclusive": ""}  # true, or exclusive: user
REFUSED = {
    "array": "one run folder holds one job; submit once for each configuration",
    "chdir": "paths in the script are absolute; give run.folder",
    "export": "a value with a comma is cut there; name variables under env: (all of the shell's are passed on besides)",
    "export-file": "name variables under env:",
    "get-user-env": "name variables under env:",
    "gid": "submit as that group",
    "gpus-per-task": "a rank would not see its peers' GPUs, which NCCL needs; give gpus-per-node",
    "gpus-per-socket": "give gpus-per-node",
    "open-mode": "the script appends, so that a requeued job keeps its log",
    "ntasks": "the script runs one task a node, which starts the node's ranks; give nodes",
    "ntasks-per-gpu": "the script runs one task a node, which starts the node's ranks",
    "ntasks-per-node": "the script runs one task a node, which starts the node's ranks; give run.ranks-per-node",
    "ntasks-per-socket": "the script runs one task a node, which starts the node's ranks",
    "parsable": "submit prints the job id alone as it is",
    "quiet": "submit prints the job id alone as it is",
    "signal": "give run.lead_s: how long before the time limit the ranks are told",
    "test-only": "give --dry-run",
    "uid": "submit as that user",
    "verbose": "run sbatch on what --render prints",
    "wait": "give submit's own --wait",
    "wrap": "the script is what is submitted",
}
KNOWN = {**VALUES, **FLAGS, **EITHER}

_LONGEST = 4000  # of a value; sbatch reads a line into a buffer of BUFSIZ (8192) bytes


def read_option(name: str, value: Any) -> "str | bool":
    """A value for option `name` as the script takes it: text, or True for an option without a value.

    False (an option to leave out) is taken for options without a value. Raises UserError.
    """
    if name in REFUSED:
        raise UserError(f"sbatch option {name} is not taken", REFUSED[name])
    if name not in KNOWN:
        raise UserError(f"no sbatch option {name!r}", did_you_mean(name, KNOWN))
    if isinstance(value, str) and name not in VALUES and value.lower() in ("true", "false"):
        value = value.lower() == "true"
    if isinstance(value, bool):
        if name in VALUES:
            raise UserError(f"sbatch option {name}: {value} is no value", "quote it in YAML if it is meant as text")
        return value
    if name in FLAGS:
        raise UserError(f"sbatch option {name} takes no value, not {value!r}", f"{name}: true")
    if not isinstance(value, (str, int, float)):
        raise UserError(f"sbatch option {name}: {value!r} is neither text nor a number", "write it as sbatch takes it")
    text = str(value)
    if not text or len(text) > _LONGEST or not text.isprintable():
        raise UserError(
            f"sbatch option {name}: {text[:40]!r} cannot stand on an #SBATCH line",
            f"1 to {_LONGEST} printable characters; no line breaks",
        )
    return text


def sbatch_line(name: str, value: "str | bool") -> str:
    """The #SBATCH line of an option. sbatch expands nothing there; inside `"..."` it takes a backslash before `"`."""
    if value is True:
        return f"#SBATCH --{name}"
    text = str(value)
    plain = all(letter.isascii() and (letter.isalnum() or letter in "-_.,:/=@%+[]") for letter in text)
    if not plain:
        escaped = text.replace("\\", "\\\\").replace('"', '\\"')
        text = f'"{escaped}"'
    return f"#SBATCH --{name}={text}"
