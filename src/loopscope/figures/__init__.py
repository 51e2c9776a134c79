"""Plain data as HTML and as plotly figures: how records show themselves.

`static/` is what a browser is given: the page's own modules and its style.
"""

from __future__ import annotations

from pathlib import Path

STATIC = Path(__file__).parent / "static"
