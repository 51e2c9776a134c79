/**
 * An opened step by itself: in a frame of a notebook, which has brought the step along.
 * Nothing is asked for, and nobody is known but the document around the frame.
 */

import { at, fill, h } from "./dom.js";
import { count } from "./format.js";
import { layout } from "./opened.js";
import { setLanguage, speaks, word } from "./words.js";

function begin() {
  const opened = JSON.parse(at("opened").textContent);
  setLanguage(speaks());
  paint(null);
  fill(document.querySelector("main"),
    h("section.panel", { id: "step", "aria-labelledby": "step-title" },
      h("h1", { id: "step-title" }, word("step")),
      h("h2", { id: "step-number" }, word("step.number", { step: count(opened.step) })),
      h("div", { id: "step-found" }, layout(opened))));
  addEventListener("message", meet);
}

/** The document around is told how high this is, and says in which colour it writes. */
function meet({ source, ports: [pipe] }) {
  if (source !== parent || !pipe) return;
  const tell = () => pipe.postMessage(Math.ceil(document.body.getBoundingClientRect().height));
  pipe.onmessage = ({ data }) => paint(data);
  // Not by the observer alone: it sleeps where a frame is not on the screen.
  tell();
  new ResizeObserver(tell).observe(document.body);
}

/** A notebook has a theme of its own: where it writes in a light colour, it is dark. */
function paint(colour) {
  const parts = /^rgba?\((\d+), (\d+), (\d+)/.exec(colour ?? "")?.slice(1).map(Number);
  const dark = parts ? Math.max(...parts) + Math.min(...parts) > 255
    : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "dark" : "light";
}

begin();
