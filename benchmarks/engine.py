"""The engine as a user runs it: a job file over a Parquet file, `batcher run`, a folder of Parquet parts."""

import subprocess
import sys
import tempfile
from pathlib import Path

from batcher.transport import Library
from benchmarks import workload
from benchmarks.measure import ROOT, Cost, run

JOB = """
name = "benchmark"

[input]
path = "rows.parquet"
id = "id"

[request]
model = "{model}"
system = "{system}"
prompt = "[row {{{{ id }}}}] {{{{ text }}}}"
max_completion_tokens = {max_completion_tokens}
temperature = 0

[service]
base_url = "{base_url}"
api_key_env = "BENCHMARK_API_KEY"
dialect = "cerebras"
transport = "{library}"

[schedule]
max_in_flight = {in_flight}

[output]
path = "out"
"""


def engine(base_url: str, rows: int, in_flight: int, length: int = workload.LONG, library: Library = "aiohttp") -> Cost:
    """What one whole run costs, from the process's start to its end; a run that misses a row ends the benchmark."""
    with tempfile.TemporaryDirectory(prefix="batcher-benchmark-") as name:
        folder = Path(name)
        tool = [sys.executable, "-m", "benchmarks.workload"]
        subprocess.run([*tool, "make", str(folder / "rows.parquet"), str(rows), str(length)], cwd=ROOT, check=True)
        job = JOB.format(
            model=workload.MODEL,
            system=workload.SYSTEM,
            max_completion_tokens=workload.MAX_COMPLETION_TOKENS,
            base_url=base_url,
            in_flight=in_flight,
            library=library,
        )
        (folder / "job.toml").write_text(job)
        command = [sys.executable, "-m", "batcher", "run", "job.toml", "--quiet"]
        cost = run(command, folder, {"BENCHMARK_API_KEY": "benchmark"})
        counted = subprocess.run(
            [*tool, "count", str(folder / "out" / "responses")], cwd=ROOT, check=True, capture_output=True, text=True
        )
        if int(counted.stdout) != rows:
            raise SystemExit(f"the engine wrote {counted.stdout.strip()} of {rows} rows")
    return cost


def bare(module: str, base_url: str, requests: int, in_flight: int, authority: Path | None = None) -> Cost:
    """What a bare loop costs for as many requests, measured the same way; `module` is b1, b2, or loop with its library.

    `authority` is the file of the certificate that the server's is signed with.
    """
    name, *options = module.split()
    command = [sys.executable, "-m", f"benchmarks.{name}", base_url, *options]
    command += ["--requests", str(requests), "--in-flight", str(in_flight)]
    return run(command, environment={"SSL_CERT_FILE": str(authority)} if authority else None)


def b1(base_url: str, requests: int, in_flight: int) -> Cost:
    """What the bare aiohttp loop costs."""
    return bare("b1", base_url, requests, in_flight)
