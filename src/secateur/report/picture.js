// The mask of one layer as a picture: dark is kept, pale is pruned.
{
  const { axis, chooser, color, digits, percent, plot, title, whole } = charts;

  const unpacked = (held) => {
    const bytes = atob(held.cells);
    return Array.from({ length: held.height }, (_, row) => Array.from({ length: held.width }, (_, column) => {
      const at = row * held.width + column, byte = bytes.charCodeAt(at >> 1);
      return (at % 2 ? byte & 15 : byte >> 4) / 15;
    }));
  };

  charts.kinds.picture = (figure, data, anchor) => {
    const room = figure.querySelector(".chart");
    const said = document.getElementById(`${anchor}-said`);
    const draw = () => {
      const held = data.pictures[layers.at()];
      const exact = held.height === held.rows && held.width === held.columns;
      const cells = unpacked(held);
      const part = (many, of) => many / of;
      const side = Math.min(room.clientWidth - 72, 420);
      const tall = Math.max(60, Math.min(side * 1.5, side * Math.min(2, Math.max(0.25, part(held.rows, held.columns)))));
      plot(room, [{
        type: "heatmap", z: cells, zmin: 0, zmax: 1, showscale: false,
        x0: held.columns / held.width / 2, dx: held.columns / held.width,
        y0: held.rows / held.height / 2, dy: held.rows / held.height,
        colorscale: [[0, color("heat-0")], [1, color("ink")]],
        text: cells.map((row) => row.map((value) => (exact ? (value ? "kept" : "pruned") : `about ${percent(value)} kept`))),
        hovertemplate: "output %{y:.0f}, input %{x:.0f}: %{text}<extra></extra>",
      }], {
        width: side + 72, height: tall + 64, autosize: false, hovermode: "closest", margin: { l: 56, r: 16, t: 8, b: 56 },
        xaxis: axis({ range: [0, held.columns], showgrid: false, zeroline: false, title: title("input"), nticks: 5, automargin: false }),
        yaxis: axis({ range: [held.rows, 0], showgrid: false, zeroline: false, title: title("output"), nticks: 5, automargin: false }),
      });
      const size = held.rows * held.columns;
      said.textContent = `${whole(held.kept)} of ${whole(size)} weights are kept, sparsity ${percent(1 - held.kept / size)}. ` +
        (exact ? "Every cell is one weight." : `A cell is ${digits(Number((size / (held.height * held.width)).toPrecision(2)))} weights on average.`);
    };
    const layers = chooser(figure, data.names, anchor, () => draw());
    return draw;
  };
}
