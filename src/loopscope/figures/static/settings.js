/** Language and theme: switches at the top of the page, remembered by the browser. */

import { at, fill, h } from "./dom.js";
import { tellAll } from "./store.js";
import { language, setLanguage, speaks, translate, word } from "./words.js";

const THEMES = ["auto", "light", "dark"];
const SIGNS = { auto: "◐", light: "☀", dark: "☾" };

let theme = kept("theme", THEMES) ?? "auto";

function kept(name, choices) {
  try {
    const found = localStorage.getItem(`loopscope.${name}`);
    return choices.includes(found) ? found : null;
  } catch {
    return null; // A browser that keeps nothing.
  }
}

function keep(name, value) {
  try {
    localStorage.setItem(`loopscope.${name}`, value);
  } catch {
    // It is as it is until the page is left.
  }
}

/** Take over what was chosen before, and draw the switches. */
export function begin() {
  const chosen = kept("language", ["en", "ko"]);
  setLanguage(chosen ?? speaks());
  paint();
  draw();
  translate(document);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", () => {
    paint();
    tellAll("look");
  });
}

function paint() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const shown = theme === "auto" ? (dark ? "dark" : "light") : theme;
  document.documentElement.dataset.theme = shown;
}

function draw(focused = null) {
  const other = language() === "ko" ? "en" : "ko";
  const next = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  fill(at("settings"),
    h("button.plain", {
      id: "theme", type: "button", title: word(`theme.${theme}`),
      "aria-label": word("theme.switch", { now: word(`theme.${theme}`) }),
      onclick: () => change("theme", () => { theme = next; keep("theme", next); }),
    }, SIGNS[theme]),
    h("button.plain", {
      id: "language", type: "button", lang: other,
      "aria-label": other === "ko" ? "한국어로 보기" : "Show in English",
      onclick: () => change("language", () => { setLanguage(other); keep("language", other); }),
    }, other === "ko" ? "한국어" : "English"));
  if (focused) at(focused).focus();
}

function change(which, make) {
  make();
  paint();
  draw(which);
  translate(document);
  tellAll("look");
}
