// The charts of the matrix experiment: singular values against strength, imbalance and gap over steps.

const chosenArm = (key) => run.arms.findIndex((item) => item.name === state[key]);
const LEGEND = { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 12.5 } };
const POWERS = { type: "log", exponentformat: "power", dtick: 2 };

// Grey without decay, from cold to warm the stronger it is.
function strengthColor(arm, index) {
  const stops = darkMode.matches ? ["#8d939d", "#6cb2ff", "#dd8fe0", "#ff8f5c"] : ["#767b84", "#1d63b8", "#8b3a8f", "#c2410c"];
  return blend(stops, index / Math.max(1, run.arms[arm].curves.length - 1));
}

chart("spectra-chart", ["arm"], (element) => {
  const arm = chosenArm("arm");
  const { spectra, theory } = run.arms[arm];
  const { muted } = theme();
  const lines = theory.y.map((y) => ({ x: theory.x, y, mode: "lines", line: { color: muted, width: 1.2 }, hoverinfo: "skip" }));
  const x = [], y = [], up = [], down = [], words = [];
  for (const { strength, values, low, high } of spectra) {
    values.forEach((value, index) => {
      x.push(strength);
      y.push(value);
      up.push(high[index] - value);
      down.push(value - low[index]);
      words.push(`λ = ${strength}, value ${index + 1}: ${digits(value)} (${digits(low[index])} to ${digits(high[index])})`);
    });
  }
  const color = armColor(arm);
  plot(element, [...lines, { x, y, mode: "markers", marker: { color, size: 8 }, customdata: words, hovertemplate: "%{customdata}<extra></extra>",
    error_y: { type: "data", symmetric: false, array: up, arrayminus: down, color, thickness: 1.4, width: 0 } }], {
    hovermode: "closest", xaxis: { title: { text: "λ", standoff: 6 } }, yaxis: { title: { text: "singular value" }, rangemode: "tozero" },
  });
});

chart("balance-chart", ["balanced"], (element) => {
  const arm = chosenArm("balanced");
  const { curves, rate } = run.arms[arm];
  const traces = [];
  curves.forEach((curve, index) => {
    const color = strengthColor(arm, index);
    const name = `λ = ${curve.strength}`;
    if (rate[index]) {
      const begun = curve.imbalance[0];
      const y = curve.step.map((step) => begun * Math.exp(-rate[index] * step));
      traces.push({ x: curve.step, y: y.map((value) => (value > 1e-16 ? value : null)), mode: "lines", line: { color, width: 1.4, dash: "dash" }, showlegend: false, hoverinfo: "skip" });
    }
    traces.push({ x: curve.step, y: curve.imbalance, mode: "lines", line: { color, width: 2.4 }, ...hoverText(element, name, "step"),
      customdata: curve.imbalance.map((value, i) => (value === null ? "" : `${digits(value)}  (${digits(curve.imbalance_low[i] || 0)} to ${digits(curve.imbalance_high[i] || 0)})`)) });
  });
  plot(element, traces, { showlegend: true, legend: LEGEND, margin: { l: 44, r: 20, t: 40, b: 40 },
    xaxis: { title: { text: "step", standoff: 6 }, hoverformat: "," }, yaxis: { ...POWERS, title: { text: "imbalance", standoff: 8 } } });
});

chart("gap-chart", ["strength"], (element) => {
  const traces = [];
  const area = (color) => color.replace("#", "").match(/../g).map((part) => parseInt(part, 16)).join(",");
  run.arms.forEach((item, arm) => {
    const curve = item.curves.find((candidate) => String(candidate.strength) === state.strength);
    if (!curve) return;
    const color = armColor(arm);
    if (curve.gap_bound.some((value) => value !== null)) {
      traces.push({ x: curve.step, y: curve.gap_bound, mode: "lines", line: { color, width: 1.6, dash: "dot" }, showlegend: false, legendgroup: item.name, hoverinfo: "skip" });
    }
    const both = curve.step.map((_, i) => i).filter((i) => curve.gap_low[i] !== null && curve.gap_high[i] !== null);
    traces.push({ x: [...both, ...[...both].reverse()].map((i) => curve.step[i]), y: [...both.map((i) => curve.gap_high[i]), ...[...both].reverse().map((i) => curve.gap_low[i])],
      mode: "lines", fill: "toself", fillcolor: `rgba(${area(color)},.12)`, line: { width: 0 }, showlegend: false, legendgroup: item.name, hoverinfo: "skip" });
    traces.push({ x: curve.step, y: curve.gap, mode: "lines", line: { color, width: 2.4, dash: item.dash === "dash" ? "longdash" : "solid" }, legendgroup: item.name,
      ...hoverText(element, plainText(item.label), "step"), customdata: curve.gap.map((value, i) => (value === null ? "" : `${digits(value)}, bound ${digits(curve.gap_bound[i] || 0)}`)) });
  });
  plot(element, traces, { showlegend: true, legend: LEGEND, margin: { l: 44, r: 20, t: 40, b: 40 },
    xaxis: { title: { text: "step", standoff: 6 }, hoverformat: "," }, yaxis: { ...POWERS, title: { text: "gap", standoff: 8 } } });
});

darkMode.addEventListener("change", () => changed("theme"));
watchCharts();
