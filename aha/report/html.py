"""One HTML file with everything a run has measured: no script, no font, no image from elsewhere."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ..files import read_json, write_atomically
from . import columns as names
from . import figures as drawings
from . import tables
from .columns import HEADLINE, is_number
from .table import ABSENT, template

# file stem → title. Caption; other files are shown after these under their own name
_LINES = (Path(__file__).parent / "captions.txt").read_text(encoding="utf-8").splitlines()
CAPTIONS = dict(line.split(": ", 1) for line in _LINES)
MEAN, APART = "Mean over references.", "Values of different protocols do not compare."

Key = tuple[str, str]  # model and explained class


def write(folder: str | Path) -> Path:
    """Make ``folder``/report.html of what a run left there. Returns the path.

    That is ``summary.json`` and ``figures/*.png`` for one classifier and explained class, or one such pair in every
    sub-folder, at most two levels down, for several. The figures that follow from a summary alone (cost,
    significance, classifiers side by side) are drawn anew if matplotlib is there.

    FileNotFoundError if there is no summary.json, ValueError if one is damaged, ImportError without jinja2.
    """
    folder = Path(folder)
    found = {path.parent for pattern in ("*", "*/*") for path in folder.glob(f"{pattern}/summary.json")}
    places = [folder] if (folder / "summary.json").is_file() else sorted(found)
    if not places:
        raise FileNotFoundError(f"{folder} holds no summary.json: run `aha evaluate` or `aha demo` into it first")
    results: dict[Key, Mapping[str, Any]] = {}
    figures: dict[Key, dict[str, Path]] = {}
    for place in places:
        summary = read_json(place / "summary.json")
        _methods(summary)
        key = (summary.get("classifier") or {}).get("name", place.name), str(summary.get("target", ""))
        if key in results:  # the same classifier and class once more: told apart by the folder
            key = f"{key[0]} ({place.relative_to(folder)})", key[1]
        results[key] = summary
        figures[key] = _drawn(place / "figures", {key: summary})
    overview = _drawn(folder / "figures", results) if len(results) > 1 else {}
    return render(results, figures, folder / "report.html", overview)


def _drawn(folder: Path, results: Mapping[Key, Mapping[str, Any]]) -> dict[str, Path]:
    """The figures of a folder, after drawing what can be drawn: file stem → path, those with captions first."""
    # without matplotlib the page shows what is there
    with contextlib.suppress(ImportError):
        drawings.draw(results, folder)
    found = {path.stem: path for path in sorted(folder.glob("*.png"))}
    return {stem: found[stem] for stem in dict.fromkeys((*CAPTIONS, *found)) if stem in found}


def render(
    results: Mapping[Key, Mapping[str, Any]],
    figures: Mapping[Key, Mapping[str, str | Path]],
    out: str | Path,
    overview: Mapping[str, str | Path] | None = None,
) -> Path:
    """Write one self-contained page on one or several classifiers or explained classes. Returns the path.

    ``results`` is (model, target) → what `aha evaluate` writes to summary.json; with several the page starts with all
    of them side by side. ``figures`` is (model, target) → title → image file, where a title that `CAPTIONS` knows is
    replaced and captioned; ``overview`` holds those of all results together. The folder of ``out`` is made.

    ValueError if there are no results or one has no methods, ImportError without jinja2.
    """
    if not results:
        raise ValueError("there are no results: give (model, target) → summary")
    page = template("report.html.j2")
    parts = [_part(key, summary, figures.get(key, {})) for key, summary in results.items()]
    named = next((str(summary["title"]) for summary in results.values() if summary.get("title")), None)
    several = len(parts) > 1 and any(part["headline"] for part in parts)
    beside = dict(zip((part["name"] for part in parts), results.values(), strict=True))
    text = page.render(
        title=named or (parts[0]["classifier"] if len(parts) == 1 else f"{len(parts)} comparisons"),
        parts=parts,
        headline=names.heading(HEADLINE),
        overview=tables.overview(beside) if several else None,
        overview_figures=_pictures(overview or {}),
    )
    write_atomically(Path(out), text.encode())
    return Path(out)


def _methods(summary: Any) -> Mapping[str, Mapping[str, Any]]:
    methods = summary.get("methods") if isinstance(summary, Mapping) else None
    if not isinstance(methods, Mapping) or not methods:
        raise ValueError("the summary has no methods: give the summary.json of an evaluation")
    return methods


def _part(key: Key, summary: Mapping[str, Any], figures: Mapping[str, str | Path]) -> dict[str, Any]:
    """What the page says about one result."""
    methods, classifier = _methods(summary), summary.get("classifier") or {}
    significance = summary.get("significance") or {}
    metrics = names.measured(methods.values())
    own, others = ([m for m in metrics if bool(names.split(m)[0]) is other] for other in (False, True))
    known = {row.key: row for metric in metrics if (row := names.row(metric)) and row.about}
    run = {
        "Protocol": {**(summary.get("protocol") or {}), "target": summary.get("target"), "seed": summary.get("seed")},
        **{f"Protocol {of['name']}": of for of in summary.get("protocols") or ()},
        "Classifier": classifier,
        "Versions": {**(summary.get("versions") or {}), "device": summary.get("device")},
    }
    return {
        "name": f"{key[0]}, {key[1]} class" if all(key) else key[0],
        "classifier": classifier.get("name", "classifier"),
        "facts": {"methods": len(methods), **classifier, "target": summary.get("target")},
        "headline": _headline(methods, significance),
        "table": tables.ranked(methods, own, significance, MEAN) if own else None,
        "protocols": tables.ranked(methods, others, significance, APART) if others else None,
        "explanations": [(f"{row.title} {row.arrow}", row.about) for row in known.values()],
        "references": {
            name: tables.ranked(of, measured)
            for name, of in (summary.get("references") or {}).items()
            if (measured := names.measured(of.values()))
        },
        "differences": tables.differences(summary) if any(significance.values()) else None,
        "shortcut": _shortcut(summary["shortcut"]) if summary.get("shortcut") else None,
        "figures": _pictures(figures),
        "comparisons": tables.paired(summary["comparisons"]) if summary.get("comparisons") else None,
        "failures": summary.get("failures") or (),
        "run": [(title, list(_flat(facts))) for title, facts in run.items() if facts],
    }


def _headline(methods: Mapping[str, Mapping[str, Any]], significance: Mapping[str, Any]) -> str | None:
    best = names.best_first([methods], HEADLINE)[0]
    score = methods[best].get(HEADLINE)
    if not is_number(score):
        return None
    interval = names.interval_text(methods[best], HEADLINE)
    text = f"Most faithful: {best}, insertion − deletion {names.number(HEADLINE, score)}"
    text += f" (95 % interval {interval})." if interval else "."
    tested = (significance.get(HEADLINE) or {}).items()
    alike = [name for name, found in tested if name != best and names.inseparable(found)]
    return text + (f" Not separable from it: {', '.join(alike)}." if alike else "")


def _shortcut(values: Mapping[str, Any]) -> dict[str, Any]:
    """Single numbers as a list of facts, lists of numbers as the rows of one table over the steps."""
    series = {k: v for k, v in values.items() if isinstance(v, (list, tuple)) and v and all(map(is_number, v))}
    steps = range(max(map(len, series.values()), default=0))
    rows = {names.plain(k): [_plain(of[t]) if t < len(of) else ABSENT for t in steps] for k, of in series.items()}
    return {
        "facts": list(_flat({k: v for k, v in values.items() if k not in series})),
        "series": tables.listed(rows, [str(t) for t in steps], "T") if rows else None,
    }


def _pictures(figures: Mapping[str, str | Path]) -> list[dict[str, Any]]:
    """Title or file stem → image file, as the page shows them."""
    found = []
    for title, path in figures.items():
        name, _, caption = CAPTIONS.get(title, names.plain(title)).partition(". ")
        kind, size = _kind_and_size(path)
        source = f"data:{kind};base64,{base64.b64encode(Path(path).read_bytes()).decode('ascii')}"
        found.append({"title": name, "caption": caption, "size": size, "source": source})
    return found


def _kind_and_size(path: str | Path) -> tuple[str, list[int]]:
    """MIME type, and width and height on the page; ValueError for a file that is no whole image."""
    try:
        with Image.open(path) as picture:
            kind, dpi, size = Image.MIME[picture.format or "PNG"], picture.info.get("dpi", (0, 0))[0], picture.size
            picture.verify()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow says of damage
        raise ValueError(f"{path} is no image or damaged: run the evaluation again, or remove it") from error
    # at this many dots per inch the letters of our figures are as large as the page's
    return kind, [round(side * 124 / dpi) if dpi > 1 else side for side in size]


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested facts as (name, text); a list of plain values is one line, one of others a line each, None is none."""
    many = isinstance(values, (list, tuple))
    if many and any(isinstance(value, (Mapping, list, tuple)) for value in values):
        values = dict(enumerate(values, 1))
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _flat(value, f"{prefix} · {key}" if prefix else names.plain(str(key)))
    elif values is not None:
        yield prefix, ", ".join(map(_plain, values)) if many else _plain(values)


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
