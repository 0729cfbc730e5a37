"""A real Slurm on one machine, for tests: munged, slurmctld, and slurmd for each node in its own network namespace.

Nodes have host names, addresses and ports of their own, as on a cluster; files and processes are shared. They are
called node2 and node10, so that an order by name and Slurm's own order differ. Needs root, and Debian's packages, which
it installs. No accounting. Everything lives under one folder; `down` ends what `up` started, and nothing else.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

NODES = {"node2": "203.0.113.12", "node10": "203.0.113.20"}  # TEST-NET-3 (RFC 5737): never routed
LOGIN = "203.0.113.1"
BRIDGE = "gltbr0"
GPUS = 4
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "iproute2")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip")
FREEZER = Path("/sys/fs/cgroup/freezer")

# Why each line that is not plain is there:
#   NoCtldInAddrAny: listen on the test net alone. cred_expire: a requeued job waits that long. config_overrides: nodes
#   claim more CPUs than there are. MpiDefault, TaskPlugin, JobAcctGather: nothing that needs more packages.
CONFIG = """\
ClusterName=gptosslaunchtest
SlurmctldHost={host}({login})
SlurmctldPort=17817
SlurmdPort=17818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock,cred_expire=5
CommunicationParameters=NoCtldInAddrAny
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SchedulerParameters=bf_interval=1,batch_sched_delay=0,sched_interval=2,sched_min_interval=0
MinJobAge=3600
KillWait=5
SlurmdTimeout=60
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=debug Nodes={nodes} Default=YES MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=off
PartitionName=spot Nodes={nodes} MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=requeue GraceTime=20
"""
NODE = (
    "NodeName={name} NodeHostname={name} NodeAddr={address} CPUs=8 Boards=1 SocketsPerBoard=1 CoresPerSocket=8 "
    "ThreadsPerCore=1 RealMemory=8000 Gres=gpu:{gpus} State=UNKNOWN\n"
)


class ClusterError(RuntimeError):
    """It cannot be had here; the message says why."""


def run(*command: object, check: bool = True, **more: object) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=240, **more)  # type: ignore[call-overload]
    if check and done.returncode != 0:
        raise ClusterError(f"{' '.join(map(str, command))}: {done.returncode}: {done.stderr.strip()[-500:]}")
    return done


def install() -> None:
    """Debian's packages, if they are not there. Raises ClusterError."""
    if all(shutil.which(program) for program in PROGRAMS):
        return
    if not shutil.which("apt-get"):
        raise ClusterError("no Slurm, and no apt-get to install it with")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    run("apt-get", "update", "-qq", env=environment)
    run("apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES, env=environment)


class Cluster:
    """proctrack: cgroup, as clusters have it, or linuxproc: they differ in which processes a signal reaches.

    root: a short path, for sockets are in it. nodes: name -> address; one cluster at a time can be up.
    """

    def __init__(self, root: Path, proctrack: str, nodes: Mapping[str, str] = NODES) -> None:
        self.nodes = nodes
        self.root = root
        self.proctrack = proctrack
        self.environment = {"SLURM_CONF": str(root / "slurm.conf")}

    def up(self) -> None:
        """Returns once all nodes are idle. Raises ClusterError."""
        if self.proctrack == "cgroup" and not os.access(FREEZER, os.W_OK):
            raise ClusterError("proctrack/cgroup needs a writable cgroup v1 freezer")
        self._write_files()
        self._network()
        munge = [f"--{name}={self.root / file}" for name, file in MUNGE.items()]
        run("munged", "--force", *munge)
        hosts = f"mount --bind '{self.root}/hosts' /etc/hosts && cd '{self.root}'"
        configured = f"-f '{self.root}/slurm.conf'"
        # slurmctld listens on what the host's name resolves to, so it gets an /etc/hosts of its own.
        self._start("unshare", "--mount", "sh", "-c", f"{hosts} && exec slurmctld {configured}")
        self._wait("slurmctld", lambda: "is UP" in self.slurm("scontrol", "ping").stdout)
        for name in self.nodes:
            program = f"hostname {name} && {hosts} && exec slurmd -N {name} {configured}"
            namespace = f"--net=/run/netns/glt{name}"
            self._start("nsenter", namespace, "unshare", "--uts", "--mount", "sh", "-c", program)
        idle = ["idle"] * len(self.nodes)
        states = ("sinfo", "-h", "-N", "-p", "debug", "-o", "%T")
        self._wait("nodes", lambda: self.slurm(*states).stdout.split() == idle)

    def down(self) -> None:
        """Ends jobs, daemons and namespaces."""
        if (self.root / "slurmctld.pid").exists():
            # slurmd leaves what it started running: jobs first
            for state in ("PENDING", "RUNNING", "SUSPENDED"):
                self.slurm("scancel", f"--state={state}")
            self._wait("jobs to end", lambda: not self.slurm("squeue", "-h").stdout.strip(), give_up=False)
        for pid_file in (*self.root.glob("slurmd.*.pid"), self.root / "slurmctld.pid", self.root / "munged.pid"):
            self._stop(pid_file)
        names = {*self.nodes, *(path.name[3:] for path in Path("/run/netns").glob("glt*"))}  # whoever brought them up
        for link in Path("/sys/class/net").glob("gltv*"):  # now, and not when the kernel ends the namespace
            run("ip", "link", "del", link.name, check=False)
        for name in names:
            if Path(f"/run/netns/glt{name}").exists():
                for pid in run("ip", "netns", "pids", f"glt{name}", check=False).stdout.split():
                    os.kill(int(pid), signal.SIGKILL)
                run("ip", "netns", "del", f"glt{name}", check=False)
        run("ip", "link", "del", BRIDGE, check=False)
        for name in names:
            for folder in sorted(FREEZER.glob(f"slurm_{name}/**/"), reverse=True):
                try:
                    folder.rmdir()
                except OSError:
                    pass
        shutil.rmtree(self.root, ignore_errors=True)

    def slurm(self, *command: str) -> "subprocess.CompletedProcess[str]":
        """One of Slurm's programs, as on the login node; its exit code is the caller's to look at."""
        return run(*command, check=False, env=os.environ | self.environment)

    def plug(self, name: str, *, out: bool) -> None:
        """Pulls the network cable of a node, or puts it back."""
        run("ip", "link", "set", f"gltv{list(self.nodes).index(name)}", "down" if out else "up")

    def processes(self, name: str, *words: str) -> list[int]:
        """Those on a node whose command line has one of `words` in it, but for shells."""
        found = []
        for pid in run("ip", "netns", "pids", f"glt{name}").stdout.split():
            try:
                line = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if Path(line[0]).name not in ("bash", "slurmstepd:") and any(word in line for word in words):
                found.append(int(pid))
        return found

    def _write_files(self) -> None:
        for folder in ("state", *(f"spool.{name}" for name in self.nodes)):
            (self.root / folder).mkdir(parents=True)
        key = self.root / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        host = os.uname().nodename.partition(".")[0]
        names = ",".join(self.nodes)
        text = CONFIG.format(host=host, login=LOGIN, root=self.root, proctrack=self.proctrack, nodes=names)
        lines = text.splitlines(keepends=True)
        nodes = [NODE.format(name=name, address=address, gpus=GPUS) for name, address in self.nodes.items()]
        (self.root / "slurm.conf").write_text("".join([*lines[:-2], *nodes, *lines[-2:]]))
        for gpu in range(GPUS):  # a GPU must be a character device; this one is /dev/null
            os.mknod(self.root / f"nvidia{gpu}", 0o666 | 0o020000, os.makedev(1, 3))
        gpus = "".join(f"NodeName={names} Name=gpu File={self.root}/nvidia{gpu}\n" for gpu in range(GPUS))
        (self.root / "gres.conf").write_text(gpus)
        version = run("slurmctld", "-V").stdout.split()[1]
        disabled = self.proctrack != "cgroup" and tuple(map(int, version.split(".")[:2])) >= (23, 11)
        (self.root / "cgroup.conf").write_text(f"CgroupPlugin={'disabled' if disabled else 'cgroup/v1'}\n")
        hosts = [f"127.0.0.1 localhost\n{LOGIN} {host}\n", *(f"{at} {name}\n" for name, at in self.nodes.items())]
        (self.root / "hosts").write_text("".join(hosts))

    def _network(self) -> None:
        run("ip", "link", "add", BRIDGE, "type", "bridge")
        run("ip", "address", "add", f"{LOGIN}/24", "dev", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")
        for number, (name, address) in enumerate(self.nodes.items()):
            namespace, link = f"glt{name}", f"gltv{number}"
            run("ip", "netns", "add", namespace)
            run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", namespace)
            run("ip", "link", "set", link, "master", BRIDGE, "up")
            run("ip", "-n", namespace, "link", "set", "lo", "up")
            run("ip", "-n", namespace, "address", "add", f"{address}/24", "dev", "eth0")
            run("ip", "-n", namespace, "link", "set", "eth0", "up")

    def _start(self, *command: str) -> None:
        """A daemon: it goes into the background by itself, and keeps what it inherits open."""
        log = (self.root / "start.log").open("a")
        with log:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=60, check=False)
        if done.returncode != 0:
            raise ClusterError(f"{command[-1]}: {done.returncode}: {(self.root / 'start.log').read_text()[-500:]}")

    def _stop(self, pid_file: Path) -> None:
        try:
            pid = int(pid_file.read_text())
            os.kill(pid, signal.SIGTERM)
        except (OSError, ValueError):
            return
        deadline_s = time.monotonic() + 10
        while not _dead(pid):
            if time.monotonic() > deadline_s:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def _wait(self, what: str, ready: Callable[[], bool], *, give_up: bool = True) -> None:
        deadline_s = time.monotonic() + 20
        while not ready():
            if time.monotonic() > deadline_s:
                if give_up:
                    logs = "".join(path.read_text()[-800:] for path in self.root.glob("*.log"))
                    raise ClusterError(f"no {what} in 20 s: {logs}")
                return
            time.sleep(0.1)


MUNGE = {
    "key-file": "munge.key",
    "socket": "munge.sock",
    "seed-file": "munge.seed",
    "pid-file": "munged.pid",
    "log-file": "munged.log",
}


def _dead(pid: int) -> bool:
    """Gone, or a zombie, as where PID 1 does not reap."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
