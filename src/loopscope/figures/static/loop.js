/** The loop as code, alive: the line that runs, where the time goes, what flows. */

import { at, fill, h, say } from "./dom.js";
import { duration, percent } from "./format.js";
import { said } from "./said.js";
import { known, live, on } from "./store.js";
import { word } from "./words.js";

const PHASES = ["data", "step", "compiling", "callbacks", "validation", "saving"];
const INSIDE = ["forward", "loss", "backward", "apply", "metrics"];

/** A step is one call: while it runs, or is compiled, all of its lines do. */
const RUNS = { step: ["step", ...INSIDE], compiling: ["step", ...INSIDE] };

let rows = [];

/** Begin. */
export function begin() {
  on(["run", "look"], draw);
  on(["status", "opened"], update);
  draw();
}

function draw() {
  const body = at("loop").querySelector(".body");
  const lines = known.run?.code?.lines ?? [];
  if (!lines.length) {
    rows = [];
    fill(body, h("p.quiet", {}, word(known.run ? "loop.none" : "loading")));
    return;
  }
  rows = lines.map((line) => row(line, line === lead(lines, line.role)));
  fill(body,
    h("div.phases", { id: "phases" }),
    h("ol.code", { tabindex: "0", "aria-label": word("loop.code") }, rows.map((r) => r.node)));
  update();
}

/** Where the time of a role is shown: of callbacks, those of batches take most of it. */
function lead(lines, role) {
  const found = role === null ? [] : lines.filter((line) => line.role === role);
  return found.find((line) => role === "callbacks" && line.text.includes("_batch_")) ?? found[0];
}

function row(line, first) {
  const indent = line.text.length - line.text.trimStart().length;
  const parts = {
    mark: h("span.mark", { "aria-hidden": "true" }),
    shape: h("span.shape", { hidden: true, lang: "en", style: { "--indent": indent } }),
    bar: h("span.bar", { "aria-hidden": "true" }),
    time: h("span.time"),
    now: h("span.unseen"),
  };
  const node = h("li", { class: line.role ? `role-${line.role.replace(/\W/g, "")}` : null },
    h("span.gutter", {}, h("span.cost", {}, parts.bar, parts.time), parts.mark, h("span.n", { "aria-hidden": "true" }, line.n)),
    h("span.text", {}, h("span", { lang: "en" }, ...tokens(line.text)),
      line.note ? h("span.note", {}, "  # ", said(`note.${line.about?.note}`, line.about, line.note)) : null),
    parts.now, parts.shape);
  return { ...parts, node, role: line.role, first };
}

/** Python, enough of it to be read easily. */
function tokens(text) {
  const found = [];
  const pattern = /(#.*$)|("[^"]*"|'[^']*')|\b(for|in|if|with|as|def|return|break|not|and|or|import|from|True|False|None)\b/g;
  let end = 0;
  for (const match of text.matchAll(pattern)) {
    found.push(text.slice(end, match.index));
    const kind = match[1] ? "note" : match[2] ? "quoted" : "keyword";
    found.push(h(`span.${kind}`, {}, match[0]));
    end = match.index + match[0].length;
  }
  return [...found, text.slice(end)];
}

function update() {
  if (!rows.length) return;
  const seconds = known.status?.seconds ?? {};
  const shapes = known.status?.shapes ?? {};
  const inside = known.opened?.phases ?? {};
  const most = Math.max(1e-12, ...Object.values(seconds));
  const longest = Math.max(1e-12, ...INSIDE.map((role) => (inside[role] ?? 0) / 1e3));
  const role = live() && !known.status.live?.paused ? known.status.live?.role : null;
  const running = RUNS[role] ?? [role];
  const from = rows.find((r) => r.first && running.includes(r.role));
  for (const r of rows) {
    const here = from !== undefined && running.includes(r.role)
      && (role !== "callbacks" || r === from);
    r.node.classList.toggle("now", here);
    if (r === from) r.node.setAttribute("aria-current", "true");
    else r.node.removeAttribute("aria-current");
    say(r.mark, r === from ? "▶" : "");
    say(r.now, r === from ? word("loop.now") : "");
    if (!r.first) continue;
    const took = seconds[r.role];
    const eager = took === undefined && INSIDE.includes(r.role) ? inside[r.role] / 1e3 : NaN;
    const shown = took ?? eager;
    say(r.time, shown > 0 ? duration(shown) : "");
    r.time.title = took === undefined && shown >= 0 ? word("loop.eager") : "";
    r.bar.classList.toggle("eager", took === undefined);
    const part = took === undefined ? eager / longest : took / most;
    r.bar.style.setProperty("--part", Number.isFinite(part) ? part : 0);
    const shape = shapes[r.role];
    r.shape.hidden = !shape;
    say(r.shape, shape ? `↓ ${shape}` : "");
  }
  const timed = Object.keys({ ...seconds, ...inside }).length > 0;
  rows[0].node.parentNode.classList.toggle("timed", timed);
  phases(seconds);
}

function phases(seconds) {
  const known_ = PHASES.filter((name) => seconds[name] > 0);
  const all = known_.reduce((sum, name) => sum + seconds[name], 0);
  const node = at("phases");
  if (!all) return void fill(node);
  fill(node,
    h("div.stack", { "aria-hidden": "true" }, known_.map((name) =>
      h(`span.phase-${name}`, { style: { flex: `${seconds[name] / all} 0 0` } }))),
    h("ul.legend", { "aria-label": word("loop.phases") }, known_.map((name) =>
      h("li", {}, h(`span.swatch.phase-${name}`, { "aria-hidden": "true" }),
        word(`phase.${name}`), " ", h("b", {}, percent(seconds[name] / all)),
        h("span.quiet", {}, ` ${duration(seconds[name])}`)))));
}
