// Singular values at one step, on a log axis with a floor: float32 resolves little below 1e-7 of the largest.

const FLOOR = 1e-6;

function spectrumOf(row, choice) {
  const [, layer, index] = choice.split(":").map(Number);
  return row && row[layer] ? row[layer][index] : null;
}

// One range for the whole slider, so that a curve moves and the axis does not.
function largestValue(choice) {
  const name = choice.split(":")[0];
  let largest = 0;
  for (const frame of time.frames) {
    for (const row of frame[name] || []) largest = Math.max(largest, (spectrumOf(row, choice) || [0])[0]);
  }
  return largest || 1;
}

chart("spectra-chart", ["step", "seed", "matrix", "scale"], (element) => {
  const name = state.matrix.split(":")[0];
  const unit = state.scale === "absolute" ? largestValue(state.matrix) : 1;
  const faint = [];
  const bold = [];
  for (const member of membersNow(name)) {
    const values = spectrumOf(member.row, state.matrix);
    if (!values) continue;
    const scale = state.scale === "relative" ? values[0] || 1 : 1;
    const shown = values.map((value) => value / scale);
    const trace = {
      x: shown.map((_, index) => index + 1),
      y: shown.map((value) => Math.max(value, FLOOR * unit)),
      mode: "lines",
    };
    if (String(member.seed) !== state.seed) {
      faint.push({ ...trace, line: { color: armColor(member.arm), width: 1 }, opacity: 0.3, hoverinfo: "skip" });
      continue;
    }
    bold.push({
      ...trace,
      ...hoverText(element, plainText(run.arms[member.arm].label), "singular value"),
      customdata: shown.map(digits),
      line: { color: armColor(member.arm), width: 2.4, dash: run.arms[member.arm].dash },
    });
  }
  const top = Math.log10(unit) + 0.15;
  plot(element, [...faint, ...bold], {
    xaxis: {
      title: { text: "index of the singular value", standoff: 6 },
      unifiedhovertitle: { text: "singular value %{x}" },
      range: [0, time[`${name}_shape`].at(-1) + 1],
    },
    yaxis: { type: "log", range: [Math.log10(FLOOR * unit) - 0.1, top], exponentformat: "power", dtick: 1 },
  });
});
