// A heat map of one hue, pale to dark: the order survives without colour vision, and the numbers stand in the cells.
{
  const { axis, clipped, color, digits, literal, plot, title } = charts;

  // The ink that stands out more on a colour, by the contrast of WCAG 2.
  const luminance = (rgb) => rgb.map((part) => part / 255).map((part) => (part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
    .reduce((sum, part, at) => sum + part * [0.2126, 0.7152, 0.0722][at], 0);
  const contrast = (one, two) => (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
  const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  const blend = (one, two, part) => channels(one).map((value, at) => Math.round(value + (channels(two)[at] - value) * part));
  const mix = (one, two, part) => `rgb(${blend(one, two, part).join(",")})`;

  charts.kinds.heat = (figure, data) => {
    const room = figure.querySelector(".chart");
    const draw = () => {
      const narrow = room.clientWidth < 560;
      const many = data.rows.length, wide = data.columns.length;
      const known = data.values.flat().filter((value) => value !== null);
      const low = Math.min(...known), high = Math.max(...known);
      const pale = color("heat-0"), dark = color("heat-1");
      const share = (value) => (high > low ? (value - low) / (high - low) : 0.5);
      const inks = [color("heat-ink-0"), color("heat-ink-1")];
      const ink = (value) => {
        const under = luminance(value === null ? channels(color("paper")) : blend(pale, dark, share(value)));
        return inks.reduce((best, one) => (contrast(luminance(channels(one)), under) > contrast(luminance(channels(best)), under) ? one : best));
      };
      const left = narrow ? 104 : 190, cell = (room.clientWidth - left - 16) / wide;
      const annotations = [];
      data.values.forEach((row, y) => row.forEach((value, x) => {
        const crossed = data.marked.some((mark) => mark[0] === y && mark[1] === x);
        const text = cell >= 44 && value !== null ? digits(Number(value.toPrecision(3))) : "";
        if (!crossed && !text) return;
        annotations.push({
          x, y, text: crossed ? `×${text ? `\u00a0${text}` : ""}` : text, showarrow: false,
          font: { size: crossed && !text ? 15 : 11, color: ink(value) },
        });
      }));
      const size = narrow ? 20 : 26;
      plot(room, [{
        type: "heatmap", z: data.values, zmin: low, zmax: high > low ? high : low + 1, xgap: 2, ygap: 2, showscale: false,
        colorscale: Array.from({ length: 9 }, (_, at) => [at / 8, mix(pale, dark, at / 8)]),
        text: data.values.map((row, y) => row.map((value, x) => `${literal(data.rows[y])}<br>${literal(data.column_label)} ` +
          `${literal(data.columns[x])}: ${value === null ? "–" : digits(value)}` +
          (data.marked.some((mark) => mark[0] === y && mark[1] === x) ? `<br>${literal(data.mark)}` : ""))),
        hovertemplate: "%{text}<extra></extra>",
      }], {
        height: 72 + size * many, hovermode: "closest", annotations, margin: { l: left, r: 16, t: 48, b: 16 },
        xaxis: axis({ side: "top", title: title(data.column_label), range: [-0.5, wide - 0.5], showgrid: false, zeroline: false, automargin: false,
          tickvals: data.columns.map((_, at) => at).filter((at) => cell >= 26 || at % Math.ceil(26 / cell) === 0),
          ticktext: data.columns.filter((_, at) => cell >= 26 || at % Math.ceil(26 / cell) === 0).map((name) => literal(clipped(name, cell >= 60 ? 9 : 4))) }),
        yaxis: axis({ range: [many - 0.5, -0.5], showgrid: false, zeroline: false, ticks: "", automargin: false,
          tickvals: data.rows.map((_, at) => at), ticktext: data.short.map((name) => literal(clipped(name, narrow ? 13 : 26)) + " ") }),
      });
    };
    return draw;
  };
}
