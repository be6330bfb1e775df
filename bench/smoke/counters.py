"""What Nsight Compute counts of the ranking kernels at K = 784, where it is there and allowed; else a line saying why.

Clusters are among it: their size, and how many of them the device holds at a time.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections.abc import Iterator

from ..stages import end_with_parent, tell
from ..toolkit import tool

SECTIONS = ("LaunchStats", "Occupancy", "SpeedOfLight", "InstructionStats")
KERNELS = "regex:resident|streamed|block"
REGIONS = 784


def command() -> list[str]:
    """The clocks are left as they are: the card may be others' as well."""
    found = [tool("ncu"), "--csv", "--page", "details", "--clock-control", "none", "--kernel-name", KERNELS]
    found += ["--launch-count", "4", *(word for name in SECTIONS for word in ("--section", name))]
    return [*found, sys.executable, "-m", "bench.smoke.once", "--regions", str(REGIONS)]


def kernels(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Name and metrics of every launch, in order; ``text`` is what ncu prints around its table."""
    lines = text.splitlines()
    first = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    launches: dict[str, tuple[str, dict[str, str]]] = {}
    for row in csv.DictReader(line for line in lines[first:] if line.startswith('"')):
        _, metrics = launches.setdefault(row["ID"], (row["Kernel Name"].partition("(")[0], {}))
        if row["Metric Name"]:
            metrics[row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    yield from launches.values()


def main() -> int:
    """0: counters are welcome and not required."""
    try:
        done = subprocess.run(command(), capture_output=True, text=True)
    except OSError:
        tell("ncu", "not available: it is not on this machine")
        return 0
    found = list(kernels(done.stdout))
    for name, metrics in found:
        tell(name, **metrics)
    if not found:
        why = next((line for line in done.stdout.splitlines() if "ERROR" in line), (done.stderr or "it said nothing"))
        tell("ncu", f"not available: {' '.join(why.split())[:200]}")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda"], default="cuda")
    parser.parse_args()
    end_with_parent()
    sys.exit(main())
