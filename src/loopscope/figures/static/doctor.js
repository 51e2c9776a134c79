/** The doctor: what it found as training began, and all its checks on demand. */

import { at, fill, h } from "./dom.js";
import { value } from "./format.js";
import { busy, sorry, work } from "./jobs.js";
import { chosen, known, on } from "./store.js";
import { word } from "./words.js";

const kept = new Map();

/** The run that is being examined. */
let asking = null;

/** Begin. */
export function begin() {
  on(["run", "look", "events"], draw);
  draw();
}

let drawn = "";

function draw() {
  const event = known.events.findLast((one) => one.kind === "doctor");
  const asked = kept.get(chosen.run);
  const state = [chosen.run, !known.run, event?.id, asked?.length, asking, word("doctor")].join("|");
  if (state === drawn) return; // Events come often; findings seldom.
  drawn = state;
  const found = asked ?? event?.data.findings;
  fill(at("doctor").querySelector(".body"),
    found ? list(found, asked ? "doctor.asked" : "doctor.recorded", event?.data)
      : h("p.quiet", {}, word("doctor.none")),
    h("p", {}, h("button", {
      type: "button", id: "examine", disabled: !known.run || asking !== null, onclick: examine,
    }, word(asked ? "doctor.again" : "doctor.examine"))),
    h("div", { id: "doctor-job" }));
}

function list(findings, when, event) {
  return h("div", { id: "findings" },
    h("p.quiet", {}, word(when), event?.why_not && when === "doctor.recorded"
      ? h("span", { lang: "en" }, ` ${event.why_not}`) : null),
    findings.length ? h("ul.findings", {}, findings.map(finding))
      : h("p.good", {}, `✓ ${word("doctor.clean")}`));
}

function finding(of) {
  const measured = Object.entries(of.measured ?? {});
  const grave = of.severity === "error";
  return h("li", { class: grave ? "grave" : "mild" },
    h("p", {}, h("b.severity", {}, `${grave ? "✗" : "!"} ${word(grave ? "severity.error" : "severity.warning")}`),
      " ", h("code", {}, of.check)),
    h("p.message", { lang: "en" }, of.message),
    h("dl", {},
      measured.length ? [h("dt", {}, word("doctor.evidence")), h("dd", { lang: "en" },
        measured.map(([name, v]) => `${name} ${typeof v === "number" ? value(v) : plain(v)}`).join(", "))] : null,
      of.where ? [h("dt", {}, word("doctor.where")), h("dd", {}, h("code", {}, of.where))] : null,
      of.change ? [h("dt", {}, word("doctor.change")), h("dd", { lang: "en" }, of.change)] : null));
}

const plain = (v) => (typeof v === "object" ? JSON.stringify(v) : String(v));

async function examine() {
  const run = chosen.run;
  const here = () => chosen.run === run;
  let trouble = null;
  asking = run;
  draw();
  busy(at("doctor-job"), null);
  try {
    const { findings } = await work("doctor", { run }, (job) => {
      if (here()) busy(at("doctor-job"), job);
    });
    kept.set(run, findings);
  } catch (error) {
    trouble = error;
  }
  asking = null;
  draw();
  if (trouble && here()) sorry(at("doctor-job"), trouble);
}
