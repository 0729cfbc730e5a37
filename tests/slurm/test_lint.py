"""`lint`: each trap is found on its line, in a script that is right but for it; and nothing is found in a right one."""

from pathlib import Path

import pytest
from gptoss_launch.launch.cli import run
from gptoss_launch.launch.slurm_lint import lint

RIGHT = """\
#!/bin/bash
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1 --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --signal=B:USR1@120  # ahead of the limit
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -uo pipefail
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
trap 'kill -USR1 $P' USR1
srun --kill-on-bad-exit=1 --wait=60 bash -c 'exec torchrun --nnodes=$SLURM_NNODES --node-rank=$SLURM_NODEID \\
    --master-addr=$MASTER_ADDR --master-port=$MASTER_PORT train.py' &
P=$!
wait $P
[ "${SLURM_RESTART_COUNT:-0}" -gt 5 ] || scontrol requeue "$SLURM_JOB_ID"
"""
SRUN = "srun --kill-on-bad-exit=1 --wait=60 bash -c"

# (replaced in RIGHT, by what, line of the finding, part of its message)
TRAPS = [
    ("#!/bin/bash\n", "", 1, "no interpreter"),
    ("#SBATCH --nodes=2\n", "#SBATCH --nodes=2\r\n", 2, "CR LF"),
    ("#SBATCH --nodes=2", "#SBATCH --nodes=$N", 2, "--nodes is literally $N"),
    ("#SBATCH --nodes=2", "#SBATCH -N $N", 2, "--nodes is literally $N"),
    ("set -uo pipefail", "set -u\n#SBATCH --time=1", 10, "after the first command (line 9) is ignored"),
    ("#SBATCH --requeue", "# SBATCH --requeue", 6, "looks like an #SBATCH line and is a comment"),
    ("--output=%x-%j.out", "--output=logs/%j.out", 8, "the folder of --output, logs, does not exist"),
    ("#SBATCH --open-mode=append\n", "", 6, "writes its log anew"),
    ("${SLURM_RESTART_COUNT:-0}", "$N", 17, "without a bound"),
    ("--gpus-per-node=8", "--gpus-per-task=1", 3, "hides a rank's peers"),
    ("--ntasks-per-node=1", "--ntasks-per-node=8", 3, "8 tasks a node"),
    ("bash -c 'exec torchrun", "torchrun --node-rank=$SLURM_NODEID '", 13, "NODEID is expanded by the batch shell"),
    ("bash -c 'exec", "bash -c \"torchrun --node-rank=$SLURM_PROCID\" '", 13, "PROCID is expanded by the batch shell"),
    (f"{SRUN} 'exec torchrun", "torchrun '", 13, "without srun it runs on the first alone"),
    ("MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))", "MASTER_PORT=29500", 10, "a fixed port"),
    ("--master-port=$MASTER_PORT", "--rdzv-endpoint=$MASTER_ADDR:29500", 13, "a fixed port"),
    ('$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)', "$(hostname --ip-address)", 11, "127.0.1.1"),
    ('$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)', "localhost", 11, "its own head"),
    ("--master-port=$MASTER_PORT", "--rdzv-backend=c10d", 13, "c10d ignores --node-rank"),
    (SRUN, SRUN.replace("srun", "srun --export=ALL,NCCL_IB_HCA=mlx5_0,mlx5_1"), 13, "cut at commas"),
    ("#SBATCH --requeue", "#SBATCH --requeue --export=NONE", 6, "no PATH"),
    (" --kill-on-bad-exit=1", "", 13, "hold their GPUs"),
    (" --wait=60", "", 13, "the site's choice"),
    (" SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK", "", 13, "ranks share one CPU"),
    ("--signal=B:USR1@120", "--signal=USR1@120", 5, "torchrun, which dies"),
    ("trap 'kill -USR1 $P' USR1\n", "", 5, "no trap for it"),
    ("train.py' &\n", "train.py'\n", 13, "only after a command in the foreground"),
    ("set -uo pipefail", "export HF_TOKEN=hf_abcdefghijklmnopqrstuvwx", 9, "a secret"),
]  # fmt: skip


def test_a_right_script_has_none(tmp_path: Path) -> None:
    assert lint(RIGHT, tmp_path) == []


@pytest.mark.parametrize(("old", "new", "line", "message"), TRAPS, ids=[trap[3] for trap in TRAPS])
def test_trap(old: str, new: str, line: int, message: str, tmp_path: Path) -> None:
    assert RIGHT.count(old) >= 1
    found = lint(RIGHT.replace(old, new, 1), tmp_path)
    matching = [finding.line for finding in found if message in finding.message]
    assert matching == [line], found


def test_a_here_document_that_is_not_expanded_is_left_to_the_nodes(tmp_path: Path) -> None:
    text = RIGHT.replace("trap 'kill", "cat >node.sh <<'END'\ntorchrun --node-rank=$SLURM_NODEID\nEND\ntrap 'kill")
    assert lint(text, tmp_path) == []
    (found,) = lint(text.replace("'END'", "END"), tmp_path)
    assert found.line == 13 and "SLURM_NODEID" in found.message


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "job.sbatch"
    file.write_text(RIGHT.replace("#SBATCH --nodes=2", "#SBATCH --nodes=$N"))
    assert run(["lint", str(file)]) == 4
    out, _ = capsys.readouterr()
    assert out.startswith(f"{file}:2: #SBATCH expands no variables") and "\n    hint: " in out
    file.write_text(RIGHT)
    assert run(["lint", str(file)]) == 0
    assert capsys.readouterr().out == ""
    assert run(["lint", str(tmp_path / "none")]) == 2
