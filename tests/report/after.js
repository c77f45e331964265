// Runs after the page's own script; a test puts its part in place of TEST, and reads #probe.
(() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const texts = (selector) => all(selector).map((element) => element.textContent.trim());
  const rgb = (text) => (text.match(/[\d.]+/g) || []).map(Number);
  // Contrast as WCAG 2 defines it.
  const luminance = (color) => color.slice(0, 3).map((part) => part / 255)
    .map((part) => (part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
    .reduce((sum, part, at) => sum + part * [0.2126, 0.7152, 0.0722][at], 0);
  const paper = rgb(getComputedStyle(document.body).backgroundColor);
  const contrast = (color) => {
    const [high, low] = [luminance(color), luminance(paper)].sort((a, b) => b - a);
    return (high + 0.05) / (low + 0.05);
  };
  const contrasts = (selector, property) =>
    all(selector).map((element) => contrast(rgb(getComputedStyle(element)[property])));
  const numbers = (selector) => all(`${selector} tbody tr`).map((row) =>
    [...row.querySelectorAll("[data-value]")].map((cell) => Number(cell.dataset.value)));
  const common = () => ({
    ...seen, title: document.title, inner: innerWidth, wide: document.documentElement.scrollWidth,
    requests: performance.getEntriesByType("resource").map((entry) => entry.name),
    charts: all("figure .main-svg").length,
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    contrasts: [...contrasts("main p, main th, main td, .delta, h1, nav a, dd", "color"), ...contrasts("figure:not([data-chart=heat]) svg text", "fill")],
  });
  /*TEST*/
  setTimeout(() => {
    const left = document.createElement("pre");
    left.id = "probe";
    left.textContent = JSON.stringify({ ...common(), ...result() });
    if (parent === window) document.body.append(left); else parent.postMessage(left.outerHTML, "*");
  }, 300);
})();
