/** The top of the page: which run, and where it stands, as on an instrument. */

import { at, fill, h, say } from "./dom.js";
import { count, duration, finite, value } from "./format.js";
import { known, live, on, steps } from "./store.js";
import { title } from "./runs.js";
import { word } from "./words.js";

const GAUGES = ["status", "gear", "step", "epoch", "speed", "left", "loss"];

let announced = "";

/** Begin. */
export function begin() {
  draw();
  on("look", draw);
  on(["run", "status", "anew", "runs"], update);
  update();
}

function draw() {
  fill(at("gauges"), GAUGES.map((name) =>
    h("div", { id: `gauge-${name}` }, h("dt", {}, word(`gauge.${name}`)), h("dd", {}, "–"))));
  update();
}

function update() {
  const { run, status } = known;
  say(at("name"), run ? title({ ...run.summary, id: run.id }) : "…");
  const about = run
    ? [run.summary.experiment, run.summary.backend].filter(Boolean).join(" · ") : "";
  say(at("about"), about);
  document.title = run ? `${at("name").textContent} – loopscope` : "loopscope";
  const said = reading(run, status);
  for (const name of GAUGES) say(at(`gauge-${name}`).querySelector("dd"), said[name]);
  const state = stateOf(status, run);
  at("gauge-status").dataset.state = state;
  const now = run ? `${at("name").textContent}: ${said.status}` : "";
  if (now && now !== announced) say(at("news"), (announced = now));
}

/** `paused` is not in a run's status: it is how a live one stands. */
function stateOf(status, run) {
  if (!run) return "";
  if (status?.status === "running" && status.live?.paused) return "paused";
  return status?.status ?? run.summary.status;
}

function reading(run, status) {
  const all = status?.steps_per_epoch && status?.epochs
    ? status.steps_per_epoch * status.epochs : null;
  const first = run?.manifest?.first_step ?? 0;
  const state = stateOf(status, run);
  const moving = live() && status?.live;
  const step = status?.step ?? (run ? steps() : null);
  return {
    status: state ? word(`status.${state}`) : "–",
    gear: status?.gear ?? run?.summary.gear ?? "–",
    step: step === null ? "–" : all ? `${count(step)} / ${count(first + all)}` : count(step),
    epoch: epochOf(status, run),
    speed: moving && finite(moving.steps_per_s) && !moving.paused
      ? word("per.second", { n: value(Number(moving.steps_per_s.toPrecision(3))) }) : "–",
    left: moving && finite(moving.eta_s) ? duration(moving.eta_s) : "–",
    loss: lossOf(moving, run),
  };
}

/** The latest; of a run that nobody trains, the last. */
function lossOf(moving, run) {
  const { name, value: latest } = (moving && moving.loss) || {};
  if (latest === undefined) {
    return value((known.runs.find((one) => one.id === run?.id) ?? run?.summary)?.loss);
  }
  return name === "loss" ? value(latest) : `${name} ${value(latest)}`;
}

function epochOf(status, run) {
  if (!status) return run ? count(run.summary.epochs) : "–";
  if (!live()) return count(run?.summary.epochs ?? status.epoch);
  const at = (status.epoch ?? 0) + 1;
  return status.epochs ? `${at} / ${status.epochs}` : String(at);
}
