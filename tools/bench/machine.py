"""What a measurement needs beside the number: machine, versions, load, command. Standard library only."""

import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
QUIET = 0.05  # share of the cores that others may use in a measurement
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def describe() -> dict:
    """Return the facts about this machine and this moment."""
    cpuinfo = dict(
        [part.strip() for part in line.split(":", 1)]
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if ":" in line
    )
    flags = cpuinfo.get("flags", "").split()
    return {
        "cpu": f"{cpuinfo.get('model name', '?')} (family {cpuinfo.get('cpu family')}, model {cpuinfo.get('model')})",
        "cores": len(os.sched_getaffinity(0)),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "command": " ".join(sys.argv),
    }


def busy_s() -> float:
    """CPU seconds that all processes of the machine have used since it started."""
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    idle = fields[3] + fields[4]
    return (sum(fields[:8]) - idle) / os.sysconf("SC_CLK_TCK")


def foreign_share(busy_before: float, own_cpu_s: float, wall_s: float) -> float:
    """Return which share of all cores other processes used since `busy_before`: 0 on a quiet machine."""
    foreign = busy_s() - busy_before - own_cpu_s
    return max(0.0, foreign / wall_s / len(os.sched_getaffinity(0)))


def compare(peer: list[float], ours: list[float]) -> dict[str, float]:
    """Return how many times less `ours` is than `peer`, over pairs taken one after the other."""
    ratios = sorted(p / o for p, o in zip(peer, ours, strict=True))
    return {"median": statistics.median(ratios), "low": ratios[0], "high": ratios[-1], "pairs": len(ratios)}


def warn(foreign: list[float], omp_wait_policy: str | None) -> None:
    """Say so if the machine was not quiet: spinning OpenMP threads then cost the peer up to 20 times its speed."""
    worst = max(foreign)
    if worst > QUIET:
        advice = "" if omp_wait_policy == "PASSIVE" else "; use --omp-wait-policy PASSIVE"
        sys.stdout.write(
            f"NOT QUIET: others used up to {worst:.0%} of the machine. Read CPU seconds, not wall times{advice}.\n"
        )


def report(result: dict, out: str | None) -> None:
    """Print the machine and write everything to the JSON file `out`."""
    sys.stdout.write("\n" + "\n".join(f"{key}: {value}" for key, value in result["machine"].items()) + "\n")
    for name, versions in result["versions"].items():
        sys.stdout.write(f"{name}: " + ", ".join(f"{key} {value}" for key, value in versions.items()) + "\n")
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(result, indent=2) + "\n")
        sys.stdout.write(f"written: {out}\n")
