/** One chart of curves: from lines to plotly's traces, and what a pointer does to it. */

import { h, fill } from "./dom.js";
import { count, value } from "./format.js";
import { depth } from "./depth.js";
import { CONFIG, faint, layout, plotly } from "./plotly.js";
import { style } from "./colours.js";
import { smooth } from "./series.js";
import { sketch } from "./sketch.js";
import { word } from "./words.js";

/**
 * A chart.
 *
 * A line is `{run, name, kind, label, colour, dash, sign, x, y, low, high, step, size}`:
 * `kind` is `output`, `epoch` or `signal`; `step` holds the step of each point, `size` how
 * many steps one stands for.
 */
export class Chart {
  /**
   * @param {string} name - What is drawn.
   * @param {object} heard - `zoom(range)` and `pick(line, index)`.
   */
  constructor(name, heard) {
    this.name = name;
    this.lines = [];
    this.heard = heard;
    this.plot = h("div.plot", { role: "img", "aria-label": name });
    this.legend = h("ul.legend");
    this.map = h("div");
    this.node = h("figure.chart", {},
      h("figcaption", {}, h("h3", {}, name), this.legend), this.plot, this.map);
    this.ready = false;
  }

  /**
   * Draw.
   * @param {Array} lines - See above.
   * @param {object} how - `axis`, `log`, `weight`, `range`, `cursor`, `height`.
   */
  async draw(lines, how) {
    this.lines = lines;
    this.describe();
    const layers = lines.filter((line) => line.kind === "signal");
    fill(this.map, layers.length > 1 ? depth(layers, this.heard.pick) : null);
    if (!this.ready && !window.Plotly) {
      fill(this.plot, sketch(lines, how));
      await painted(); // Reading plotly.js keeps the browser from painting anything.
    }
    const Plotly = await plotly();
    if (!this.plot.isConnected) return;
    const looks = layout(how.height);
    Object.assign(looks.xaxis, {
      title: { ...looks.xaxis.title, text: word(`axis.${how.axis}`) },
      range: how.range ?? undefined, autorange: how.range ? false : true,
    });
    looks.yaxis.type = how.log ? "log" : "linear";
    looks.shapes = how.cursor === null ? [] : [{
      type: "line", xref: "x", yref: "paper", x0: how.cursor, x1: how.cursor, y0: 0, y1: 1,
      line: { color: style("--mark"), width: 1.5, dash: "dot" },
    }];
    if (!this.ready) fill(this.plot);
    const traces = lines.flatMap((line, i) => tracesOf(line, i, how.weight));
    await Plotly.react(this.plot, traces, looks, CONFIG);
    if (!this.ready) this.listen();
  }

  listen() {
    this.ready = true;
    this.plot.on("plotly_relayout", (change) => {
      const [low, high] = [change["xaxis.range[0]"], change["xaxis.range[1]"]];
      if (Number.isFinite(low) && Number.isFinite(high)) this.heard.zoom([low, high]);
    });
    this.plot.on("plotly_doubleclick", () => this.heard.zoom(null));
    this.plot.on("plotly_hover", ({ points }) => this.read(points));
    this.plot.on("plotly_unhover", () => this.read([]));
    this.plot.on("plotly_click", ({ points }) => {
      const order = { incident: 0, output: 1, signal: 2, epoch: 3 };
      const [found] = points
        .filter((p) => p.data.meta)
        .sort((a, b) => order[a.data.meta.kind] - order[b.data.meta.kind]
          || a.data.meta.line - b.data.meta.line);
      if (found) this.heard.pick(this.lines[found.data.meta.line], found.pointNumber);
    });
  }

  /** What the lines end with; under a pointer, what they are there. */
  read(points) {
    const there = new Map(
      points.filter((p) => p.data.meta).map((p) => [p.data.meta.line, p.pointNumber]));
    fill(this.legend, this.lines.map((line, i) => {
      const at = there.get(i) ?? (points.length ? null : line.y.length - 1);
      return at === null || at < 0 ? legendOf(line, "") : legendOf(line, reading(line, at));
    }));
  }

  describe() {
    this.read([]);
    const said = this.lines.slice(0, 6).map((line) => {
      const least = Math.min(...line.y.filter(Number.isFinite));
      return word("chart.line", {
        name: line.label, last: value(line.y.at(-1) ?? NaN), least: value(least),
        step: count(line.step.at(-1) ?? 0),
      });
    });
    this.plot.setAttribute("aria-label", [this.name, ...said].join(". "));
  }

  /** Let go of what plotly keeps. */
  close() {
    if (this.ready) window.Plotly.purge(this.plot);
    this.node.remove();
  }
}

function reading(line, at) {
  const parts = [value(line.y[at])];
  if (line.low && line.high[at] > line.low[at]) {
    parts.push(`${value(line.low[at], 3)}…${value(line.high[at], 3)}`);
  }
  return `${parts.join(" · ")} @${count(line.step[at])}`;
}

function legendOf(line, said) {
  const sample = line.kind === "epoch" ? line.sign : line.dash === "dash" ? "┄" : "━";
  return h("li", {},
    h("span.sample", { "aria-hidden": "true", style: { color: line.colour } }, sample),
    line.label, said ? h("b", {}, ` ${said}`) : null);
}

const painted = () => new Promise((resolve) => {
  requestAnimationFrame(() => setTimeout(resolve));
  setTimeout(resolve, 100); // Where nothing is painted: a tab in the background.
});

const SYMBOLS = {
  "●": "circle", "■": "square", "▲": "triangle-up", "◆": "diamond", "▼": "triangle-down",
  "✚": "cross", "○": "circle-open", "□": "square-open", "△": "triangle-up-open",
  "◇": "diamond-open", "▽": "triangle-down-open", "✛": "cross-open",
};

function tracesOf(line, i, weight) {
  const { x, y, colour } = line;
  const meta = { line: i, kind: line.kind };
  const base = { type: "scatter", hoverinfo: "none", x };
  if (line.kind === "incident") {
    return [{ ...base, y, meta, mode: "markers",
      marker: { symbol: "triangle-down", size: 11, color: colour,
        line: { color: style("--paper"), width: 1 } } }];
  }
  if (line.kind === "epoch") {
    return [{ ...base, y, meta, mode: "lines+markers",
      line: { color: colour, width: 1.6, dash: line.dash },
      marker: { size: 6, symbol: SYMBOLS[line.sign] ?? "circle", color: colour } }];
  }
  const found = [];
  const band = line.low?.some((low, k) => line.high[k] > low);
  const skip = { ...base, hoverinfo: "skip", mode: "lines" };
  if (band) {
    found.push(
      { ...skip, y: line.low, line: { width: 0 } },
      { ...skip, y: line.high, line: { width: 0 }, fill: "tonexty",
        fillcolor: faint(colour, 0.18) });
  }
  if (weight > 0) {
    found.push({ ...skip, y, line: { color: faint(colour, 0.3), width: 1 } });
  }
  found.push({ ...base, meta, mode: x.length === 1 ? "markers" : "lines",
    y: smooth(y, weight), line: { color: colour, width: 1.8, dash: line.dash } });
  return found;
}
