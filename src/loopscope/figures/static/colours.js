/** Colours and signs of runs and lines: never a colour alone. */

import { chosen } from "./store.js";

const NAMES = ["--line-1", "--line-2", "--line-3", "--line-4", "--line-5", "--line-6"];
const SIGNS = ["●", "■", "▲", "◆", "▼", "✚"];
const OPEN = ["○", "□", "△", "◇", "▽", "✛"];

/** A colour of the page's style. */
export function style(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** Runs that are drawn: the one in focus first. */
export const drawn = () => [chosen.run, ...chosen.beside].filter((run) => run !== null);

const place = (run) => Math.max(0, drawn().indexOf(run));

/** The colour of a run: as CSS. */
export const colour = (run) => `var(${NAMES[place(run) % NAMES.length]})`;

/** The sign that stands for a run beside its colour. */
export const shapeOf = (run) => SIGNS[place(run) % SIGNS.length];

/** The same sign, hollow: for its validation. */
export const hollowOf = (run) => OPEN[place(run) % OPEN.length];

/** The colour of the n-th line, as a value. */
export const line = (n) => style(NAMES[n % NAMES.length]);

/** The colour of a run, as a value. */
export const lineOf = (run) => line(place(run));
