"""What a reader sees: overlays, figures and one self-contained HTML page.

Overlays need the core dependencies only; figures and the page need the extra ``report`` (matplotlib, jinja2).
"""

from . import figures, html, overlays

__all__ = ["figures", "html", "overlays"]
