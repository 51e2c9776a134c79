/** Gears: what was measured while training, and all of them side by side on demand. */

import { at, fill, h } from "./dom.js";
import { duration, finite, value } from "./format.js";
import { busy, cancelled, sorry, work } from "./jobs.js";
import { CONFIG, layout, plotly } from "./plotly.js";
import { line } from "./colours.js";
import { reason } from "./reason.js";
import { chosen, known, on } from "./store.js";
import { table } from "./tables.js";
import { word } from "./words.js";

const kept = new Map();

/** The run whose gears are being measured. */
let asking = null;

/** Begin. */
export function begin() {
  on(["run", "look", "anew"], draw);
  draw();
}

function draw() {
  const rows = kept.get(chosen.run);
  fill(at("gears").querySelector(".body"),
    recorded(known.run?.gears),
    h("p", {}, h("button", {
      type: "button", id: "compare", disabled: !known.run || asking !== null, onclick: compare,
    }, word(rows ? "gears.again" : "gears.measure"))),
    h("div", { id: "gears-job" }), h("div", { id: "gears-found" }));
  if (rows) show(rows);
}

function recorded(gears) {
  const measured = Object.entries(gears?.measured ?? {});
  if (!measured.length) return h("p.quiet", {}, word("gears.none"));
  const most = Math.max(...measured.map(([, s]) => s));
  return h("div", {},
    h("ul.bars", { id: "gears-recorded", "aria-label": word("gears.recorded") },
      measured.map(([name, s]) => h("li", { class: name === gears.chosen ? "here" : null },
        h("span.name", {}, name, name === gears.chosen ? ` ✓ ${word("gears.chosen")}` : ""),
        h("span.meter", { "aria-hidden": "true", style: { "--part": s / most } }),
        h("span.number", {}, word("gears.each", { time: duration(s) }))))),
    gears.reason ? h("p.quiet", {}, reason(gears)) : null);
}

async function compare() {
  const run = chosen.run;
  const here = () => chosen.run === run;
  let trouble = null;
  let found = null;
  asking = run;
  at("compare").disabled = true;
  busy(at("gears-job"), null);
  try {
    found = await work("compare", { run }, (job) => {
      if (here()) busy(at("gears-job"), job);
    });
    if (found) kept.set(run, found.rows);
  } catch (error) {
    trouble = error;
  }
  asking = null;
  draw();
  if (!here()) return;
  if (trouble) sorry(at("gears-job"), trouble);
  else if (!found) cancelled(at("gears-job"), at("compare"));
}

async function show(rows) {
  const there = rows.filter((row) => row.available && finite(row.ms_per_step));
  const plot = h("div.plot", { role: "img", "aria-label": word("gears.chart") });
  fill(at("gears-found"),
    h("h3", {}, word("gears.chart")),
    h("ul.legend", {}, there.map((row, i) => h("li", {},
      h("span.sample", { "aria-hidden": "true", style: { color: line(i) } }, i % 2 ? "┄" : "━"),
      row.gear))),
    plot,
    table("gears.table",
      ["gears.gear", "gears.ms", "gears.compile", "gears.even", "gears.differs"],
      rows.map((row) => row.available
        ? [row.chosen ? `${row.gear} ✓` : row.gear, value(row.ms_per_step, 3),
          duration(row.compile_seconds), even(row), value(row.max_relative_difference, 2)]
        : [row.gear, "–", "–", "–", h("span", { lang: "en" }, row.reason)])));
  try {
    const Plotly = await plotly();
    if (plot.isConnected) await Plotly.react(plot, ...drawing(there), CONFIG);
  } catch (error) {
    sorry(at("gears-job"), error);
  }
}

const even = (row) => row.break_even_step === null ? word("gears.never")
  : word("gears.steps", { n: row.break_even_step });

/** Seconds against steps: where a line crosses eager's, compiling has paid. */
function drawing(rows) {
  const crossings = rows.map((row) => row.break_even_step).filter((step) => step > 0);
  const far = Math.max(100, 1.6 * Math.max(0, ...crossings));
  const looks = layout(230);
  looks.hovermode = false;
  looks.dragmode = false;
  looks.xaxis.fixedrange = true;
  looks.xaxis.title.text = word("axis.step");
  looks.yaxis.title.text = word("gears.seconds");
  looks.yaxis.rangemode = "tozero";
  const time = (row, step) => (row.compile_seconds ?? 0) + (step * row.ms_per_step) / 1e3;
  const traces = rows.map((row, i) => ({
    type: "scatter", mode: "lines", hoverinfo: "skip", x: [0, far],
    y: [time(row, 0), time(row, far)],
    line: { color: line(i), width: 2, dash: i % 2 ? "dash" : "solid" },
  }));
  const points = rows.map((row, i) => ({ row, i })).filter(({ row }) => row.break_even_step > 0);
  traces.push({
    type: "scatter", mode: "markers+text", hoverinfo: "skip", cliponaxis: false,
    x: points.map(({ row }) => row.break_even_step),
    y: points.map(({ row }) => time(row, row.break_even_step)),
    text: points.map(({ row }) => String(row.break_even_step)), textposition: "top center",
    marker: { size: 9, symbol: "circle-open", line: { width: 2 },
      color: points.map(({ i }) => line(i)) },
  });
  return [traces, looks];
}
