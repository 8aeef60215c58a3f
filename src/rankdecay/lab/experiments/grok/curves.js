// Metrics over steps: a thin line per seed, the median of the seeds still training in bold.

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

function curveTraces(element, metric) {
  const traces = [];
  const bold = [];
  for (const arm of visibleArms()) {
    const members = run.members.filter((member) => member.arm === arm);
    const at = new Map();
    const thin = { x: [], y: [] };
    for (const member of members) {
      member.step.forEach((step, index) => {
        const value = member.values[metric][index];
        thin.x.push(step);
        thin.y.push(value);
        if (value !== null) at.set(step, [...(at.get(step) || []), value]);
      });
      thin.x.push(null);
      thin.y.push(null);
    }
    if (!at.size) continue;
    const steps = [...at.keys()].sort((a, b) => a - b);
    const line = { color: armColor(arm), dash: run.arms[arm].dash };
    if (members.length > 1) {
      traces.push({ ...thin, mode: "lines", line: { color: armColor(arm), width: 1 }, opacity: 0.4, hoverinfo: "skip" });
    }
    bold.push({
      x: steps, y: steps.map((step) => median(at.get(step))), ...hoverText(element, plainText(run.arms[arm].label), "step"),
      mode: "lines", line: { ...line, width: 2.6 },
      customdata: steps.map((step) => {
        const seeds = at.get(step);
        const range = `${digits(Math.min(...seeds))} to ${digits(Math.max(...seeds))}`;
        return digits(median(seeds)) + (seeds.length > 1 ? `  (${range}, ${seeds.length} seeds)` : "");
      }),
    });
  }
  return [...traces, ...bold];
}

function curveChart(id, key, yaxis) {
  chart(id, [key], (element) => plot(element, curveTraces(element, state[key]), {
    xaxis: { title: { text: "step", standoff: 6 }, hoverformat: ",", unifiedhovertitle: { text: "step %{x}" } }, yaxis: yaxis(),
  }));
}

const RANK_TICKS = [1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500];

curveChart("accuracy-chart", "accuracy", () => ({ range: [-0.02, 1.03], tickformat: ".1f" }));
curveChart("rank-chart", "rank", () => ({ type: "log", tickvals: RANK_TICKS, ticktext: RANK_TICKS.map(String) }));
curveChart("share-chart", "share", () => ({ range: [-0.02, 1.03], tickformat: ".1f" }));
