// Histograms of one layer's weights, its stages laid over each other, and thumbnails of all layers.
{
  const { axis, chooser, color, dash, digits, edge, element, faded, keep, literal, percent, plot, series, state, symbol, title, unpack, whole } = charts;

  // Width of the stored bins at a magnitude.
  const widthAt = (held, magnitude) =>
    2 ** Math.max(held.exponent, magnitude > 0 ? Math.floor(Math.log2(magnitude)) : -1074) / held.bins;

  // Up to which magnitude to draw: all, or where no stage has more than a thousandth of its weights beyond.
  const reach = (stages, all) => {
    let near = 0, far = 0;
    for (const held of stages) {
      const length = Math.max(held.minus.length, held.plus.length);
      const allowed = (held.n - held.zeros) / 1000;
      let index = length, beyond = 0;
      while (index > 0) {
        beyond += (held.minus[index - 1] || 0) + (held.plus[index - 1] || 0);
        if (beyond > allowed) break;
        index--;
      }
      near = Math.max(near, edge(held, index));
      far = Math.max(far, edge(held, length));
    }
    return all || far <= 1.6 * near ? far : near;
  };

  // Bins of equal power-of-two width, at most `most` of them and never finer than the stored ones: then every
  // stored bin lies inside one of them and the counts are exact.
  const equal = (stages, most, all) => {
    let limit = reach(stages, all);
    if (limit === 0) limit = 1;
    let width = 2 ** Math.ceil(Math.log2((2 * limit) / most));
    for (const held of stages) width = Math.max(width, widthAt(held, limit * (1 - 1e-12)));
    const half = Math.ceil(limit / width);
    const counts = stages.map((held) => {
      const bins = new Array(2 * half).fill(0);
      let beyond = 0;
      [held.minus, held.plus].forEach((side, sign) => side.forEach((count, index) => {
        if (!count) return;
        const at = Math.floor(edge(held, index) / width);
        if (at >= half) beyond += count; else bins[sign ? half + at : half - 1 - at] += count;
      }));
      return { bins, beyond };
    });
    return { width, half, counts };
  };

  charts.kinds.histogram = (figure, data, anchor) => {
    const room = figure.querySelector(".chart");
    const boxes = [...figure.querySelectorAll("[data-stage]")];
    const options = Object.fromEntries(
      [...figure.querySelectorAll("[data-option]")].map((box) => [box.dataset.option, box]));
    const loaded = new Map();
    const load = (stage, layer) => {
      const held = data.histograms[stage][layer];
      if (held === null) return null;
      const key = `${stage} ${layer}`;
      if (!loaded.has(key)) loaded.set(key, { ...held, minus: unpack(held.negative), plus: unpack(held.positive) });
      return loaded.get(key);
    };
    const thumbnails = document.getElementById(`${anchor}-thumbnails`);

    const table = (heads, rows) => {
      const made = document.createElement("table");
      const head = made.createTHead().insertRow();
      heads.forEach((text, at) => head.append(element("th", text, { scope: "col", ...(at ? { class: "number" } : {}) })));
      const body = made.createTBody();
      for (const [first, ...rest] of rows) {
        const row = body.insertRow();
        const name = element("th", typeof first === "string" ? first : null, { scope: "row" });
        if (typeof first !== "string") name.append(...first);
        row.append(name);
        for (const [text, value] of rest) row.append(element("td", text, { class: "number", "data-value": value }));
      }
      const box = element("div", null, { class: "scroll", tabindex: 0, role: "region" });
      box.append(made);
      return box;
    };

    const readout = (shown) => {
      const rows = shown.map(({ stage, held }) => {
        const share = held.n ? held.zeros / held.n : 0;
        const mark = boxes[stage].parentElement.querySelector(".swatch").cloneNode(true);
        return [[mark, element("bdi", data.stages[stage])], [whole(held.n), held.n], [whole(held.zeros), held.zeros],
          [percent(share), share], [digits(held.std), held.std],
          [`${digits(held.min)} to ${digits(held.max)}`, held.max]];
      });
      const made = table(["Stage", "Weights", "Exact zeros", "Share", "Std", "Range"], rows);
      made.setAttribute("aria-label", "Stages of this layer, table");
      document.getElementById(`${anchor}-readout`).replaceChildren(made);
    };

    const tabulate = (shown, layout) => {
      const rows = [["exactly 0", ...shown.map(({ held }) => [whole(held.zeros), held.zeros])]];
      for (let at = 0; at < 2 * layout.half; at++) {
        const low = (at - layout.half) * layout.width;
        rows.push([`${digits(low)} to ${digits(low + layout.width)}`,
          ...layout.counts.map(({ bins }) => [whole(bins[at]), bins[at]])]);
      }
      if (layout.counts.some(({ beyond }) => beyond))
        rows.push(["beyond, on either side", ...layout.counts.map(({ beyond }) => [whole(beyond), beyond])]);
      const made = table(["Weights from", ...shown.map(({ stage }) => data.stages[stage])], rows);
      made.setAttribute("aria-label", "Counts of each bin, table");
      made.dataset.width = layout.width;
      made.dataset.half = layout.half;
      document.getElementById(`${anchor}-bins`).replaceChildren(made);
    };

    const draw = () => {
      const layer = chosen.at();
      const narrow = room.clientWidth < 560;
      const log = options.log.checked;
      const held = data.stages.map((_, stage) => ({ stage, held: load(stage, layer) })).filter(({ held }) => held);
      const shown = held.filter(({ stage }) => boxes[stage].checked);
      const most = Math.max(...held.map((one) => one.held.n));
      const fine = Math.min(narrow ? 96 : 128, Math.max(24, 4 * Math.cbrt(most)));
      const layout = equal(held.map((one) => one.held), fine, options.whole.checked);
      const limit = layout.half * layout.width;
      const traces = [], annotations = [];
      let spikes = 0;
      held.forEach(({ stage, held: one }, place) => {
        if (!boxes[stage].checked) return;
        const { bins } = layout.counts[place];
        const middle = bins.map((_, at) => (at - layout.half + 0.5) * layout.width);
        const height = (count) => (log ? Math.max(count, 0.5) : count);
        const hover = bins.map((count) => `${literal(data.stages[stage])}: ${whole(count)}`);
        traces.push({
          type: "scatter", mode: "lines", x: [-limit, ...middle, limit],
          y: [bins[0], ...bins, bins[bins.length - 1]].map(height),
          line: { shape: "hvh", color: series(stage), width: stage ? 2 : 1, dash: dash(stage) },
          fill: "tozeroy", fillcolor: faded(series(stage), stage ? 0.08 : 0.26),
          hovertext: [hover[0], ...hover, hover[hover.length - 1]], hovertemplate: "%{hovertext}<extra></extra>",
        });
      });
      shown.forEach(({ stage, held: one }, place) => {
        if (!one.zeros) return;
        spikes++;
        const x = (place - (shown.length - 1) / 2) * limit * (narrow ? 0.036 : 0.02);
        const share = one.zeros / one.n;
        traces.push({
          type: "scatter", mode: "lines+markers", x: [x, x], y: [0, share], yaxis: "y2", cliponaxis: false,
          line: { color: series(stage), width: 2.5 }, hoverinfo: "skip",
          marker: { color: series(stage), opacity: 1, size: [0, 11], symbol: symbol(stage), line: { width: 1.5, color: color("paper") } },
        });
        const left = place % 2 === 0 && shown.length > 2;
        annotations.push({
          x, y: share, yref: "y2", text: `${percent(share)} zero`, showarrow: false, xanchor: left ? "right" : "left",
          xshift: left ? -16 : 16, bgcolor: faded(color("paper"), 0.8), borderpad: 2, font: { size: 12 },
        });
      });
      plot(room, traces, {
        height: narrow ? 300 : 400, hovermode: "x unified", annotations,
        margin: { l: 40, r: spikes && !narrow ? 40 : 12, t: 16, b: 40 },
        xaxis: axis({ title: title("weight"), range: [-limit, limit], nticks: narrow ? 5 : 11, showgrid: false, zeroline: false,
          ticks: "outside", hoverformat: ".3~g" }),
        yaxis: axis({ title: title("weights per bin"), type: log ? "log" : "linear", nticks: 6, zeroline: false,
          ...(log ? { range: [Math.log10(0.5), null], dtick: 1, exponentformat: "none" } : { rangemode: "tozero" }) }),
        yaxis2: { ...axis({ range: [0, 1.04], tickvals: [0, 0.25, 0.5, 0.75, 1], tickformat: ".0%", showgrid: false, zeroline: false,
          title: narrow ? undefined : title("exactly zero") }), overlaying: "y", side: "right", visible: spikes > 0 && !narrow },
      });
      readout(held);
      tabulate(shown, { ...layout, counts: layout.counts.filter((_, place) => boxes[held[place].stage].checked) });
      for (const button of thumbnails.children) {
        const chosen = Number(button.dataset.layer) === layer;
        button.toggleAttribute("data-chosen", chosen);
      }
    };

    const overview = () => {
      const space = "http://www.w3.org/2000/svg";
      thumbnails.replaceChildren(...data.names.map((name, layer) => {
        const held = data.stages.map((_, stage) => [stage, load(stage, layer)]).filter((one) => one[1]);
        const { half, counts } = equal(held.map((one) => one[1]), 48, false);
        const top = Math.max(1, ...counts.flatMap(({ bins }) => bins));
        const picture = document.createElementNS(space, "svg");
        picture.setAttribute("viewBox", `0 0 ${2 * half} 40`);
        picture.setAttribute("preserveAspectRatio", "none");
        held.forEach(([stage], place) => {
          const path = document.createElementNS(space, "path");
          path.setAttribute("class", `s${stage % 6}`);
          path.setAttribute("d", `M0 40${counts[place].bins.map((count, at) =>
            `V${(40 - (39 * count) / top).toFixed(1)}H${at + 1}`).join("")}V40z`);
          picture.append(path);
        });
        const button = element("button", null, { type: "button", tabindex: -1, "data-layer": layer, title: name });
        const label = element("span", null);
        label.append(element("bdi", data.short[layer]));
        button.append(picture, label);
        button.addEventListener("click", () => chosen.choose(layer));
        return button;
      }));
    };

    const restore = () => {
      const held = state();
      for (const key in options) if (held.has(`${anchor}.${key}`)) options[key].checked = held.get(`${anchor}.${key}`) === "1";
    };
    for (const box of boxes) box.addEventListener("change", draw);
    for (const key in options)
      options[key].addEventListener("change", () => { keep(`${anchor}.${key}`, options[key].checked ? "1" : null); draw(); });
    window.addEventListener("hashchange", () => { restore(); draw(); });
    restore();
    const chosen = chooser(figure, data.names, anchor, () => draw());
    overview();
    return draw;
  };
}
