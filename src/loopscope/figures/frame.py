"""The page's own view of something, within the output of a notebook.

A frame holds a whole document: the page's style, its modules, and what they show. It is
a world of its own (`sandbox`), and its policy lets nothing be asked for, from any host.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from html import escape

from loopscope.figures import STATIC
from loopscope.figures.modules import script

HELLO = """
const frame = this, around = this.parentNode, otherwise = this.nextElementSibling;
const pipe = new MessageChannel();
const tell = () => pipe.port1.postMessage(getComputedStyle(around).color);
pipe.port1.onmessage = ({ data }) => {
  frame.style.height = data > 0 ? `${Math.min(data, 20000)}px` : '24rem';
  frame.style.visibility = 'visible';
  otherwise.style.display = 'none';
  tell();
};
frame.contentWindow.postMessage(null, '*', [pipe.port2]);
around.ontransitionend = tell;
tell();
"""
"""Run by the notebook once the frame is loaded: static/alone.js answers with a height.

Only then is the frame seen, in place of what stands below it. Where scripts do not run,
or where the frame or this has been taken out, nobody answers, and that stays. The frame
is told the colour of the notebook's text, now and, since what is around it has a
transition, when it changes.
"""


def framed(title: str, content: str, otherwise: str) -> str:
    """What a notebook shows.

    Args:
        title: Of the frame, for those who hear it.
        content: JSON for the page's modules, in which nothing is markup.
        otherwise: HTML, shown where scripts do not run.
    """
    # Between single quotes: JSON is full of double ones.
    document = escape(_document(content), quote=False).replace("'", "&#x27;")
    return (
        '<div style="transition: color 1ms">'
        f'<iframe title="{escape(title)}" sandbox="allow-scripts" style="visibility: '
        'hidden; display: block; width: 100%; height: 1px; border: 0" '
        f"onload=\"{escape(HELLO.strip())}\" srcdoc='{document}'></iframe>"
        f"<div>{otherwise}</div></div>"
    )


def _document(content: str) -> str:
    before, after = _around()
    return f"{before}{content}{after}"


@cache
def _around() -> tuple[str, str]:
    """What stands before the content, and after it."""
    style = re.sub(r"\n\s*\n", "\n", (STATIC / "style.css").read_text("utf-8"))
    code = script("alone")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; "
        f"script-src '{_digest(code)}'; base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>loopscope</title><style>{style}</style></head>"
        '<body class="alone"><main></main><script id="opened" type="application/json">',
        f"</script><script>{code}</script></body></html>",
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
