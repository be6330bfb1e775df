"""Results: a long CSV that a rerun updates in place, and what is made from it: Markdown tables and a plot."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from functools import lru_cache
from pathlib import Path

import torch

from aha import info
from aha._version import __version__
from aha.files import write_atomically

from .cases import HEADLINES, Case, Size, the
from .rows import DEVICE_ROWS
from .stages import commit, version

KEY = ("operator", "case", "B", "K", "T", "S", "tau", "noise", "dtype", "row", "device", "phase")
FIGURES = ("median_ms", "p20_ms", "p80_ms", "peak_mib", "error", "error_reference")
MADE = ("torch", "triton", "aha", "commit", "date")
COLUMNS = (*KEY, *FIGURES, *MADE, "note")
PHASES = ("forward", "forward+backward")
CSV = "operators.csv"
NOT_MEASURED = "not measured"
ANOTHER = "another operator"  # the note of rows that must not be compared with ours

Record = dict[str, str]


def record(case: Case, size: Size, row: str, device: str, phase: str, **figures: float | str | None) -> Record:
    """One line of the CSV; sizes that do not matter to the operator stay empty, and so do figures that are None."""
    key = {
        field: getattr(size, field) if field in case.fields else None for field in ("B", "K", "T", "S", "tau", "noise")
    }
    dtype = str(size.dtype).removeprefix("torch.")
    given = {"operator": case.operator, "case": size.name, **key, "dtype": dtype, "row": row}
    values = {**given, "device": device_name(device), "phase": phase, **figures, **made()}
    unknown = set(values) - set(COLUMNS)
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: no column of the results")
    return {column: _text(values.get(column)) for column in COLUMNS}


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())


@lru_cache(maxsize=2)
def device_name(device: str) -> str:
    """What the figures were taken on: the GPU's name, or the CPU's and its threads."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu: {info._cpu_model()}, {torch.get_num_threads()} threads"


@lru_cache(maxsize=1)
def made() -> dict[str, str]:
    """Versions, commit and date that go with every figure."""
    found = {"torch": torch.__version__, "aha": __version__, "commit": commit(), "date": str(date.today())}
    return {**found, "triton": version("triton")}


def read(path: Path) -> list[Record]:
    """The rows of a CSV, none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def upsert(path: Path, fresh: Iterable[Record]) -> list[Record]:
    """Replace the rows with the same `KEY`, add the others, keep the order of the rest; returns all rows."""
    rows = {_key(row): row for row in read(path)}
    rows.update({_key(row): row for row in fresh})
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows.values())
    write_atomically(path, text.getvalue().encode())
    return list(rows.values())


def _key(row: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(row[column] for column in KEY)


def kind(row: Mapping[str, str]) -> str:
    """The device kind of a row: "cpu" or "cuda"."""
    return "cpu" if row["device"].startswith("cpu") else "cuda"


def select(rows: Iterable[Record], **wanted: str) -> list[Record]:
    """The rows whose columns have the given values."""
    return [row for row in rows if all(row[column] == value for column, value in wanted.items())]


def ratios(rows: Sequence[Record]) -> dict[tuple[str, ...], float]:
    """`place` of a row → time of "eager" over its time, forward and backward at the same size; rows of one device."""
    both = [row for row in select(rows, phase=PHASES[1]) if row["median_ms"]]
    eager = {_size(row): float(row["median_ms"]) for row in select(both, row="eager")}
    return {place(row): eager[_size(row)] / float(row["median_ms"]) for row in both if _size(row) in eager}


def place(row: Mapping[str, str]) -> tuple[str, ...]:
    """What tells implementations at a size apart, on one device and in one phase."""
    return (*_size(row), row["row"])


def _size(row: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(row[column] for column in KEY[:9])


def markdown(rows: Sequence[Record], device: str, extra: str = "") -> str:
    """The page of a device kind: what figures are quoted for, then everything; "not measured" where nothing is."""
    mine = [row for row in rows if kind(row) == device and row["note"] != ANOTHER]
    names = list(dict.fromkeys(row["device"] for row in mine)) or [f"{device}: {NOT_MEASURED}"]
    page = [f"# Operators on {'CPU' if device == 'cpu' else 'GPU'}", "", _LEGEND, ""]
    for name in names:
        here = select(mine, device=name)
        page += [f"## {name}", "", *_headlines(here, device), ""]
        if here:
            page += ["### All sizes", "", *_everything(here), ""]
    return "\n".join([*page, extra]).rstrip() + "\n"


_LEGEND = """Milliseconds, median (p20 to p80) of rounds interleaved between the rows of one size; on a CPU, calls below
20 ms are repeated within a round and the first, which finds cold caches, is left out (`bench.timing`). Error: largest
deviation from the float64 reference on the same inputs, outputs and gradients, relative to the largest entry; in
brackets that of the float32 reference, which is not run where its matrices do not fit: there the float64 blocks are the
truth. Memory: peak of one forward and backward pass beyond its inputs. `eager` is the
backend "reference", `checkpoint` the same with its iterations run again in the backward pass."""


def _headlines(rows: Sequence[Record], device: str) -> list[str]:
    lines = [
        "| operator | row | forward | forward+backward | × eager | peak MiB | error |",
        "|---|---|---|---|---|---|---|",
    ]
    size = the(device)
    for operator in HEADLINES:
        here = select(rows, operator=operator, case=size.name)
        others = [row["row"] for row in here if row["row"] not in DEVICE_ROWS[device]]
        for name in dict.fromkeys([*DEVICE_ROWS[device], *others]):
            lines.append(f"| {operator} | {name} | {' | '.join(_cells(select(here, row=name), ratios(here)))} |")
    return lines


def _everything(rows: Sequence[Record]) -> list[str]:
    sized = ("B", "K", "T", "S", "tau", "noise", "dtype")
    lines = [f"| operator | {' | '.join(sized)} | row | forward | forward+backward | × eager | peak MiB | error |"]
    lines += ["|---" * (len(sized) + 7) + "|"]
    speed = ratios(rows)
    groups: dict[tuple[str, ...], list[Record]] = {}
    for row in rows:
        groups.setdefault(place(row), []).append(row)
    for key, group in groups.items():
        lines.append(f"| {' | '.join([key[0], *key[2:], *_cells(group, speed)])} |")
    return lines


def _cells(rows: Sequence[Record], speed: Mapping[tuple, float]) -> list[str]:
    """The cells of the two phases of one implementation at one size."""
    by_phase = {row["phase"]: row for row in rows}
    cells = [_time(by_phase.get(phase)) for phase in PHASES]
    last = by_phase.get(PHASES[1])
    if last is None or not last["median_ms"]:
        return [*cells, "", "", ""]
    ratio = speed.get(place(last))
    theirs = f" ({last['error_reference']})" if last["error_reference"] else ""
    error = f"{last['error']}{theirs}" if last["error"] else ""
    return [*cells, f"{ratio:.2f}" if ratio else "", last["peak_mib"], error]


def _time(row: Mapping[str, str] | None) -> str:
    if row is None:
        return NOT_MEASURED
    if not row["median_ms"]:
        return row["note"].replace("|", "¦")
    return f"{row['median_ms']} ({row['p20_ms']} to {row['p80_ms']})"


def plot(rows: Sequence[Record], device: str, path: Path) -> bool:
    """Time against K, forward and backward, a line per implementation of soft_topk_masks; False without such rows.

    One batch size per plot, that with most sizes, so that lines are comparable.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    mine = [row for row in rows if kind(row) == device and row["median_ms"] and row["note"] != ANOTHER]
    mine = select(mine, operator="soft_topk_masks", phase=PHASES[1], tau="0.3", noise="0")
    if not mine:
        return False
    groups: dict[tuple[str, str], list[Record]] = {}
    for row in mine:
        groups.setdefault((row["device"], row["B"]), []).append(row)
    (name, batch), best = max(groups.items(), key=lambda item: len({row["K"] for row in item[1]}))
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for row_name in dict.fromkeys(row["row"] for row in best):
        line = sorted({int(row["K"]): float(row["median_ms"]) for row in select(best, row=row_name)}.items())
        axes.loglog(*zip(*line, strict=True), marker="o", label=row_name)
    regions = sorted({int(row["K"]) for row in best})
    axes.set_xticks(regions, [str(k) for k in regions])
    axes.minorticks_off()
    axes.set(xlabel="K, regions", ylabel="ms, forward and backward", title=f"soft_topk_masks, B = {batch}\n{name}")
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, metadata={"Software": None})
    pyplot.close(figure)
    write_atomically(path, buffer.getvalue())
    return True
