/** What happened, newest first: compilations, checkpoints, resumes, incidents. */

import { ask } from "./api.js";
import { at, fill, h } from "./dom.js";
import { count, moment } from "./format.js";
import { happened } from "./happened.js";
import { sorry } from "./jobs.js";
import { chosen, known, live, on, open } from "./store.js";
import { word } from "./words.js";

const MOST = 200;

let kind = "";
let checkpoints = [];

/** Begin. */
export function begin() {
  frame();
  on("look", frame);
  on("run", () => { kind = ""; checkpoints = []; frame(); fetchCheckpoints(); });
  on("events", () => { draw(); if (live()) fetchCheckpoints(); });
}

async function fetchCheckpoints() {
  const run = chosen.run;
  if (!known.run) return;
  try {
    const found = await ask("checkpoints", { run });
    if (run !== chosen.run) return;
    checkpoints = found.checkpoints;
    draw();
  } catch (error) {
    if (at("events-trouble")) sorry(at("events-trouble"), error);
  }
}

function frame() {
  fill(at("events").querySelector(".body"),
    h("label", {}, word("events.kind"), " ",
      h("select", { id: "kind", onchange: (event) => { kind = event.target.value; draw(); } })),
    h("div.scroll", { id: "event-list", tabindex: "0", role: "group", "aria-label": word("events") }),
    h("div", { id: "events-trouble" }));
  draw();
}

function draw() {
  const all = [...known.events, ...checkpoints.map((one) => ({
    kind: "checkpoint", step: one.step, time: one.time, data: one,
  }))].sort((a, b) => b.time - a.time || (b.id ?? 0) - (a.id ?? 0));
  const kinds = [...new Set(all.map((event) => event.kind))].sort();
  const choices = ["", ...kinds];
  const select = at("kind");
  if ([...select.options].map((o) => o.value).join() !== choices.join()) {
    fill(select, choices.map((name) => h("option", { value: name, selected: name === kind },
      name ? word(`kind.${name}`, {}, name) : word("events.all"))));
  }
  const shown = all.filter((event) => !kind || event.kind === kind);
  fill(at("event-list"), shown.length
    ? h("ol.log", {}, shown.slice(0, MOST).map(item),
      shown.length > MOST ? h("li.quiet", {}, word("events.more", { n: shown.length - MOST })) : null)
    : h("p.quiet", {}, word("events.none")));
}

function item(event) {
  const bad = ["incident", "error", "problem", "warning"].includes(event.kind);
  const step = event.kind === "incident" ? (event.data.at ?? event.step) : event.step;
  return h("li", { class: bad ? "bad" : null },
    h("time", {}, moment(event.time)),
    h("b", {}, bad ? "! " : "", word(`kind.${event.kind}`, {}, event.kind)),
    event.kind === "incident"
      ? h("button.plain", { type: "button", onclick: () => open(step) },
        word("events.open", { step: count(step) }))
      : h("span.quiet", {}, word("events.step", { step: count(step) })),
    h("span.said", {}, happened(event)));
}
