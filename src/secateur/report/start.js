// Draws every chart of the page from the JSON block beside it, and again when width or colours change.
{
  const drawn = [];
  for (const figure of document.querySelectorAll("figure[data-chart]")) {
    const { chart, anchor } = figure.dataset;
    const draw = charts.kinds[chart](figure, JSON.parse(document.getElementById(`${anchor}-data`).textContent), anchor);
    draw();
    drawn.push(draw);
  }
  const redraw = () => drawn.forEach((draw) => draw());
  let width = document.documentElement.clientWidth, waiting = 0;
  window.addEventListener("resize", () => {
    if (document.documentElement.clientWidth === width) return;
    width = document.documentElement.clientWidth;
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(redraw);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  window.addEventListener("beforeprint", () => { document.documentElement.dataset.print = ""; redraw(); });
  window.addEventListener("afterprint", () => { delete document.documentElement.dataset.print; redraw(); });
}
