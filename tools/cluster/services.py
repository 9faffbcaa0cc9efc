"""A Slurm with two nodes and an sshd, all on loopback, in a folder of their own; each ends with this process.

They are Debian's packages slurm-wlm, munge and openssh-server, started as root: Slurm then trusts this user. Nothing
of the machine's own configuration is read or written, apart from sshd's empty folder /run/sshd.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "sshd", "ssh-keygen", "ssh")
PLACES = f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/sbin"
READY_SECONDS = 60.0
CONFIGURATION = """
ClusterName=loop
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge.socket,cred_expire=10
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmctldPidFile={root}/ctld.pid
SlurmctldPort={ports[0]}
SlurmdPidFile={root}/slurmd.%n.pid
SlurmdSpoolDir={root}/spool.%n
StateSaveLocation={root}/state
SlurmctldLogFile={root}/ctld.log
SlurmdLogFile={root}/slurmd.%n.log
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=1,bf_interval=2,sched_interval=2,requeue_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdTimeout=15
KillWait=20
MinJobAge=300
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""
SSHD = """
Port {port}
ListenAddress 127.0.0.1
HostKey {root}/host_key
AuthorizedKeysFile {root}/key.pub
PidFile {root}/sshd.pid
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
"""


def missing_programs() -> list[str]:
    """What is not installed here."""
    return [name for name in PROGRAMS if shutil.which(name, path=PLACES) is None]


def program(name: str) -> str:
    """The path of an installed program."""
    found = shutil.which(name, path=PLACES)
    assert found is not None, name
    return found


def until(condition: Callable[[], object], what: str, seconds: float = READY_SECONDS) -> None:
    """Wait for a condition; raises RuntimeError after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nothing listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@dataclass
class Services:
    """The running programs, and how clients find them."""

    root: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    ssh_port: int = 0

    @property
    def configuration(self) -> Path:
        """What SLURM_CONF must name."""
        return self.root / "slurm.conf"

    @property
    def ssh_options(self) -> list[str]:
        """The options of ssh that reach the sshd."""
        known = f"UserKnownHostsFile={self.root / 'known_hosts'}"
        return ["-F", "none", "-p", str(self.ssh_port), "-i", str(self.root / "key"), "-o", known]

    def start(self, name: str, *command: str) -> None:
        """Start a program that stays in the foreground."""
        log = (self.root / f"{name}.out").open("ab")
        environment = {**os.environ, "SLURM_CONF": str(self.configuration)}
        self.processes[name] = subprocess.Popen(
            [program(command[0]), *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )

    def start_node(self, name: str) -> None:
        """Start a node's daemon."""
        self.start(name, "slurmd", "-D", "-N", name)

    def kill_node(self, name: str) -> None:
        """End a node as a power cut would: its daemon, and each job's processes there."""
        steps = [step for step in psutil.process_iter(["name"]) if step.info["name"] == "slurmstepd"]
        mine = [step for step in steps if self._is_step_of(step, name)]
        below = [child for step in mine for child in step.children(recursive=True)]
        daemon = self.processes.pop(name)
        daemon.kill()
        daemon.wait()
        for process in [*mine, *below]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _is_step_of(self, step: psutil.Process, node: str) -> bool:
        """Whether a job's step daemon belongs to a node of this cluster: it keeps the node's files open."""
        with contextlib.suppress(psutil.Error, OSError):
            opened = [os.readlink(f"/proc/{step.pid}/fd/{name}") for name in os.listdir(f"/proc/{step.pid}/fd")]
            return any(path.startswith((f"{self.root}/spool.{node}", f"{self.root}/slurmd.{node}")) for path in opened)
        return False

    def asks(self, *command: str) -> str:
        """What a client program of Slurm answers."""
        done = subprocess.run(
            [program(command[0]), *command[1:]], capture_output=True, text=True, check=False, timeout=60
        )
        return done.stdout + done.stderr

    def end(self) -> None:
        """End all jobs, then every program, by its own process."""
        if "slurmctld" in self.processes:
            self.asks("scancel", "--me")
            with contextlib.suppress(RuntimeError):
                until(lambda: not self.asks("squeue", "--noheader").strip(), "the end of all jobs")
        for process in reversed(self.processes.values()):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def services(root: Path) -> Iterator[Services]:
    """Both services, ready; SLURM_CONF of this process names the cluster meanwhile."""
    root.mkdir(mode=0o700, parents=True)
    running = Services(root)
    before = os.environ.get("SLURM_CONF")
    try:
        _start_slurm(running)
        _start_sshd(running)
        yield running
    finally:
        running.end()
        if before is None:
            os.environ.pop("SLURM_CONF", None)
        else:
            os.environ["SLURM_CONF"] = before


def _start_slurm(running: Services) -> None:
    root = running.root
    (root / "munge.key").write_bytes(os.urandom(1024))
    (root / "munge.key").chmod(0o400)
    (root / "state").mkdir()
    host = socket.gethostname().partition(".")[0]
    running.configuration.write_text(CONFIGURATION.format(host=host, root=root, ports=free_ports(3)))
    os.environ["SLURM_CONF"] = str(running.configuration)
    files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log"}
    given = [f"--{name}={root / file}" for name, file in files.items()]
    running.start("munged", "munged", "--foreground", "--force", *given, f"--seed-file={root / 'munge.seed'}")
    until((root / "munge.socket").exists, "munge")
    running.start("slurmctld", "slurmctld", "-D", "-c")
    for node in ("n1", "n2"):
        running.start_node(node)
    until(lambda: running.asks("sinfo", "--noheader", "--format=%D %T").count("2 idle") >= 1, "two idle nodes")


def _start_sshd(running: Services) -> None:
    root = running.root
    Path("/run/sshd").mkdir(exist_ok=True)
    for name in ("host_key", "key"):
        subprocess.run(
            [program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", str(root / name)], check=True, timeout=60
        )
    [running.ssh_port] = free_ports(1)
    (root / "sshd.conf").write_text(SSHD.format(port=running.ssh_port, root=root))
    public = (root / "host_key.pub").read_text()
    (root / "known_hosts").write_text(f"[127.0.0.1]:{running.ssh_port} {public}")
    running.start("sshd", "sshd", "-D", "-f", str(root / "sshd.conf"), "-E", str(root / "sshd.log"))
    command = [program("ssh"), "-o", "BatchMode=yes", *running.ssh_options, "127.0.0.1", "true"]
    until(lambda: subprocess.run(command, check=False, timeout=60, capture_output=True).returncode == 0, "sshd")
