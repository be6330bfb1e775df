"""What is made from the measurements: a page and a plot for each kind of device, and the figures of this run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from aha.files import write_atomically

from . import mda, peers, soft_ranks, step, table
from .stages import sentence


def write(out: Path) -> None:
    """Write <device>.md and <device>.png from what was measured, on both kinds of devices."""
    rows = table.read(out / table.CSV)
    for device in ("cpu", "cuda"):
        parts = []
        if table.plot(rows, device, out / f"{device}.png"):
            parts.append(f"![Time against K]({device}.png)\n")
        if steps := _read(out / f"step_{device}.json"):
            parts.append("\n".join(["## Training step", "", *(f"- {step.line(found)}" for found in steps), ""]))
        if found := _read(out / f"mda_{device}.json"):
            parts.append(f"## MDA\n\n- {mda.line(found)}\n")
        if found := _read(out / f"peers_{device}.json"):
            parts.append(peers.section(found))
        if found := _read(out / f"soft_ranks_{device}.json"):
            parts.append(soft_ranks.section(found))
        for report, title in (("smoke", "The short run"), ("report", "The last run")):
            if found := _read(out / f"{report}_{device}.json"):
                parts.append(_stages(title, found["stages"]))
        write_atomically(out / f"{device}.md", table.markdown(rows, device, "\n".join(parts)).encode())


def _stages(title: str, results: list[dict[str, Any]]) -> str:
    lines = [f"## {title}", "", "| stage | status | s |", "|---|---|---|"]
    for result in results:
        last = f": {result['output'][-1]}" if result["stage"] == "bandwidth" and result["output"] else ""
        lines.append(f"| {result['stage']} | {result['status']}{last} | {result['seconds']} |")
        lines += [f"| {result['stage']} | {sentence(record)} | |" for record in result.get("records", [])]
    return "\n".join([*lines, ""])


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else []


def show(console: Console, device: str, out: Path) -> None:
    """Print the figures the project is judged by, on the device of this run."""
    name = table.device_name(device)
    rows = table.select(table.read(out / table.CSV), device=name, case="the", phase=table.PHASES[1])
    speed = table.ratios(rows)
    view = Table(title=f"forward and backward, {name}")
    for column in ("operator", "row", "ms (p20 to p80)", "× eager", "peak MiB", "memory ÷ eager"):
        view.add_column(column)
    for row in rows:
        eager = table.select(rows, operator=row["operator"], row="eager")
        base = float(eager[0]["peak_mib"] or 0) if eager else 0.0
        share = f"{float(row['peak_mib']) / base:.3f}" if row["peak_mib"] and base else ""
        ratio = speed.get(table.place(row))
        times = f"{row['median_ms']} ({row['p20_ms']} to {row['p80_ms']})" if row["median_ms"] else row["note"][:40]
        view.add_row(row["operator"], row["row"], times, f"{ratio:.2f}" if ratio else "", row["peak_mib"], share)
    console.print(view)
    for found in _read(out / f"step_{device}.json"):
        console.print(step.line(found), highlight=False)
