"use strict";
// What all charts of a report share. Each kind of chart is a function in a file of its own, entered in
// `charts.kinds`; given a figure, its data and its anchor, it returns a function that draws it anew.
// Names are data: they reach the page as text nodes, or through `literal` where plotly would read markup.
const charts = (() => {
  const root = document.documentElement;
  const color = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
  const series = (at) => color(`series-${at % 6}`);
  const dash = (at) => ["solid", "7px,4px", "2px,3px", "8px,3px,2px,3px", "14px,5px"][Math.max(0, at - 1) % 5];
  const symbol = (at) => ["circle", "square", "diamond", "triangle-up", "cross"][Math.max(0, at - 1) % 5];
  const literal = (text) =>
    String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const faded = (hex, part) => hex + Math.round(part * 255).toString(16).padStart(2, "0");
  const whole = (value) => value.toLocaleString("en-US");
  const digits = (value) =>
    value === 0 ? "0" : String(Number(value.toPrecision(4))).replace("-", "\u2212");
  const percent = (part) =>
    part === 0 || part === 1 ? `${100 * part} %`
      : part < 0.0005 ? "< 0.1 %" : part >= 0.9995 ? "> 99.9 %" : `${(100 * part).toFixed(1)} %`;

  const element = (name, text, attributes = {}) => {
    const made = document.createElement(name);
    if (text !== null) made.textContent = text;
    for (const key in attributes) made.setAttribute(key, attributes[key]);
    return made;
  };

  // The state of the page is in its address, as #anchor=value&anchor.option=value.
  const state = () => new URLSearchParams(location.hash.includes("=") ? location.hash.slice(1) : "");
  const keep = (key, value) => {
    const held = state();
    if (value === null) held.delete(key); else held.set(key, value);
    history.replaceState(null, "", `#${held}`);
  };

  const axis = (more) => ({
    fixedrange: true, gridcolor: color("grid"), zerolinecolor: color("grid"), linecolor: color("line"),
    tickcolor: color("line"), tickfont: { color: color("soft") }, automargin: true, ...more,
  });
  const title = (text) => ({ text: literal(text), standoff: 10, font: { color: color("soft"), size: 13 } });
  const plot = (room, traces, layout) =>
    Plotly.react(room, traces, {
      autosize: true, margin: { l: 48, r: 16, t: 12, b: 40 }, showlegend: false, dragmode: false,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: color("ink") },
      hoverlabel: { bgcolor: color("raised"), bordercolor: color("line"), font: { color: color("ink") } },
      ...layout,
    }, { displayModeBar: false, responsive: false, scrollZoom: false, doubleClick: false });

  const clipped = (text, most) =>
    text.length <= most ? text : `…${text.slice(text.length - most + 1)}`;

  return {
    kinds: {}, axis, clipped, color, dash, digits, element, faded, keep, literal, percent, plot, series, state, symbol,
    title, whole,
  };
})();
