"""A Slurm of one node on this machine, for as long as a test lasts."""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobAcctGatherType=jobacct_gather/none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=8000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:8
"""


@contextlib.contextmanager
def slurm(folder: Path, ports: tuple[int, int]) -> Iterator[Path]:
    """Start Slurm and yield its configuration, for `SLURM_CONF`; the test is skipped where there is none."""
    if shutil.which("slurmctld") is None or shutil.which("munged") is None or os.geteuid() != 0:
        pytest.skip("Slurm (slurm-wlm, munge) is not installed, or may not be started here")
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    key, file = folder / "munge.key", folder / "slurm.conf"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    host = platform.node().split(".")[0]
    file.write_text(CONFIGURATION.format(host=host, ports=ports, folder=folder, cpus=os.cpu_count()))
    environment = {**os.environ, "SLURM_CONF": str(file)}
    commands = [
        ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket",
         f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed"],
        ["slurmctld", "-D", "-f", str(file)],
        ["slurmd", "-D", "-f", str(file), "-N", host],
    ]  # fmt: skip
    with contextlib.ExitStack() as stack:
        for command in commands:
            output = stack.enter_context((folder / f"{command[0]}.out").open("w"))
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
            stack.callback(process.wait)
            stack.callback(process.terminate)
        deadline = time.monotonic() + 30
        while (
            "idle"
            not in (state := subprocess.run(["sinfo", "-h"], env=environment, capture_output=True, text=True)).stdout
        ):
            assert time.monotonic() < deadline, state
            time.sleep(0.2)
        yield file
