/** Steering a live run: what is asked for is done by the training itself, between steps. */

import { tell } from "./api.js";
import { at, fill, h, say } from "./dom.js";
import { sorry } from "./jobs.js";
import { chosen, known, live, on, tellAll } from "./store.js";
import { word } from "./words.js";

const SIGNS = { pause: "❚❚", step: "❚▶", resume: "▶", save: "⤓", stop: "◼" };

/** What was asked for and is not seen to be done yet. */
let asked = null;

/** Begin. */
export function begin() {
  draw();
  on("look", draw);
  on("run", () => { asked = null; update(); });
  on("status", update);
}

function draw() {
  fill(at("controls"),
    h("div.buttons", { role: "group", "aria-label": word("controls") },
      Object.entries(SIGNS).map(([action, sign]) =>
        h("button", {
          type: "button", id: `do-${action}`, "aria-describedby": "why-not",
          onclick: () => send(action),
        }, h("span", { "aria-hidden": "true" }, sign), " ", word(`do.${action}`)))),
    h("p.quiet", { id: "why-not" }),
    h("div", { id: "controls-trouble" }));
  update();
}

function update() {
  const now = known.status?.live;
  if (asked && settled(asked, now)) asked = null;
  for (const action of Object.keys(SIGNS)) {
    const off = whyNot(action) !== "";
    const button = at(`do-${action}`);
    button.setAttribute("aria-disabled", String(off));
    button.title = whyNot(action) || word(`do.${action}.what`);
  }
  say(at("why-not"), line(now));
}

/** Why an action can't be had now; empty where it can. */
function whyNot(action) {
  if (!known.run) return word("nothing.chosen");
  if (!live()) {
    const status = known.status?.status ?? known.run.summary.status;
    return word("nothing.trains", { status: word(`status.${status}`) });
  }
  const now = known.status.live;
  if (!now) return word("not.listening");
  if (action === "pause" && now.paused) return word("paused.already");
  if (action === "resume" && !now.paused) return word("not.paused");
  return "";
}

function line(now) {
  if (whyNot("save")) return whyNot("save");
  if (asked) return word("asked", { what: word(`do.${asked.action}`) });
  if (now?.paused) return word("paused.at", { step: known.status.step });
  const doing = now?.role ?? now?.phase;
  const phase = doing && word(`phase.${doing}`, {}, "");
  return phase ? word("runs.now", { phase }) : "";
}

/** Whether the training has said something since it was asked. */
function settled(was, now) {
  if (!live() || !now) return true;
  if (was.action === "pause") return now.paused;
  if (was.action === "resume") return !now.paused;
  if (was.action === "step") return now.paused && known.status.step > was.step;
  return known.events.some((event) =>
    event.kind === "control" && event.id > was.event);
}

async function send(action) {
  if (whyNot(action)) return;
  fill(at("controls-trouble"));
  const last = known.events.at(-1)?.id ?? 0;
  asked = { action, step: known.status.step, event: last };
  update();
  say(at("news"), at("why-not").textContent);
  try {
    await tell("control", { run: chosen.run, action });
    tellAll("hurry");
  } catch (error) {
    asked = null;
    update();
    sorry(at("controls-trouble"), error);
  }
}
