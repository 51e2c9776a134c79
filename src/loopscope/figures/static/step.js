/** A step that is gone back to and opened: asking for it, and walking on. */

import { at, fill, h } from "./dom.js";
import { count } from "./format.js";
import { busy, cancelled, sorry, work } from "./jobs.js";
import { layout } from "./opened.js";
import { chosen, known, on, open, steps, tellAll } from "./store.js";
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
    if (!wanted()) return;
    if (opened) {
      fill(at("step-job"));
      have(opened, step);
    } else {
      if (!early) fill(at("step-found"));
      cancelled(at("step-job"), at("step"));
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
  fill(place, layout(opened));
}
