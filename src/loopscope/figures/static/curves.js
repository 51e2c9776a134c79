/** Curves of the runs that are drawn: which, how, in which range, and what a click opens. */

import { at, fill, h } from "./dom.js";
import { Chart } from "./chart.js";
import { drawn } from "./colours.js";
import { sorry } from "./jobs.js";
import { linesOf, learn, placed } from "./lines.js";
import { highest } from "./series.js";
import { chosen, focus, known, live, on, open, steps } from "./store.js";
import { begin as beginTools, groupsShown, how, logarithmic, tools } from "./tools.js";
import { word } from "./words.js";

const REFRESH_MS = 2000;
const HEIGHTS = [270, 190];

const charts = new Map();
let shown = null;
let drawing = false;
let again = false;
let refreshed = 0;

/** Begin. */
export function begin() {
  beginTools({ redraw, zoomBy });
  frame();
  on("look", () => { frame(); redraw(); });
  on("run", () => {
    if (shown !== chosen.run) Object.assign(how, { range: null, groups: null, log: null });
    shown = chosen.run;
    if (known.run) { tools(); redraw(); }
  });
  on(["beside", "open", "events"], redraw);
  on("anew", () => { tools(); redraw(); });
  on("status", () => {
    if (live() && Date.now() - refreshed > REFRESH_MS) redraw();
  });
}

function frame() {
  for (const chart of charts.values()) chart.close();
  charts.clear();
  fill(at("curves").querySelector(".body"),
    h("div.tools", { id: "curve-tools" }),
    h("div", { id: "charts" }, h("p.quiet.empty", {}, word("loading"))),
    h("div", { id: "curves-trouble" }),
    h("p.quiet", {}, word("curves.hint")));
  tools();
}

function zoom(range) {
  how.range = range;
  redraw();
}

/** Closer or further away, around the step that is open; `null`: all of it. */
function zoomBy(factor) {
  const whole = extent();
  const [low, high] = how.range ?? whole;
  const width = (high - low) * factor;
  if (factor === null || width >= whole[1] - whole[0]) return zoom(null);
  const cursor = cursorOf();
  const middle = cursor !== null && cursor >= low && cursor <= high ? cursor : (low + high) / 2;
  return zoom([middle - width / 2, middle + width / 2]);
}

/** From the first step to the last one of every run that is drawn. */
function extent() {
  const ends = drawn().map(placed).filter(Boolean).flatMap((of) => {
    const first = of.run.manifest?.first_step ?? 0;
    const last = of.id === chosen.run ? steps() : first + (of.run.summary.steps ?? 0);
    return [of.clock.x(first), of.clock.x(Math.max(first + 1, last))];
  });
  return ends.length ? [Math.min(...ends), Math.max(...ends)] : [0, 1];
}

function cursorOf() {
  const of = placed(chosen.run);
  return chosen.step === null || !of ? null : of.clock.x(chosen.step);
}

/** Draw what is chosen; while it is being drawn, what is chosen next waits. */
async function redraw() {
  again = drawing;
  if (drawing) return;
  drawing = true;
  try {
    await draw();
    fill(at("curves-trouble"));
  } catch (error) {
    sorry(at("curves-trouble"), error);
  } finally {
    drawing = false;
    if (again) redraw();
  }
}

async function draw() {
  const focused = chosen.run;
  if (!known.run) return;
  refreshed = Date.now();
  const found = await Promise.all(drawn().map((id) => learn(id, how.axis)));
  const names = groupsShown();
  const lines = await Promise.all(names.map((name) => linesOf(name, found, how.range)));
  if (chosen.run !== focused || !known.run) return;
  for (const [name, chart] of charts) {
    if (!names.includes(name)) { chart.close(); charts.delete(name); }
  }
  const place = at("charts");
  if (!charts.size) fill(place, names.length ? [] : h("p.quiet", {}, word("curves.none")));
  if (how.log === null && lines.length) { how.log = steep(lines[0]); tools(); }
  await Promise.all(names.map((name, i) => {
    if (!charts.has(name)) charts.set(name, new Chart(name, { zoom, pick }));
    const chart = charts.get(name);
    if (place.children[i] !== chart.node) place.insertBefore(chart.node, place.children[i] ?? null);
    return chart.draw(lines[i], {
      axis: how.axis, weight: how.weight, range: how.range ?? extent(), cursor: cursorOf(),
      log: how.log && logarithmic(name), height: HEIGHTS[Math.min(i, HEIGHTS.length - 1)],
    });
  }));
}

/** Whether a curve falls so far that most of it would lie on the axis. */
function steep(lines) {
  const values = lines.flatMap((line) => (line.kind === "output" ? line.y : []))
    .filter(Number.isFinite).sort((a, b) => a - b);
  if (!values.length || values[0] <= 0) return false;
  return values.at(-1) / values[values.length >> 1] > 30;
}

/** A point was clicked: go back to its step. */
async function pick(line, index) {
  if (line.run !== chosen.run) focus(line.run);
  let step = line.step[index];
  try {
    if (line.kind === "output" && line.size > 1) {
      const stop = line.step[index + 1] ?? line.stop ?? step + line.size;
      step = await highest(line.run, line.name, step, stop);
    }
    open(step);
  } catch (error) {
    sorry(at("curves-trouble"), error);
  }
}
