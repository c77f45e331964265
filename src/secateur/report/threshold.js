// What a threshold removes, live: the slider moves over the edges of the stored bins, where counts are exact.
{
  const { axis, before, chooser, color, counted, dash, digits, edge, element, faded, index, keep, literal, logTicks,
    percent, plot, series, state, title, upTo, whole } = charts;

  // 0, and just below each edge of the finest bins: |w| <= tau is then the same as |w| < edge.
  const stopsOf = (held) => {
    const filled = held.filter((one) => one.most > 0);
    if (!filled.length) return [0];
    const finest = {
      bins: Math.max(...filled.map((one) => one.bins)), exponent: Math.max(Math.min(...filled.map((one) => one.exponent)), -126),
    };
    const last = index(finest, Math.min(Math.max(...filled.map((one) => one.most)), 2 ** 126)) + 1;
    return [0, ...Array.from({ length: last }, (_, at) => before(Math.fround(edge(finest, at + 1))))];
  };

  charts.kinds.threshold = (figure, data, anchor) => {
    const room = figure.querySelector(".chart");
    const part = Object.fromEntries([...figure.querySelectorAll("[data-part]")].map((one) => [one.dataset.part, one]));
    const table = document.getElementById(`${anchor}-layers`);
    const sentence = document.getElementById(`${anchor}-sentence`);
    const rows = [...table.querySelectorAll("tbody tr")].map((row) => {
      const [share, many, error, size] = row.querySelectorAll("td");
      return { share: share.firstChild.firstChild, bar: share.lastChild, many, error: error.firstChild, size };
    });
    const stored = data.histograms ?? JSON.parse(document.getElementById(`${data.shared}-data`).textContent).histograms;
    const stages = new Map();
    const layersOf = (stage) => {
      if (!stages.has(stage)) stages.set(stage, stored[stage].map((held) => held && counted(held)));
      return stages.get(stage);
    };
    let held, present, stops, size, tau = data.start;

    const nearest = (value) => {
      let low = 0, high = stops.length - 1;
      while (low < high) {
        const middle = (low + high) >> 1;
        if (stops[middle] < value) low = middle + 1; else high = middle;
      }
      return low > 0 && value - stops[low - 1] < stops[low] - value ? low - 1 : low;
    };
    const removed = (value, bound) => present.reduce((sum, one) => sum + upTo(one, value)[bound], 0);
    let totals, least;  // removed at each stop: about, and for certain
    const load = (stage) => {
      held = layersOf(stage);
      present = held.filter(Boolean);
      stops = stopsOf(present);
      size = present.reduce((sum, one) => sum + one.n, 0);
      totals = stops.map((value) => removed(value, "estimate"));
      least = stops.map((value) => removed(value, "low"));
      part.slider.max = stops.length - 1;
      rows.forEach((row, layer) => {
        row.size.textContent = held[layer] ? whole(held[layer].n) : "–";
        row.size.dataset.value = held[layer] ? held[layer].n : 0;
      });
    };

    // Only texts, widths and one line change, so this is fast; the curves stay.
    const show = () => {
      let low = 0, high = 0, estimate = 0;
      held.forEach((one, layer) => {
        const row = rows[layer];
        const found = one ? upTo(one, tau) : { low: 0, high: 0, estimate: 0 };
        const share = one && one.n ? found.estimate / one.n : 0;
        const around = Math.max(found.high - found.estimate, found.estimate - found.low);
        low += found.low; high += found.high; estimate += found.estimate;
        const key = `${one ? 1 : 0} ${found.estimate} ${around}`;
        if (row.key === key) return;
        row.key = key;
        row.share.data = one ? percent(share) : "–";
        row.bar.firstChild.style.transform = `scaleX(${share.toFixed(4)})`;
        row.many.firstChild.data = whole(found.estimate);
        row.many.dataset.value = found.estimate;
        row.error.data = around ? `± ${whole(around)}` : "exact";
      });
      const share = size ? estimate / size : 0;
      const sure = low === high ? "exact" : `at least ${whole(low)}, at most ${whole(high)}`;
      const layers = `${present.length} layer${present.length === 1 ? "" : "s"}`;
      sentence.textContent = `${data.symbol} = ${digits(tau)} removes ${whole(estimate)} of ${whole(size)} ${data.kind} in ` +
        `${layers}: ${percent(share)} (${sure}).`;
      Object.assign(sentence.dataset, { tau, low, high, estimate, size });
      part.slider.value = nearest(tau);
      part.slider.setAttribute("aria-valuetext", `${digits(tau)}, removes ${percent(share)}`);
      if (document.activeElement !== part.value) part.value.value = digits(tau);
      if (document.activeElement !== part.share) part.share.value = (100 * share).toFixed(2);
      place();
    };
    // The line that marks the threshold lies over the chart and moves without drawing it again.
    const marker = element("div", null, { class: "marker", "aria-hidden": "true" });
    const place = () => {
      const layout = room._fullLayout;
      if (!layout) return;
      const { xaxis, yaxis } = layout;
      const at = tau > 0 ? xaxis.l2p(Math.log10(tau)) : 0;
      marker.style.cssText = `left:${xaxis._offset + Math.min(Math.max(at, 0), xaxis._length)}px;top:${yaxis._offset}px;height:${yaxis._length}px`;
    };

    const draw = () => {
      const narrow = room.clientWidth < 560;
      const layer = held[chosen.at()];
      const fine = stops.slice(1);
      const share = (one, value) => (one.n ? upTo(one, value).estimate / one.n : 0);
      const reach = fine.filter((_, at) => totals[at + 1] > 0.002 * size);
      const range = reach.length ? [Math.log10(reach[0]) - 0.1, Math.log10(fine[fine.length - 1]) + 0.05] : [-3, 0];
      const bars = { x: [], y: [], text: [] };
      for (let at = 1; layer && at + 8 < stops.length; at += 8) {
        const many = upTo(layer, stops[at + 8]).estimate - upTo(layer, stops[at]).estimate;
        bars.x.push(Math.sqrt(stops[at] * stops[at + 8]));
        bars.y.push(many / Math.log(stops[at + 8] / stops[at]));  // per width on the logarithmic axis
        bars.text.push(`${whole(many)} between ${digits(stops[at])} and ${digits(stops[at + 8])}`);
      }
      const line = (name, y, at) => ({
        type: "scatter", mode: "lines", x: fine, y, line: { color: series(at), width: at === 1 ? 2.5 : 2, dash: dash(at) },
        hovertext: y.map((value) => `${literal(name)}: ${percent(value)}`), hovertemplate: "%{hovertext}<extra></extra>",
      });
      const traces = [{
        type: "scatter", mode: "lines", x: bars.x, y: bars.y, yaxis: "y2", fill: "tozeroy", fillcolor: faded(series(0), 0.26),
        line: { shape: "hvh", color: series(0), width: 1 }, hovertext: bars.text, hovertemplate: "%{hovertext}<extra></extra>",
      }, line("all layers", totals.slice(1).map((many) => many / (size || 1)), 1)];
      if (layer) traces.push(line(data.short[chosen.at()], fine.map((value) => share(layer, value)), 2));
      plot(room, traces, {
        height: narrow ? 280 : 360, hovermode: "x unified", margin: { l: 40, r: 12, t: 16, b: 40 },
        xaxis: axis({ title: title(`threshold ${data.symbol}`), type: "log", range, showgrid: false, zeroline: false, ticks: "outside",
          hoverformat: ".4~g", ...logTicks(10 ** range[0], 10 ** range[1]) }),
        yaxis: axis({ title: narrow ? undefined : title("removed"), range: [0, 1.03], tickformat: ".0%", zeroline: false }),
        yaxis2: { ...axis({ rangemode: "tozero" }), overlaying: "y", side: "right", visible: false },
      });
      if (marker.parentNode !== room) room.append(marker);
      curve();
      show();
    };

    // At every tenth of the sparsity, the threshold that reaches it.
    const curve = () => {
      const made = document.createElement("table");
      const head = made.createTHead().insertRow();
      const heads = [`Threshold ${data.symbol}`, `Removed ${data.kind}`, "Of all"];
      heads.forEach((text) => head.append(element("th", text, { scope: "col", class: "number" })));
      const body = made.createTBody();
      let next = 0;
      for (const [at, many] of totals.entries()) {
        if (many < (next / 20) * size) continue;
        while (next <= 20 && many >= (next / 20) * size) next++;
        const row = body.insertRow();
        row.append(element("th", digits(stops[at]), { scope: "row", class: "number" }));
        row.append(element("td", whole(many), { class: "number", "data-value": many }));
        row.append(element("td", percent(size ? many / size : 0), { class: "number" }));
      }
      const box = element("div", null, { class: "scroll", tabindex: 0, role: "region", "aria-label": "Curve, table" });
      box.append(made);
      document.getElementById(`${anchor}-curve`).replaceChildren(box);
    };

    // While the slider moves the address waits: browsers slow a page down that writes it hundreds of times.
    let waiting = 0;
    const note = () => { clearTimeout(waiting); keep(data.key, String(tau)); };
    const set = (value) => { tau = value; note(); show(); };
    const typed = (text) => {
      const value = Number(text.trim().replace(",", "."));
      return text.trim() !== "" && Number.isFinite(value) && value >= 0 ? value : null;
    };
    part.slider.addEventListener("input", () => {
      tau = stops[Number(part.slider.value)];
      clearTimeout(waiting);
      waiting = setTimeout(note, 150);
      show();
    });
    part.slider.addEventListener("change", note);
    part.value.addEventListener("change", () => { const value = typed(part.value.value); if (value !== null) set(value); else show(); });
    part.share.addEventListener("change", () => {
      const value = typed(part.share.value);
      if (value === null || value > 100) { show(); return; }
      let low = 0, high = stops.length - 1;
      while (low < high) {
        const middle = (low + high) >> 1;
        if (least[middle] >= (value / 100) * size) high = middle; else low = middle + 1;
      }
      set(stops[low]);
    });
    part.stage?.addEventListener("change", () => { keep(`${anchor}.stage`, data.stages[Number(part.stage.value)]); load(Number(part.stage.value)); draw(); });
    const restore = () => {
      const kept = state();
      const value = kept.has(data.key) ? typed(kept.get(data.key)) : null;
      tau = value ?? data.start;
      const stage = data.stages.indexOf(kept.get(`${anchor}.stage`));
      if (part.stage) part.stage.value = String(stage >= 0 ? stage : data.stage);
      load(part.stage ? Number(part.stage.value) : 0);
    };
    window.addEventListener("hashchange", () => { restore(); draw(); });
    restore();
    const chosen = chooser(figure, data.names, anchor, () => draw());
    return draw;
  };
}
