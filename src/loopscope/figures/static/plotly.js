/** Charts by plotly.js, which is large: it is asked for when a chart is to be drawn. */

import { style } from "./colours.js";
import { Refused } from "./api.js";
import { word } from "./words.js";

const ADDRESS = "/static/plotly.min.js";

let coming = null;

/** plotly.js, loaded once. */
export function plotly() {
  coming ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = ADDRESS;
    script.onload = () => resolve(window.Plotly);
    script.onerror = () => {
      coming = null;
      reject(new Refused(word("no.plotly"), word("no.plotly.next")));
    };
    document.head.append(script);
  });
  return coming;
}

/** Without its own buttons and legend: names from a run must not come into its hands. */
export const CONFIG = {
  displayModeBar: false, displaylogo: false, responsive: true, scrollZoom: false,
  doubleClick: false, showTips: false,
};

/** How every chart looks, in the colours of the theme. */
export function layout(height) {
  const axis = () => ({
    gridcolor: style("--grid"), linecolor: style("--rule"), zerolinecolor: style("--grid"),
    tickfont: { color: style("--quiet"), size: 11 }, automargin: true, ticks: "",
    title: { font: { color: style("--quiet"), size: 11 }, standoff: 6 },
  });
  return {
    height, margin: { l: 46, r: 10, t: 8, b: 34 }, showlegend: false,
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: style("--sans"), color: style("--ink"), size: 11 },
    hovermode: "x", hoverdistance: -1, dragmode: "zoom",
    xaxis: axis(), yaxis: { ...axis(), fixedrange: true },
  };
}

/** A colour, seen through. */
export function faint(colour, share) {
  const [r, g, b] = [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
  return `rgba(${r},${g},${b},${share})`;
}
