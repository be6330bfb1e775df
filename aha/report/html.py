"""One HTML file with everything a run has measured: no script, no font, no image from elsewhere.

jinja2 (extra ``report``) is imported when a page is made.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from .figures import LABELS, direction, heading, is_number, is_ours

# file stem → title and caption; other files are shown after these under their own name
CAPTIONS = {
    "maps": (
        "Maps",
        "Attribution over the image, one row per image. Warm is important. Where the evidence is known, "
        "it is outlined in the input.",
    ),
    "refinement": (
        "Test-time refinement",
        "The explainer's head takes T gradient steps of the same objective on one image; T = 0 is a single "
        "forward pass.",
    ),
    "curves": (
        "Deletion and insertion",
        "Probability of the explained class while pixels are removed or shown, the most important first; "
        "mean over images and references.",
    ),
    "ins_minus_del": ("Faithfulness", "Insertion minus deletion with its 95 % confidence interval."),
    "shortcut": ("Shortcut experiment", "Refinement against a classifier that has learned a shortcut."),
    "training": ("Training", "Faint: single values. Solid: running mean."),
}

EXPLANATIONS = {
    "insertion": "area under the probability while the most important pixels are shown first.",
    "deletion": "area under the probability while the most important pixels are removed first.",
    "ins_minus_del": "insertion minus deletion: the faithfulness of the order of the pixels.",
    "positive": "area under the accuracy while the most important pixels are removed first.",
    "negative": "area under the accuracy while the least important pixels are removed first.",
    "neg_minus_pos": "negative minus positive perturbation.",
    "adp": "average drop of the probability in percent when the map itself is the mask.",
    "pic": "share of images in percent whose probability rises when the map itself is the mask.",
    "pointing_game": "how often the highest pixel lies on the evidence or right beside it.",
    "iou": "overlap of the map, cut at its mean, with the evidence.",
    "map": "average precision of the pixels against the evidence.",
    "f1": "F1 of the map, cut at its mean, against the evidence.",
    "seconds_per_image": "time to make one map.",
}


class Cell(NamedTuple):
    """A value of the table as text: its interval, and whether it is the best (1) or second best (2)."""

    text: str
    interval: str | None
    place: int


def write(folder: str | Path) -> Path:
    """Make ``folder``/report.html of its ``summary.json`` and ``figures/*.png``. Returns the path.

    Raises:
        FileNotFoundError: if there is no summary.json.
        ValueError: if it is not a summary.
        ImportError: without jinja2.
    """
    folder = Path(folder)
    source = folder / "summary.json"
    if not source.is_file():
        raise FileNotFoundError(f"{folder} holds no summary.json: run `aha evaluate` or `aha demo` into it first")
    try:
        summary = json.loads(source.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{source} is not JSON ({error}): run the evaluation again") from error
    known = list(CAPTIONS)
    found = sorted(
        (folder / "figures").glob("*.png"),
        key=lambda path: (known.index(path.stem) if path.stem in CAPTIONS else len(known), path.stem),
    )
    return render(summary, {path.stem: path for path in found}, folder / "report.html")


def render(
    summary: Mapping[str, Any],
    figures: Mapping[str, str | Path],
    out: str | Path,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write one self-contained page. Returns the path.

    Args:
        summary: what `aha evaluate` writes to summary.json.
        figures: title → image file; a title that `CAPTIONS` knows is replaced and captioned.
        out: the HTML file; its folder is made.
        extra: further facts about the run, shown with the protocol; may be nested.

    Raises:
        ValueError: if the summary has no methods.
        ImportError: without jinja2.
    """
    methods = summary.get("methods") if isinstance(summary, Mapping) else None
    if not isinstance(methods, Mapping) or not methods:
        raise ValueError("the summary has no methods: give the summary.json of an evaluation")
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("the report needs jinja2: pip install aha-attribution[report]") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    classifier = summary.get("classifier") or {}
    table = _table(methods)
    page = environment.get_template("report.html.j2").render(
        classifier=classifier.get("name", "classifier"),
        facts=_facts(summary, classifier),
        headline=_headline(methods),
        table=table,
        explanations=[(heading(m), EXPLANATIONS[m]) for m in table["metrics"] if m in EXPLANATIONS],
        references={
            name: _table(of) for name, of in (summary.get("references") or {}).items() if isinstance(of, Mapping) and of
        },
        shortcut=_shortcut(summary.get("shortcut")),
        figures=[_figure(title, Path(path)) for title, path in figures.items()],
        comparisons=_comparisons(summary.get("comparisons")),
        failures=_failures(summary.get("failures")),
        run=[
            (title, [(name.replace("_", " "), text) for name, text in _flat(facts)])
            for title, facts in (
                ("Protocol", {**_named("name", summary.get("protocol")), **_pick(summary, "target", "seed")}),
                ("Classifier", classifier),
                ("Versions", {**_named("version", summary.get("versions")), **_pick(summary, "device")}),
                ("More", extra or {}),
            )
            if facts
        ],
    )
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out


def _table(methods: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Metrics that any method has, and rows of cells, the most faithful method first."""
    seen = {key for values in methods.values() for key, value in values.items() if is_number(value)}
    metrics = [m for m in LABELS if m in seen] + sorted(m for m in seen if m not in LABELS)
    columns = {m: _places({name: values.get(m) for name, values in methods.items()}, m) for m in metrics}
    order = list(methods)
    if metrics and (better := direction(metrics[0])) is not None:
        known = {n: v for n in order if is_number(v := methods[n].get(metrics[0]))}
        order.sort(key=lambda n: -known.get(n, -float("inf")) if better else known.get(n, float("inf")))
    rows = []
    for name in order:
        intervals = methods[name].get("ci95") or {}
        cells = [
            Cell(_text(methods[name].get(m), m), _interval(intervals.get(m), m), columns[m].get(name, 0))
            for m in metrics
        ]
        rows.append({"name": name, "ours": is_ours(name), "cells": cells})
    return {"metrics": metrics, "headings": [heading(m) for m in metrics], "rows": rows}


def _places(values: Mapping[str, Any], metric: str) -> dict[str, int]:
    """Method → 1 for the best value, 2 for the second; ties share a place. Empty without a direction."""
    better = direction(metric)
    distinct = sorted({v for v in values.values() if is_number(v)}, reverse=bool(better))
    if better is None or len(distinct) < 2:
        return {}
    return {n: distinct.index(v) + 1 for n, v in values.items() if is_number(v) and v in distinct[:2]}


def _text(value: Any, metric: str, digits: int = 4) -> str:
    if not is_number(value):
        return "–"
    if metric == "seconds_per_image":
        return f"{value:.{digits - 1}g}"
    return f"{value:.{digits - 2 * (metric in ('adp', 'pic'))}f}"


def _interval(bounds: Any, metric: str) -> str | None:
    if not isinstance(bounds, (list, tuple)) or len(bounds) != 2 or not all(map(is_number, bounds)):
        return None
    low, high = (_text(bound, metric, digits=3) for bound in bounds)
    return f"{low}\N{THIN SPACE}…\N{THIN SPACE}{high}"  # narrow: twelve columns share a page


def _headline(methods: Mapping[str, Mapping[str, Any]]) -> str | None:
    scored = {n: v["ins_minus_del"] for n, v in methods.items() if is_number(v.get("ins_minus_del"))}
    if not scored:
        return None
    best = max(scored, key=scored.__getitem__)
    interval = _interval((methods[best].get("ci95") or {}).get("ins_minus_del"), "ins_minus_del")
    text = f"Most faithful: {best}, insertion − deletion {scored[best]:.4f}"
    return text + (f" (95 % interval {interval})." if interval else ".")


def _facts(summary: Mapping[str, Any], classifier: Mapping[str, Any]) -> list[str]:
    facts = [f"{len(summary['methods'])} methods"]
    if is_number(classifier.get("images")):
        facts.append(f"{classifier['images']} images")
    if is_number(classifier.get("accuracy")):
        facts.append(f"classifier accuracy {100 * classifier['accuracy']:.1f} %")
    if summary.get("target") is not None:
        facts.append(f"explained class: {summary['target']}")
    return facts


def _comparisons(values: Any) -> list[dict[str, str]]:
    """Paired differences {"a − b": {"difference", "ci95", "p"}} as text."""
    rows = []
    for pair, found in (values or {}).items():
        interval = found.get("ci95")
        known = interval and all(map(is_number, interval))
        rows.append(
            {
                "pair": pair,
                "difference": f"{found['difference']:+.4f}" if is_number(found.get("difference")) else "–",
                "interval": f"{interval[0]:+.4f} … {interval[1]:+.4f}" if known else "–",
                "p": f"{found['p']:.2g}" if is_number(found.get("p")) else "–",
            }
        )
    return rows


def _failures(values: Any) -> list[tuple[str, str]]:
    """What failed and why, of {method: reason} or of records {"method", "images", "reason"}."""
    if not isinstance(values, (list, tuple)):
        return list(_flat(values or {}))
    rows = []
    for record in values:
        if isinstance(record, Mapping) and "reason" in record:
            count = len(record.get("images") or ())
            where = f" ({count} image{'s' * (count != 1)})" if count else ""
            rows.append((f"{record.get('method') or 'not used'}{where}", str(record["reason"])))
        else:
            rows.append(("", _plain(record)))
    return rows


def _shortcut(values: Any) -> dict[str, Any] | None:
    """Single numbers as a list of facts, lists of numbers as the rows of one table over the steps."""
    if not isinstance(values, Mapping) or not values:
        return None
    series = {
        str(k): [_plain(x) for x in v]
        for k, v in values.items()
        if isinstance(v, (list, tuple)) and v and all(map(is_number, v))
    }
    return {
        "facts": [(n.replace("_", " "), t) for n, t in _flat({k: v for k, v in values.items() if k not in series})],
        "series": {k.replace("_", " "): v for k, v in series.items()},
        "steps": range(max(map(len, series.values()), default=0)),
    }


def _figure(title: str, path: Path) -> dict[str, Any]:
    name, caption = CAPTIONS.get(title, (title.replace("_", " "), ""))
    with Image.open(path) as picture:
        kind, dpi = Image.MIME[picture.format or "PNG"], picture.info.get("dpi", (0, 0))[0]
        # at this many dots per inch the letters of our figures are as large as the page's
        size = [round(side * 124 / dpi) if dpi > 1 else side for side in picture.size]
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return {"title": name, "caption": caption, "size": size, "source": f"data:{kind};base64,{data}"}


def _named(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    return {} if value is None else {name: value}


def _pick(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: values[name] for name in names if values.get(name) is not None}


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested facts as (name, text); a list of plain values is one line, one of others a line each."""
    if isinstance(values, Mapping):
        items: Any = values.items()
    elif isinstance(values, (list, tuple)) and any(isinstance(v, (Mapping, list, tuple)) for v in values):
        items = enumerate(values, 1)
    else:
        many = isinstance(values, (list, tuple))
        yield prefix, ", ".join(map(_plain, values)) if many else _plain(values)
        return
    for key, value in items:
        name = str(key) if isinstance(values, Mapping) and not prefix else f"{prefix} · {key}".strip(" ·")
        yield from _flat(value, name)


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
