/** Which curves belong into one chart: an output, its epochs and its validation. */

/**
 * @param {object} names - Of `/api/run`: `outputs`, `epochs`, `signals`.
 * @returns {Array} `{name, outputs, epochs, signals}`, the loss first.
 */
export function groupsOf(names) {
  const found = new Map();
  const of = (name) => {
    if (!found.has(name)) found.set(name, { name, outputs: [], epochs: [], signals: [] });
    return found.get(name);
  };
  for (const name of names?.outputs ?? []) of(name).outputs.push(name);
  for (const name of names?.epochs ?? []) of(name.replace(/^val_/, "")).epochs.push(name);
  for (const name of names?.signals ?? []) of(name.split("/")[0]).signals.push(name);
  return [...found.values()].sort((a, b) => rank(a) - rank(b));
}

const rank = (group) =>
  group.name === "loss" ? 0 : group.outputs.length ? 1 : group.signals.length ? 3 : 2;
