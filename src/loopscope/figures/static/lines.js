/** From runs to the lines of a chart. */

import { ask } from "./api.js";
import { clock } from "./clock.js";
import { hollowOf, line as colourOf, lineOf, shapeOf, style } from "./colours.js";
import { number } from "./format.js";
import { groupsOf } from "./groups.js";
import { title } from "./runs.js";
import { curve, epochs, signals } from "./series.js";
import { chosen, known, live } from "./store.js";
import { word } from "./words.js";

const about = new Map();

/** What is known of a run, and where its steps lie on the axis; if that was learnt. */
export const placed = (id) => about.get(id);

/** Learn what has to be known of a run before anything of it can be drawn. */
export async function learn(id, axis) {
  const here = id === chosen.run;
  const summary = known.runs.find((run) => run.id === id);
  const changes = here ? live() || known.status === null : summary?.status === "running";
  const run = here ? known.run : (about.get(id)?.run ?? await ask("run", { run: id }));
  const first = run.names.outputs[0];
  const [ended, whole] = await Promise.all([
    epochs(id, changes),
    axis === "time" && first
      ? curve(id, first, { start: null, stop: null }, changes) : { step: [], time: [] },
  ]);
  const each = here ? known.status?.steps_per_epoch : 0;
  const found = { id, run, changes, epochs: ended, clock: clock(axis, ended, whole, each) };
  about.set(id, found);
  return found;
}

/**
 * The lines of one chart.
 * @param {string} name - Of a group.
 * @param {Array} found - Of `learn`, one for each run.
 * @param {Array} seen - From where to where on the axis; `null` for all.
 */
export async function linesOf(name, found, seen) {
  const several = found.length > 1;
  const lines = await Promise.all(found.map(async (of) => {
    const group = groupsOf(of.run.names).find((one) => one.name === name);
    if (!group) return [];
    const range = rangeOf(of, seen);
    const run = title({ ...of.run.summary, id: of.id });
    const say = (text) => (several ? `${run}: ${text}` : text);
    const outputs = await Promise.all(
      group.outputs.map((output) => outputLine(of, output, range, say)));
    // The mean of an epoch beside every step of it says nothing new.
    const ended = group.epochs.filter((e) => isValidation(e) || !group.outputs.length);
    return [
      ...outputs,
      ...ended.map((epoch) => epochLine(of, epoch, several, say)),
      ...(group.signals.length ? await signalLines(of, group, range, say) : []),
      ...(name === "loss" && of.id === chosen.run ? incidents(of, outputs[0]) : []),
    ];
  }));
  return lines.flat().filter((one) => one.x.length);
}

const isValidation = (name) => name.startsWith("val_");

function rangeOf(of, seen) {
  if (!seen) return { start: null, stop: null };
  const [low, high] = seen.map(of.clock.step);
  const start = Math.max(0, Math.floor(low));
  return { start, stop: Math.max(start + 1, Math.ceil(high) + 1) };
}

async function outputLine(of, name, range, say) {
  const got = await curve(of.id, name, range, of.changes);
  const size = got.step.length > 1 ? got.step[1] - got.step[0] : 1;
  return { run: of.id, name, kind: "output", label: say(word("line.steps")),
    colour: lineOf(of.id), dash: "solid", x: got.step.map(of.clock.x), y: got.mean,
    low: got.low, high: got.high, step: got.step, size, stop: got.stop };
}

function epochLine(of, name, several, say) {
  const rows = of.epochs.filter((row) => Number.isFinite(row.logs?.[name]) && row.steps > 0);
  const last = rows.map((row) => row.first_step + row.steps - 1);
  const validation = isValidation(name);
  return { run: of.id, name, kind: "epoch", size: 1, step: last,
    label: say(word(validation ? "line.validation" : "line.epochs")),
    colour: validation && !several ? colourOf(1) : lineOf(of.id),
    dash: validation ? "dash" : "solid",
    sign: !validation ? shapeOf(of.id) : several ? hollowOf(of.id) : "■",
    x: last.map(of.clock.x), y: rows.map((row) => row.logs[name]) };
}

async function signalLines(of, group, range, say) {
  const got = await signals(of.id, range, of.changes);
  return group.signals.filter((name) => got.values[name]).map((name, i) => ({
    run: of.id, name, kind: "signal", colour: colourOf(i), dash: i >= 6 ? "dash" : "solid",
    label: say(name.split("/").slice(1).join("/") || name), x: got.step.map(of.clock.x),
    y: got.values[name].map((v) => number(v) ?? NaN), step: got.step, size: 1,
  }));
}

/** Where a watched training came upon something: marked on the loss. */
function incidents(of, loss) {
  const found = known.events.filter((event) => event.kind === "incident");
  const step = found.map((event) => event.data.at ?? event.step);
  const y = step.map((at) => {
    const i = Math.max(0, loss?.step.findLastIndex((first) => first <= at) ?? 0);
    return Number.isFinite(loss?.high[i]) ? loss.high[i] : (loss?.y.findLast(Number.isFinite) ?? 0);
  });
  return [{ run: of.id, name: "incident", kind: "incident", label: word("line.incidents"),
    colour: style("--bad"), sign: "▼", dash: "none", x: step.map(of.clock.x), y, step, size: 1 }];
}
