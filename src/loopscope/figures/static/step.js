/** A step that is gone back to and opened: asking for it, walking on, laying it out. */

import { at, fill, h } from "./dom.js";
import { examples } from "./examples.js";
import { count, value } from "./format.js";
import { heat } from "./heat.js";
import { busy, sorry, work } from "./jobs.js";
import { chosen, known, on, open, steps, tellAll } from "./store.js";
import { layers, phases, variables } from "./tables.js";
import { word } from "./words.js";

const PATIENCE_MS = 200;

let asking = false;
let waiting = 0;

/** Begin. */
export function begin() {
  on(["run", "look"], draw);
  on("open", () => {
    head();
    clearTimeout(waiting);
    // Someone who walks along with a key held down wants the step he stops at.
    waiting = setTimeout(load, PATIENCE_MS);
  });
  document.addEventListener("keydown", walk);
  draw();
}

function walk(event) {
  if (chosen.step === null || event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.target.closest?.("input, select, textarea, [tabindex='0']")) return;
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!by) return;
  event.preventDefault();
  go(chosen.step + by);
}

function first() {
  return known.run?.manifest?.first_step ?? 0;
}

function go(step) {
  if (step >= first() && (step < steps() || steps() === 0)) open(step);
}

function draw() {
  const body = at("step").querySelector(".body");
  if (chosen.step === null) {
    fill(body, h("p.quiet.empty", {}, word("step.none")));
    return;
  }
  fill(body, h("div", { id: "step-head" }), h("div", { id: "step-job" }),
    h("div", { id: "step-found" }));
  head();
  if (known.opened?.step === chosen.step) show(known.opened);
}

function head() {
  if (!at("step-head")) return void draw();
  const focused = document.activeElement?.id;
  const step = chosen.step;
  fill(at("step-head"),
    h("div.buttons", { role: "group", "aria-label": word("step.walk") },
      h("button", { type: "button", id: "step-back", disabled: step <= first(),
        "aria-keyshortcuts": "ArrowLeft", onclick: () => go(step - 1) }, "← ", word("step.back")),
      h("strong", { id: "step-number" }, word("step.of", { step: count(step), steps: count(steps()) })),
      h("button", { type: "button", id: "step-on", disabled: step + 1 >= steps(),
        "aria-keyshortcuts": "ArrowRight", onclick: () => go(step + 1) }, word("step.on"), " →")),
    h("p.quiet", {}, word("step.keys")));
  if (focused?.startsWith("step-")) at(focused)?.focus();
}

async function load() {
  if (asking) return; // What is wanted by then is asked for afterwards.
  asking = true;
  const { run, step } = chosen;
  const wanted = () => chosen.run === run && chosen.step === step;
  if (!at("step-job")) draw();
  at("step-found").classList.add("old");
  busy(at("step-job"), null);
  if (!known.opened) at("step").scrollIntoView({ block: "nearest" });
  let early = false;
  const heard = (job) => {
    if (!wanted()) return;
    busy(at("step-job"), job);
    // The story takes longer than all else: what is there is shown without it.
    if (job.result && !early) { early = true; have(job.result, step); }
  };
  try {
    const opened = await work("open", { run, step }, heard, wanted);
    if (opened && wanted()) {
      fill(at("step-job"));
      have(opened, step);
    }
  } catch (error) {
    if (wanted()) {
      if (!early) fill(at("step-found"));
      sorry(at("step-job"), error);
    }
  } finally {
    asking = false;
    if (chosen.step !== null && !wanted()) load();
  }
}

function have(opened, step) {
  known.opened = { ...opened, step };
  show(known.opened);
  tellAll("opened", known.opened);
}

function show(opened) {
  const place = at("step-found");
  place.classList.remove("old");
  const first_ = opened.first_nonfinite;
  fill(place,
    h("div.facts", {}, facts(opened)),
    first_ ? h("p.trouble", {}, h("strong", {}, word("step.nonfinite")), " ",
      h("span", { lang: "en" }, nonfinite(first_))) : null,
    bitsApart(opened),
    opened.why?.length ? part("step.why", "why", story(opened.why)) : null,
    part("step.examples", "pictures", examples(opened)),
    h("div.columns", {},
      part("step.heat", "heat", heat(opened.heat)),
      part("step.layers", "layers", layers(opened.layers)),
      part("step.variables", "variables", variables(opened)),
      part("step.phases", "times", phases(opened.phases))),
    opened.missing?.length ? part("step.missing", "missing",
      h("ul", { lang: "en" }, opened.missing.map((text) => h("li", {}, text)))) : null);
}

const part = (title, name, node) =>
  h("section.part", { class: `part ${name}` }, h("h3", {}, word(title)), node);

function facts(opened) {
  const differs = opened.loss_difference;
  const bits = opened.same_bits;
  return h("dl.gauges", {},
    fact("step.place", word("step.batch", { epoch: (opened.epoch ?? 0) + 1,
      index: count(opened.batch_index) })),
    fact("gauge.gear", opened.gear ?? "–"),
    fact("step.rate", value(opened.learning_rate)),
    fact("step.loss", value(opened.loss, 7)),
    fact("step.recorded", value(opened.recorded_loss, 7)),
    fact("step.same", bits === true ? `✓ ${word("step.bits")}`
      : bits === false ? `✗ ${word("step.nobits")}` : "–", bits === false ? "bad" : "good"),
    differs !== null && differs !== undefined
      ? fact("step.differs", value(differs, 3)) : null,
    Object.entries(opened.losses ?? {}).length > 1
      ? Object.entries(opened.losses).map(([name, of]) =>
        h("div", {}, h("dt", {}, name), h("dd", {}, value(of, 6)))) : null);
}

/** Where a replay departs from the record, if it does. */
function bitsApart(opened) {
  if (opened.same_bits !== false || !opened.difference) return null;
  const said = typeof opened.difference === "string"
    ? opened.difference : JSON.stringify(opened.difference);
  return h("p.trouble", {}, h("strong", {}, word("step.nobits")), " ",
    h("span", { lang: "en" }, said));
}

const fact = (name, said, kind = null) =>
  h("div", {}, h("dt", {}, word(name)), h("dd", { class: kind }, said));

/** Sentences; what is indented belongs to the one before. */
function story(sentences) {
  const parts = [];
  for (const line of sentences.flatMap((sentence) => sentence.split("\n"))) {
    const under = line.startsWith("  ") && parts.length > 0;
    if (!under) parts.push(h("div"));
    parts.at(-1).append(h(under ? "p.under" : "p", {}, line.trim()));
  }
  return h("div.story", { lang: "en" }, parts);
}

function nonfinite(of) {
  const where = of.layer ? ` in layer ${of.layer}` : "";
  const when = of.phase ? `, ${of.phase}` : "";
  const rows = of.examples?.length ? `, examples ${of.examples.slice(0, 8).join(", ")}` : "";
  return `${of.what} ${of.name}${where}${when}${rows}`;
}
