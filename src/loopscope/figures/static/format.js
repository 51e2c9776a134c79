/** Numbers as people read them. */

import { language } from "./words.js";

/** The server writes numbers that are not finite as text. */
export function number(value) {
  if (typeof value === "number") return value;
  return { nan: NaN, inf: Infinity, "-inf": -Infinity }[value] ?? null;
}

/** Whether a number is there and finite. */
export const finite = (value) => Number.isFinite(number(value));

/** A measured value, in four digits. */
export function value(given, digits = 4) {
  const x = number(given);
  if (x === null) return "–";
  if (Number.isNaN(x)) return "nan";
  if (!Number.isFinite(x)) return x > 0 ? "inf" : "-inf";
  const size = Math.abs(x);
  if (x !== 0 && (size < 1e-3 || size >= 1e6)) return x.toExponential(digits - 2);
  return String(Number(x.toPrecision(Math.max(digits, String(Math.trunc(size)).length))));
}

/** A number in so many digits, as Python's `format(x, ".4g")` writes it. */
export function general(given, digits) {
  const x = number(given);
  if (x === null) return "–";
  if (Number.isNaN(x)) return "nan";
  if (!Number.isFinite(x)) return x > 0 ? "inf" : "-inf";
  const [mantissa, exponent] = x.toExponential(digits - 1).split("e");
  const size = Number(exponent);
  if (size >= -4 && size < digits) return String(Number(x.toPrecision(digits)));
  const two = String(Math.abs(size)).padStart(2, "0");
  return `${Number(mantissa)}e${size < 0 ? "-" : "+"}${two}`;
}

/** A share in whole percent, as Python's `format(x, ".0%")` writes it: a half to the even one. */
export function percentage(share) {
  const x = 100 * share;
  const near = Math.round(x);
  return `${near - x === 0.5 && near % 2 ? near - 1 : near}%`;
}

/** A count, with separators. */
export function count(given) {
  const x = number(given);
  return x === null ? "–" : new Intl.NumberFormat(language()).format(x);
}

/** A part of a whole. */
export function percent(part) {
  if (!finite(part)) return "–";
  return `${(100 * part).toFixed(part > 0 && part < 0.1 ? 1 : 0)} %`;
}

/** A duration of seconds. */
export function duration(given) {
  const s = number(given);
  if (s === null || !Number.isFinite(s)) return "–";
  if (s < 1e-3) return `${(1e6 * s).toPrecision(3)} µs`;
  if (s < 1) return `${(1e3 * s).toPrecision(3)} ms`;
  if (s < 60) return `${s.toFixed(s < 10 ? 2 : 1)} s`;
  const m = Math.floor(s / 60);
  const two = (n) => String(Math.floor(n)).padStart(2, "0");
  return m < 60 ? `${m}:${two(s % 60)}` : `${Math.floor(m / 60)}:${two(m % 60)}:${two(s % 60)}`;
}

/** Bytes. */
export function size(given) {
  let x = number(given);
  if (x === null) return "–";
  for (const unit of ["B", "kB", "MB"]) {
    if (x < 1000) return `${Number(x.toPrecision(3))} ${unit}`;
    x /= 1000;
  }
  return `${Number(x.toPrecision(3))} GB`;
}

/** A moment: seconds since 1970, or text of ISO 8601. */
export function moment(given) {
  const date = new Date(typeof given === "number" ? 1000 * given : given);
  if (Number.isNaN(date.getTime())) return "–";
  return new Intl.DateTimeFormat(language(), {
    month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", second: "2-digit",
    hour12: false,
  }).format(date);
}
