/** Signals over depth and time, as a map of heat: layers downwards, steps to the right. */

import { h } from "./dom.js";
import { count, value } from "./format.js";
import { style } from "./colours.js";
import { word } from "./words.js";

const ROW = 18;
const COLUMNS = 600;

/**
 * A map of the signals of one group.
 * @param {Array} signals - As the lines of a chart, from input to output.
 * @param {function} pick - Told of the line and the point that was clicked.
 *
 * Each cell is the largest value of its steps, by orders of magnitude from the smallest
 * of the map to the largest; what is not finite has the colour of what is bad.
 */
export function depth(signals, pick) {
  const steps = signals[0]?.step ?? [];
  const columns = Math.min(COLUMNS, steps.length);
  const said = h("p.quiet");
  const canvas = h("canvas", {
    width: columns, height: signals.length, role: "img",
    "aria-label": word("depth.label", { n: signals.length, steps: count(steps.length) }),
    style: { height: `${ROW * signals.length}px` },
  });
  paint(canvas, signals, columns);
  const there = (event) => {
    const box = canvas.getBoundingClientRect();
    const share = (a, b) => Math.min(0.9999, Math.max(0, a / b));
    const row = Math.floor(share(event.clientY - box.top, box.height) * signals.length);
    const at = Math.floor(share(event.clientX - box.left, box.width) * steps.length);
    return [signals[row], at];
  };
  canvas.addEventListener("pointermove", (event) => {
    const [line, at] = there(event);
    said.textContent = `${line.label} ${value(line.y[at])} @${count(line.step[at])}`;
  });
  canvas.addEventListener("click", (event) => pick(...there(event)));
  return h("div.depth", {},
    h("ul", { style: { "line-height": `${ROW}px` } },
      signals.map((line) => h("li", { title: line.label }, line.label))),
    canvas, said);
}

function paint(canvas, signals, columns) {
  const cells = signals.map((line) => Array.from({ length: columns }, (_, k) => {
    const from = Math.floor((k * line.y.length) / columns);
    const to = Math.max(from + 1, Math.floor(((k + 1) * line.y.length) / columns));
    const part = line.y.slice(from, to);
    return part.every(Number.isFinite) ? Math.max(...part) : NaN;
  }));
  const sizes = cells.flat().filter((v) => v > 0).map(Math.log10);
  const low = sizes.reduce((a, b) => Math.min(a, b), Infinity);
  const high = sizes.reduce((a, b) => Math.max(a, b), -Infinity);
  const context = canvas.getContext("2d");
  const [heat, bad] = [style("--heat"), style("--bad")];
  cells.forEach((row, y) => row.forEach((v, x) => {
    const share = v > 0 ? (Math.log10(v) - low) / (high - low || 1) : 0;
    context.fillStyle = Number.isNaN(v) ? bad : `rgba(${heat}, ${0.06 + 0.94 * share})`;
    context.fillRect(x, y, 1, 1);
  }));
}
