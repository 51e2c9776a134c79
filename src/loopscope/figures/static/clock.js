/** From steps to a place on the horizontal axis and back: by step, by epoch, by time. */

/**
 * The clock of one run.
 * @param {string} axis - `step`, `epoch` or `time`.
 * @param {Array} epochs - Of `/api/epochs`.
 * @param {object} whole - The curve of the whole run, for its times.
 */
export function clock(axis, epochs, whole, stepsPerEpoch) {
  if (axis === "step") return { x: (step) => step, step: (x) => x };
  const [steps, places] = axis === "epoch"
    ? byEpoch(epochs, stepsPerEpoch) : byTime(whole);
  return { x: (step) => along(steps, places, step), step: (x) => along(places, steps, x) };
}

function byEpoch(epochs, stepsPerEpoch) {
  const steps = [], places = [];
  for (const { epoch, first_step, steps: n } of epochs) {
    if (!(n > 0)) continue;
    if (steps.at(-1) !== first_step) {
      steps.push(first_step);
      places.push(epoch);
    }
    steps.push(first_step + n);
    places.push(epoch + 1);
  }
  // An epoch that is not over yet: as long as the others.
  const usual = stepsPerEpoch || (steps.length > 1 ? steps.at(-1) - steps.at(-2) : 0);
  if (!steps.length) return [[0, usual || 1], [0, 1]];
  if (usual) {
    steps.push(steps.at(-1) + usual);
    places.push(places.at(-1) + 1);
  }
  return [steps, places];
}

function byTime(whole) {
  const steps = [], places = [];
  const begin = whole.time[0] ?? 0;
  for (let i = 0; i < whole.step.length; i += 1) {
    const at = whole.time[i] - begin;
    // Many steps are written at one time; a place must have one step only.
    if (places.length && at <= places.at(-1)) continue;
    steps.push(whole.step[i]);
    places.push(at);
  }
  if (whole.step.length && steps.at(-1) !== whole.step.at(-1)) {
    steps.push(whole.step.at(-1));
    places.push((places.at(-1) ?? 0) + 1e-6);
  }
  return steps.length > 1 ? [steps, places] : [[0, 1], [0, 1]];
}

/** Piecewise linear; beyond the ends the slope goes on. */
function along(from, to, value) {
  let low = 0, high = from.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (from[middle] <= value) low = middle;
    else high = middle;
  }
  const share = (value - from[low]) / (from[high] - from[low] || 1);
  return to[low] + share * (to[high] - to[low]);
}
