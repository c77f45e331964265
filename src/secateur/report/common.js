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
  const form = new Intl.NumberFormat("en-US");  // made once: making one costs more than a hundred uses
  const whole = (value) => form.format(value);
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

  // Ticks of a logarithmic axis, written out: 1, 2 and 5 times powers of ten, powers alone over many decades,
  // and equal steps where the axis spans less than one.
  const logTicks = (low, high) => {
    const values = [];
    if (high < 8 * low) {
      const rough = (high - low || high) / 4;
      const power = 10 ** Math.floor(Math.log10(rough));
      const step = power * [1, 2, 5, 10].find((times) => times * power >= rough);
      for (let at = Math.floor(low / step); at <= Math.ceil(high / step); at++) if (at > 0) values.push(at * step);
    } else {
      const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
      for (let power = first; power <= last; power++)
        for (const step of last - first > 3 ? [1] : [1, 2, 5]) values.push(step * 10 ** power);
    }
    const written = (value) => value.toLocaleString("en-US", { maximumSignificantDigits: 4 });
    return { tickvals: values, ticktext: values.map(written) };
  };

  // The control that chooses a layer; the page's address keeps the choice under `key`.
  const chooser = (figure, names, key, changed) => {
    const select = figure.querySelector("select[data-layers]");
    const at = () => Number(select.value);
    const choose = (layer) => {
      select.value = String((layer + names.length) % names.length);
      keep(key, names[at()]);
      changed();
    };
    const restore = () => {
      const layer = names.indexOf(state().get(key));
      if (layer >= 0) select.value = String(layer);
    };
    select.addEventListener("change", () => choose(at()));
    for (const button of figure.querySelectorAll("[data-step]"))
      button.addEventListener("click", () => choose(at() + Number(button.dataset.step)));
    window.addEventListener("hashchange", () => { restore(); changed(); });
    restore();
    return { at, choose };
  };

  return {
    kinds: {}, axis, chooser, clipped, color, dash, digits, element, faded, keep, literal, logTicks, percent, plot, series, state, symbol,
    title, whole,
  };
})();
