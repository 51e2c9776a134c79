/** The page: every panel begins, then the server is asked, again and again. */

import { ask } from "./api.js";
import * as controls from "./controls.js";
import * as curves from "./curves.js";
import * as doctor from "./doctor.js";
import { at, fill } from "./dom.js";
import * as events from "./events.js";
import * as gears from "./gears.js";
import * as header from "./header.js";
import { sorry } from "./jobs.js";
import * as loop from "./loop.js";
import * as runs from "./runs.js";
import * as settings from "./settings.js";
import * as step from "./step.js";
import { beside, chosen, focus, known, live, on, open, remembered, tellAll } from "./store.js";

const LIVE_MS = 1000;
const STILL_MS = 5000;
const RUNS_MS = 5000;

let timer = 0;

function begin() {
  settings.begin();
  for (const panel of [header, runs, controls, loop, curves, step, gears, doctor, events]) {
    panel.begin();
  }
  on("run", learn);
  on("hurry", () => { clearTimeout(timer); timer = setTimeout(stand, 150); });
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden && known.run) tellAll("hurry");
  });
  // An address that was put into an open page: its run, its step, and its token.
  addEventListener("hashchange", () => location.reload());
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault(); // The address is not what it points to.
    at("loop").focus();
  });
  list(remembered());
  setInterval(() => { if (!document.hidden) list(); }, RUNS_MS);
}

/** The runs there are. */
async function list(wanted = null) {
  try {
    known.runs = (await ask("runs")).runs;
    fill(at("trouble"));
  } catch (error) {
    return sorry(at("trouble"), error);
  }
  const there = (id) => known.runs.some((run) => run.id === id);
  tellAll("runs");
  if (wanted) {
    for (const id of wanted.beside.filter(there)) beside(id, true);
  }
  if (chosen.run === null && known.runs.length) {
    const here = wanted !== null && there(wanted.run);
    focus(here ? wanted.run : known.runs[0].id);
    if (here && wanted.step !== null) open(wanted.step);
  }
}

/** What is to be known of the run in focus. */
async function learn() {
  if (known.run !== null || chosen.run === null) return;
  const run = chosen.run;
  clearTimeout(timer);
  try {
    const found = await ask("run", { run });
    if (run !== chosen.run) return;
    known.run = found;
    fill(at("trouble"));
    tellAll("run");
    stand();
  } catch (error) {
    if (run === chosen.run) sorry(at("trouble"), error);
  }
}

/** Where it stands, again and again. */
async function stand() {
  clearTimeout(timer);
  const run = chosen.run;
  try {
    if (!document.hidden) {
      const was = known.status;
      const after = known.events.at(-1)?.id ?? 0;
      const found = await ask("status", { run, after });
      if (run !== chosen.run) return;
      known.status = found;
      const fresh = found.events.filter((event) => event.id > after);
      known.events = [...known.events, ...fresh];
      if (fresh.length) tellAll("events");
      tellAll("status");
      // A run that has just ended, or an epoch of it, has a word that was not there before.
      const turned = was !== null && (was.status !== found.status || was.epoch !== found.epoch);
      if (turned) await refresh(run);
      fill(at("trouble"));
    }
  } catch (error) {
    if (run === chosen.run) sorry(at("trouble"), error);
  }
  if (run === chosen.run) {
    clearTimeout(timer);
    timer = setTimeout(stand, live() ? LIVE_MS : STILL_MS);
  }
}

async function refresh(run) {
  const found = await ask("run", { run });
  if (run !== chosen.run) return;
  known.run = found;
  tellAll("anew");
}

begin();
