// A curve for each layer, faint, and the chosen one dark.
{
  const { axis, chooser, color, digits, faded, keep, literal, logTicks, percent, plot, series, state, title } = charts;

  charts.kinds.curves = (figure, data, anchor) => {
    const room = figure.querySelector(".chart");
    const box = figure.querySelector("[data-option=log]");
    const restore = () => { box.checked = state().get(`${anchor}.log`) === "1"; };
    box.addEventListener("change", () => { keep(`${anchor}.log`, box.checked ? "1" : null); draw(); });
    const draw = () => {
      const narrow = room.clientWidth < 560;
      const chosen = layers.at();
      const log = box.checked;
      const known = data.values.flat().filter((value) => value !== null && (!log || value > 0));
      const trace = (layer, more) => ({
        type: "scatter", mode: "lines", x: data.sparsities, y: data.values[layer], connectgaps: false, ...more,
      });
      const faint = data.names.map((_, layer) => layer).filter((layer) => layer !== chosen)
        .map((layer) => trace(layer, { line: { color: faded(series(0), 0.45), width: 1 }, hoverinfo: "skip" }));
      const own = data.names.length ? [trace(chosen, {
        mode: "lines+markers", line: { color: series(1), width: 3 },
        marker: { color: series(1), size: 10, line: { width: 1.5, color: color("paper") } },
        hovertext: data.values[chosen].map((value, at) => `${literal(data.names[chosen])}<br>${percent(data.sparsities[at])}: ` +
          `${value === null ? "–" : digits(value)}`),
        hovertemplate: "%{hovertext}<extra></extra>",
      })] : [];
      const shapes = data.reference === null ? [] : [{
        type: "line", xref: "paper", x0: 0, x1: 1, y0: data.reference, y1: data.reference,
        line: { color: color("soft"), width: 1.5, dash: "4px,3px" },
      }];
      plot(room, [...faint, ...own], {
        height: narrow ? 300 : 380, hovermode: "closest", shapes, margin: { l: 40, r: 16, t: 16, b: 40 },
        xaxis: axis({ title: title("sparsity of this layer alone"), tickformat: ".3~%", showgrid: false, ticks: "outside",
          tickvals: data.sparsities }),
        yaxis: axis({ title: title(data.quantity), type: log ? "log" : "linear", zeroline: false,
          ...(log && known.length ? logTicks(Math.min(...known), Math.max(...known)) : { nticks: 6 }) }),
      });
    };
    restore();
    window.addEventListener("hashchange", () => { restore(); draw(); });
    const layers = chooser(figure, data.names, anchor, () => draw());
    return draw;
  };
}
