"""A small cluster for tests: `sbatch`, `squeue`, `scontrol`, `scancel`, `sinfo` and `ssh` by the name it is called by.

Jobs are real processes of this machine, one file each in the folder FAKE_CLUSTER. While `hold` is there, jobs wait; a
host called `down` is not reached; each call is a line of `calls`.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(os.environ["FAKE_CLUSTER"])
HELD = ROOT / "hold"


def jobs():
    return {int(file.stem): json.loads(file.read_text()) for file in sorted(ROOT.glob("*.json"))}


def save(number, job):
    temporary = ROOT / f".{number}.{os.getpid()}"
    temporary.write_text(json.dumps(job))
    temporary.replace(ROOT / f"{number}.json")


def begin(number, job):
    bare = {"PATH": os.environ["PATH"], "HOME": str(ROOT), "FAKE_CLUSTER": str(ROOT), "SLURM_JOB_ID": str(number)}
    with open(job["output"], "ab") as log:
        process = subprocess.Popen(
            ["/bin/sh", str(ROOT / f"{number}.sh")],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**bare, "SLURM_RESTART_COUNT": str(job["restarts"])},
            start_new_session=True,
        )
    save(number, {**job, "state": "RUNNING", "pid": process.pid})


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def settle():
    """What the controller would have done meanwhile."""
    for number, job in jobs().items():
        if job["state"] == "RUNNING" and not alive(job["pid"]):
            waits = job.get("requeue")
            state = "PENDING" if waits else job.get("ends", "COMPLETED")
            save(number, {**job, "state": state, "requeue": False, "restarts": job["restarts"] + int(bool(waits))})
    for number, job in jobs().items():
        if job["state"] == "PENDING" and not HELD.exists():
            begin(number, job)


def sbatch(arguments):
    number = max(jobs(), default=0) + 1
    (ROOT / f"{number}.sh").write_text(sys.stdin.read())
    [output] = [word.removeprefix("--output=") for word in arguments if word.startswith("--output=")]
    save(number, {"state": "PENDING", "output": output, "restarts": 0})
    settle()
    print(number)


def squeue(arguments):
    for number, job in jobs().items():
        print(f"{number}|{job['state']}|{'Resources' if job['state'] == 'PENDING' else job.get('reason', 'None')}|main")


def scontrol(arguments):
    number = int(arguments[-1])
    job = jobs()[number]
    if "requeue" in arguments:
        save(number, {**job, "requeue": True})
    else:
        print(f"JobId={number} JobState={job['state']} Restarts={job['restarts']} ExitCode=0:0")


def scancel(arguments):
    number = int(arguments[0])
    job = jobs()[number]
    if job["state"] == "RUNNING":
        os.killpg(job["pid"], signal.SIGTERM)
        save(number, {**job, "ends": "CANCELLED"})
    elif job["state"] == "PENDING":
        save(number, {**job, "state": "CANCELLED"})


def sinfo(arguments):
    print("2 idle\n1 down")


def ssh(arguments):
    host = arguments[-2]
    if host == "down":
        print("ssh: connect to host down port 22: Connection refused", file=sys.stderr)
        sys.exit(255)
    bare = {"PATH": os.environ["PATH"], "HOME": str(ROOT)}
    sys.exit(subprocess.run(["/bin/sh", "-s"], stdin=sys.stdin, env=bare, check=False).returncode)


if __name__ == "__main__":
    called = Path(sys.argv[0]).name
    with (ROOT / "calls").open("a") as calls:
        calls.write(json.dumps([called, *sys.argv[1:]]) + "\n")
    if called != "ssh":
        settle()
    globals()[called](sys.argv[1:])
