/** Lines without axes, at once: what is seen until plotly.js has come. */

import { svg } from "./dom.js";

const WIDTH = 1000;

/**
 * A drawing of some lines.
 * @param {Array} lines - As of a chart.
 * @param {object} how - `range`, `log` and `height`.
 */
export function sketch(lines, how) {
  const scale = how.log ? Math.log : (v) => v;
  const good = (v) => Number.isFinite(v) && (!how.log || v > 0);
  const values = lines.flatMap((line) => line.y.filter(good)).map(scale);
  const low = values.reduce((a, b) => Math.min(a, b), Infinity);
  const high = values.reduce((a, b) => Math.max(a, b), -Infinity);
  const [left, right] = how.range;
  const place = (x, y) =>
    `${((x - left) / (right - left || 1) * WIDTH).toFixed(1)},` +
    `${((1 - (scale(y) - low) / (high - low || 1)) * how.height).toFixed(1)}`;
  return svg("svg.sketch", {
    viewBox: `0 0 ${WIDTH} ${how.height}`, preserveAspectRatio: "none", "aria-hidden": "true",
  }, lines.filter((line) => line.kind !== "incident").map((line) => svg("polyline", {
    points: line.x.map((x, i) => (good(line.y[i]) ? place(x, line.y[i]) : "")).join(" "),
    fill: "none", stroke: line.colour, "stroke-width": 1.5, "vector-effect": "non-scaling-stroke",
    "stroke-dasharray": line.dash === "dash" ? "6 4" : null,
  })));
}
