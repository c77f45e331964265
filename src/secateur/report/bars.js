// Sparsity of each layer: a bar for each, its colour and pattern the layer's role.
{
  const { axis, clipped, color, literal, percent, plot, series, whole } = charts;

  charts.kinds.bars = (figure, data) => {
    const room = figure.querySelector(".chart");
    const patterns = ["", "/", ".", "|", "\\", "-"];
    const draw = () => {
      const narrow = room.clientWidth < 560;
      const many = data.names.length;
      const at = data.names.map((_, index) => index);
      const part = at.map((index) => (data.weights[index] ? data.zeros[index] / data.weights[index] : 0));
      const traces = data.role_names.map((role, group) => {
        const own = at.filter((index) => data.roles[index] === group);
        return {
          type: "bar", orientation: "h", width: 0.62, y: own, x: own.map((index) => part[index]),
          text: own.map((index) => `\u00a0${percent(part[index])}`), textposition: "outside", cliponaxis: false,
          textfont: { size: 12, color: color("soft") },
          marker: {
            color: series(group + 1), line: { width: group ? 1 : 0, color: series(group + 1) },
            pattern: { shape: patterns[group % 6], size: 5, solidity: 0.45, fgcolor: series(group + 1), bgcolor: color("paper") },
          },
          hovertext: own.map((index) => `${literal(data.names[index])}<br>${whole(data.zeros[index])} of ` +
            `${whole(data.weights[index])} weights are zero<br>${literal(role)}`),
          hovertemplate: "%{hovertext}<extra></extra>",
        };
      });
      if (data.lost) {
        traces.push({
          type: "scatter", mode: "markers", cliponaxis: false, y: at.filter((index) => data.lost[index] !== null),
          x: data.lost.filter((value) => value !== null),
          marker: { symbol: "diamond", size: 9, color: color("ink"), line: { width: 1.5, color: color("paper") } },
          hovertext: at.filter((index) => data.lost[index] !== null)
            .map((index) => `${literal(data.names[index])}<br>${literal(data.lost_name)}: ${percent(data.lost[index])}`),
          hovertemplate: "%{hovertext}<extra></extra>",
        });
      }
      plot(room, traces, {
        height: 64 + 24 * many, barmode: "overlay", hovermode: "closest",
        margin: { l: 8, r: 56, t: 28, b: 8 },
        xaxis: axis({ range: [0, 1], tickformat: ".0%", side: "top", nticks: narrow ? 3 : 6, automargin: false }),
        yaxis: axis({
          range: [many - 0.4, -0.6], tickvals: at, showgrid: false, zeroline: false, ticks: "",
          ticktext: data.short.map((name) => literal(clipped(name, narrow ? 18 : 44)) + " "),
        }),
        shapes: [{
          type: "line", x0: data.total, x1: data.total, yref: "paper", y0: 0, y1: 1, layer: "below",
          line: { color: color("faint"), width: 1, dash: "4px,3px" },
        }],
      });
    };
    return draw;
  };
}
