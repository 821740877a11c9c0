"""A scheduler of one machine for tests: `sbatch` and `srun` that start the processes they are asked for, and `squeue`.

A job runs while `sbatch` waits, the tasks of an array two at a time. Environment: JOBS, the folder of states and logs;
KILL, "PART FILE", an array task that dies once FILE has a line of a shard, as on a lost node; FULL, set if jobs wait.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

KNOWN = {"array", "comment", "dependency", "kill-on-invalid-dep", "parsable", "partition"}  # on the command line
DIRECTIVES = KNOWN | {
    "job-name", "gpus-per-task", "cpus-per-task", "mem", "time", "signal", "requeue", "open-mode", "output", "nodes",
    "ntasks-per-node", "gpus-per-node",
}  # fmt: skip


def install(folder: Path) -> None:
    """Write the commands to a folder, which goes on the PATH."""
    for name in ("sbatch", "squeue", "srun"):
        file = folder / name
        file.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        file.chmod(0o755)


def run_task(command: list[str], environment: dict[str, str]) -> bool:
    task = environment.get("SLURM_ARRAY_TASK_ID")
    part, _, file = os.environ.get("KILL", "").partition(" ")
    log = Path(os.environ["JOBS"]) / f"{environment['SLURM_JOB_ID']}.{task}.log"
    with log.open("w") as said:
        process = subprocess.Popen(
            command, env=os.environ | environment, stdout=said, stderr=said, start_new_session=True
        )
        while task is not None and task == part and process.poll() is None:
            if Path(file).exists() and re.search(r'"kind": *"shard"', Path(file).read_text()):
                os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.01)
        return process.wait() == 0


def sbatch(arguments: list[str]) -> None:
    options = {}
    while arguments[0].startswith("--"):
        name, _, value = arguments.pop(0).removeprefix("--").partition("=")
        assert name in KNOWN, name
        options[name] = value
    for name in re.findall(r"^#SBATCH --([\w-]+)", Path(arguments[0]).read_text(), re.M):
        assert name in DIRECTIVES, name
    jobs = Path(os.environ["JOBS"])
    number = len(list(jobs.glob("*.json"))) + 1
    before = options.get("dependency", "").removeprefix("afterok:")
    full = bool(os.environ.get("FULL"))
    ran = not full and (not before or json.loads((jobs / f"{before}.json").read_text())["ok"])
    environment = {
        "SLURM_JOB_ID": str(number),
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURMD_NODENAME": "localhost",
    }
    tasks = [{"SLURM_ARRAY_TASK_ID": task} for task in options["array"].split(",")] if "array" in options else [{}]
    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(lambda task: run_task(["bash", *arguments], environment | task), tasks)) if ran else []
    record = {"script": Path(arguments[0]).name, "options": options, "ran": ran, "ok": ran and all(ends), "waits": full}
    (jobs / f"{number}.json").write_text(json.dumps(record))
    print(number)


def squeue(arguments: list[str]) -> None:
    """The numbers and comments of the jobs that wait, one a line."""
    assert arguments == ["--me", "--noheader", "--format=%i %k"]
    for file in sorted(Path(os.environ["JOBS"]).glob("*.json")):
        job = json.loads(file.read_text())
        if job["waits"]:
            print(file.stem, job["options"].get("comment", "(null)"))


if __name__ == "__main__":
    if sys.argv[1] == "srun":
        os.execvp(sys.argv[2], sys.argv[2:])
    {"sbatch": sbatch, "squeue": squeue}[sys.argv[1]](sys.argv[2:])
