"use strict";
(() => {
  const charts = [...document.querySelectorAll(".chart")];
  const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const theme = () => ({
    "font.color": ink("--ink"),
    "xaxis.gridcolor": ink("--line"), "yaxis.gridcolor": ink("--line"),
    "xaxis.linecolor": ink("--line"), "yaxis.linecolor": ink("--line"),
    "hoverlabel.bgcolor": ink("--card"), "hoverlabel.font.color": ink("--ink"),
  });
  for (const chart of charts) {
    const figure = JSON.parse(document.getElementById(`${chart.id}-data`).textContent);
    Plotly.newPlot(chart, figure.data, figure.layout, { responsive: true, displaylogo: false, displayModeBar: false })
      .then(() => Plotly.relayout(chart, theme()));
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const chart of charts) Plotly.relayout(chart, theme());
  });
  for (const chip of document.querySelectorAll(".chip")) {
    chip.addEventListener("click", () => {
      const shown = chip.getAttribute("aria-pressed") !== "true";
      const name = chip.dataset.variant;
      chip.setAttribute("aria-pressed", String(shown));
      for (const row of document.querySelectorAll("[data-row]")) {
        if (row.dataset.row === name) row.hidden = !shown;
      }
      for (const chart of charts) {
        const traces = chart.data.flatMap((trace, i) => (trace.name === name ? [i] : []));
        if (traces.length) Plotly.restyle(chart, { visible: shown }, traces);
      }
    });
  }
})();
