/** What the curves are drawn from: fetched for the range that is seen, kept, smoothed. */

import { ask } from "./api.js";
import { number } from "./format.js";

export const POINTS = 2000;

const kept = new Map();
const MOST = 200;

/** Ask once; what may still change is not kept. */
async function once(path, parameters, changes) {
  const key = `${path}?${JSON.stringify(parameters)}`;
  if (!changes && kept.has(key)) return kept.get(key);
  const found = await ask(path, parameters);
  if (!changes) {
    if (kept.size >= MOST) kept.delete(kept.keys().next().value);
    kept.set(key, found);
  }
  return found;
}

/** An output of steps, in buckets. */
export async function curve(run, name, range, changes, points = POINTS) {
  const found = await once("curve", { run, name, ...range, points }, changes);
  for (const part of ["low", "high", "mean"]) found[part] = found[part].map(number);
  return found;
}

/** What epochs gave. */
export async function epochs(run, changes) {
  return (await once("epochs", { run }, changes)).epochs;
}

/** What a watched training has measured. */
export const signals = (run, range, changes, points = POINTS) =>
  once("signals", { run, ...range, points }, changes);

/**
 * A moving average that forgets, without a pull towards its beginning.
 * @param {number[]} values - What is not finite is passed over.
 * @param {number} weight - 0 to 1: how much of the past stays.
 */
export function smooth(values, weight) {
  if (!(weight > 0)) return values;
  let sum = 0, mass = 0;
  return values.map((value) => {
    if (!Number.isFinite(value)) return value;
    sum = weight * sum + (1 - weight) * value;
    mass = weight * mass + (1 - weight);
    return sum / mass;
  });
}

/**
 * The step with the highest value of a bucket: what a click on a spike means.
 * One that is not finite stands out more than any other.
 */
export async function highest(run, name, start, stop) {
  for (;;) {
    const found = await curve(run, name, { start, stop }, true);
    if (!found.step.length) return start;
    let best = found.high.findIndex((high) => !Number.isFinite(high));
    if (best < 0) best = found.high.indexOf(Math.max(...found.high));
    const next = found.step[best + 1] ?? stop;
    if (next - found.step[best] <= 1) return found.step[best];
    [start, stop] = [found.step[best], next];
  }
}
