/** The doctor: what it found as training began, and all its checks on demand. */

import { at, fill, h } from "./dom.js";
import { general, value } from "./format.js";
import { busy, cancelled, sorry, work } from "./jobs.js";
import { chosen, known, on } from "./store.js";
import { said } from "./said.js";
import { language, word } from "./words.js";

const OPEN = [["loss_at_", "_times_the_learning_rate"], ["", "_ms"]];

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
      ? [" ", notLooked(event)] : null),
    findings.length ? h("ul.findings", {}, findings.map(finding))
      : h("p.good", {}, `✓ ${word("doctor.clean")}`));
}

/** Why the quick checks have looked into no step. */
function notLooked({ because, why_not: english }) {
  const values = { seconds: general(because?.seconds, 2) };
  return [said(`glance.${because?.why}`, values, english),
    because?.error && language() !== "en" ? h("span", { lang: "en" }, ` ${because.error}`) : null];
}

function finding(of) {
  const key = ["finding", of.check, of.kind].filter(Boolean).join(".");
  const told = language() !== "en" && word(key, {}, null) !== null;
  const measured = Object.entries(of.measured ?? {});
  const grave = of.severity === "error";
  return h("li", { class: grave ? "grave" : "mild" },
    h("p", {}, h("b.severity", {}, `${grave ? "✗" : "!"} ${word(grave ? "severity.error" : "severity.warning")}`),
      " ", told ? `${word(`check.${of.check}`)} ` : null, h("code", {}, of.check)),
    said(key, of.measured, of.message, "p.message"),
    h("dl", {},
      measured.length ? [h("dt", {}, word("doctor.evidence")), h("dd", {},
        measured.map(([name, v], i) => [i ? ", " : "", label(name), " ", shown(v)]))] : null,
      of.where ? [h("dt", {}, word("doctor.where")), h("dd", {}, h("code", { lang: "en" }, of.where))] : null,
      of.change ? [h("dt", {}, word("doctor.change")), said(`${key}.mend`, {}, of.change, "dd")] : null),
    told ? h("details", {}, h("summary", {}, word("doctor.original")),
      h("p", { lang: "en" }, `${of.message}. ${of.change}`)) : null);
}

/** What a number is called; some names have a part of their own. */
function label(name) {
  if (language() === "en") return name;
  const open = OPEN.find(([start, end]) => name.startsWith(start) && name.endsWith(end));
  const part = open && name.slice(open[0].length, name.length - open[1].length);
  return word(`measured.${name}`, {}, null)
    ?? (open ? word(`measured.${open[0]}*${open[1]}`, { 0: part }) : h("span", { lang: "en" }, name));
}

function shown(v) {
  if (typeof v === "number") return value(v);
  return typeof v === "object" ? JSON.stringify(v) : String(v);
}

async function examine() {
  const run = chosen.run;
  const here = () => chosen.run === run;
  let trouble = null;
  let found = null;
  asking = run;
  draw();
  busy(at("doctor-job"), null);
  try {
    found = await work("doctor", { run }, (job) => {
      if (here()) busy(at("doctor-job"), job);
    });
    if (found) kept.set(run, found.findings);
  } catch (error) {
    trouble = error;
  }
  asking = null;
  draw();
  if (!here()) return;
  if (trouble) sorry(at("doctor-job"), trouble);
  else if (!found) cancelled(at("doctor-job"), at("examine"));
}
