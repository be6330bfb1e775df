"""What a reader sees: overlays, figures, tables and one self-contained HTML page.

Overlays and tables need the core dependencies only; figures and the page need the extra ``report`` (matplotlib,
jinja2).
"""

from . import comparison_figures, figures, html, overlays, tables

__all__ = ["comparison_figures", "figures", "html", "overlays", "tables"]
