// Lines over two axes, with an optional logarithmic one and the value of the dense model.
{
  const { axis, color, dash, digits, faded, keep, literal, logTicks, plot, series, state, symbol, title } = charts;

  charts.kinds.lines = (figure, data, anchor) => {
    const room = figure.querySelector(".chart");
    const box = figure.querySelector("[data-option=log]");
    const held = state().get(`${anchor}.log`);
    if (held !== null) box.checked = held === "1";
    box.addEventListener("change", () => { keep(`${anchor}.log`, box.checked ? "1" : "0"); draw(); });
    const draw = () => {
      const narrow = room.clientWidth < 560;
      const traces = data.lines.map((line, at) => ({
        type: "scatter", mode: "lines+markers",
        x: line.points.map((point) => point[0]), y: line.points.map((point) => point[1]),
        error_y: line.points.some((point) => point[2] !== null) ? {
          type: "data", symmetric: false, thickness: 1.2, width: 3, color: series(at + 1),
          array: line.points.map((point) => (point[3] === null ? 0 : point[3] - point[1])),
          arrayminus: line.points.map((point) => (point[2] === null ? 0 : point[1] - point[2])),
        } : undefined,
        line: { color: series(at + 1), width: 2.25, dash: dash(at + 1) },
        marker: { color: series(at + 1), size: 10, symbol: symbol(at + 1), line: { width: 1.5, color: color("paper") } },
        hovertext: line.points.map((point) => literal(line.name) + ": " + digits(point[1]) + (point[4] ? ` (${literal(point[4])})` : "")),
        hovertemplate: "%{hovertext}<extra></extra>",
      }));
      if (data.front.length) {
        // wide and pale, behind the lines
        traces.unshift({
          type: "scatter", mode: "lines+markers", x: data.front.map((point) => point[0]), y: data.front.map((point) => point[1]),
          line: { color: faded(color("ink"), 0.22), width: 9 }, hoverinfo: "skip",
          marker: { color: faded(color("ink"), 0.22), size: 22, symbol: "circle" },
        });
      }
      const shapes = [], annotations = [];
      const points = data.lines.flatMap((line) => line.points);
      const places = [...new Set(points.map((point) => point[0]))].sort((a, b) => a - b);
      // ticks at the points themselves, unless their labels would run into each other
      const gaps = places.slice(1).map((place, at) => place - places[at]);
      const apart = Math.min(...gaps) >= (narrow ? 0.16 : 0.075) * (places[places.length - 1] - places[0]);
      const values = points.flatMap((point) => point.slice(1, 4)).concat(data.reference).filter((value) => value > 0);
      if (data.reference !== null) {
        shapes.push({
          type: "line", xref: "paper", x0: 0, x1: 1, y0: data.reference, y1: data.reference,
          line: { color: color("soft"), width: 1.5, dash: "4px,3px" },
        });
        annotations.push({
          xref: "paper", x: 1, y: box.checked ? Math.log10(data.reference) : data.reference, showarrow: false,
          text: `${literal(data.reference_name)} ${digits(data.reference)}`, xanchor: "right", yanchor: "bottom",
          font: { size: 12, color: color("soft") },
        });
        // Invisible, so that the axis reaches the line.
        traces.push({
          type: "scatter", mode: "markers", x: [places[0] ?? 0], y: [data.reference],
          marker: { opacity: 0 }, hoverinfo: "skip",
        });
      }
      plot(room, traces, {
        height: narrow ? 300 : 400, hovermode: "x unified", shapes, annotations,
        margin: { l: 40, r: 16, t: 16, b: 40 },
        xaxis: axis({ title: title(data.x_label), tickformat: data.x_percent ? ".3~%" : "", showgrid: false, ticks: "outside",
          ...(apart ? { tickvals: places } : { nticks: narrow ? 5 : 10 }) }),
        yaxis: axis({ title: title(data.y_label), type: box.checked ? "log" : "linear", zeroline: false,
          ...(box.checked ? logTicks(Math.min(...values), Math.max(...values)) : { rangemode: "tozero", nticks: 6 }) }),
      });
    };
    return draw;
  };
}
