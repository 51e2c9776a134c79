/**
 * What the reader has chosen and what is known of it, and who wants to hear of changes.
 *
 * Panels do not know each other: one tells, the others hear.
 *
 * | news | when |
 * |---|---|
 * | `runs` | the list of runs has come |
 * | `run` | another run is in focus; `known.run` is about it, or null until it has come |
 * | `anew` | an epoch of it or all of it is over, and `known.run` has come anew |
 * | `beside` | other runs are laid over it |
 * | `status` | how it stands has come |
 * | `events` | new events of it have come |
 * | `open` | a step is wanted; the detail is its number |
 * | `opened` | a step has been opened; the detail is `known.opened` |
 * | `hurry` | something was asked of the training: look at once |
 * | `look` | language or theme is another: everything is drawn anew |
 */

const news = new EventTarget();

/** What the reader has chosen. */
export const chosen = {
  run: null,
  beside: new Set(),
  step: null,
};

/** What has come from the server. */
export const known = {
  runs: [],
  run: null,
  status: null,
  events: [],
  opened: null,
};

/** Hear of something; a list of names for several. */
export function on(names, listener) {
  for (const name of [names].flat()) {
    news.addEventListener(name, (event) => listener(event.detail));
  }
}

/** Let everyone know. */
export function tellAll(name, detail = null) {
  news.dispatchEvent(new CustomEvent(name, { detail }));
}

/** Put another run into focus. */
export function focus(run) {
  if (chosen.run === run) return;
  Object.assign(chosen, { run, step: null });
  chosen.beside.delete(run);
  Object.assign(known, { run: null, status: null, events: [], opened: null });
  remember();
  tellAll("run");
}

/** Lay a run over the one in focus, or take it away. */
export function beside(run, wanted) {
  if (wanted) chosen.beside.add(run);
  else chosen.beside.delete(run);
  remember();
  tellAll("beside");
}

/** Ask for a step to be opened. */
export function open(step) {
  chosen.step = step;
  remember();
  tellAll("open", step);
}

/** How many steps the run in focus has, as far as is known. */
export function steps() {
  const summary = known.run?.summary;
  const first = known.run?.manifest?.first_step ?? 0;
  return Math.max(known.status?.step ?? 0, first + (summary?.steps ?? 0));
}

/** Whether something trains in the run in focus. */
export const live = () => known.status?.status === "running";

/** The address says what is looked at, so that it can be gone back to after a reload. */
function remember() {
  const address = new URLSearchParams();
  if (chosen.run !== null) address.set("run", chosen.run);
  if (chosen.step !== null) address.set("step", String(chosen.step));
  for (const run of chosen.beside) address.append("beside", run);
  history.replaceState(null, "", `#${address}`);
}

/** What the address says. */
export function remembered() {
  const address = new URLSearchParams(location.hash.slice(1));
  const step = address.get("step");
  return {
    run: address.get("run"),
    step: step !== null && /^\d+$/.test(step) ? Number(step) : null,
    beside: address.getAll("beside"),
  };
}
