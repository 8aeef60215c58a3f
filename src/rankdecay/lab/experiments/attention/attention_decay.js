// The charts of an experiment on the decay of attention: ranks and quality against decay, against each other, over steps.

const LEGEND = { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 12.5 } };
const ZERO_GAP = 0.7; // of decades: how far left of the weakest decay the place of 0 is
const LOGARITHMIC = ["nuclear_gap"];
const SMALL = { width: 300, height: 190, gap: 46 }; // of a chart per layer, in pixels

// A page without a choice of QK-norm or of the decay of the MLPs has cells of one kind alone.
const fits = (cell) => (!state.norm || cell.norm === state.norm) && (!state.mlp || cell.mlp === state.mlp);
const ofArm = (arm) => run.cells.filter((cell) => cell.arm === arm && fits(cell));
const measured = (values, layer = Number(state.layer || 0)) => values[state.part]?.[state.measure]?.[layer] ?? null;
const measureName = () => `${run.measures[state.measure]} of ${run.parts[state.part]}`;
const isKnown = (value) => value !== null && value !== undefined;

function cellWords(cell) {
  const norm = state.norm ? `, QK-norm ${cell.norm}` : "";
  const mlp = state.mlp ? `, MLP decay ${cell.mlp}` : "";
  return plainText(`${run.arms[cell.arm].label}, decay ${cell.strength}${norm}${mlp}`);
}

function qualityWords(cell) {
  const accuracy = isKnown(cell.accuracy) ? `, accuracy ${(100 * cell.accuracy).toFixed(1)} %` : "";
  const lost = cell.diverged ? `, ${cell.diverged} of ${cell.seeds} diverged` : "";
  return `loss ${cell.words}${accuracy}${lost}`;
}

// Places of decays on an axis of decades, with one for 0.
function decayAxis() {
  const strengths = [...new Set(run.cells.filter(fits).map((cell) => cell.strength))].sort((a, b) => a - b);
  const positive = strengths.filter((strength) => strength > 0).map(Math.log10);
  const zero = positive.length ? positive[0] - ZERO_GAP : 0;
  const place = (strength) => (strength > 0 ? Math.log10(strength) : zero);
  const places = strengths.map(place);
  const [low, high] = [places[0] ?? 0, places.at(-1) ?? 0];
  const margin = Math.max(0.15, 0.04 * (high - low));
  return { place, break: strengths[0] === 0 && positive.length ? zero + ZERO_GAP / 2 : null,
    axis: { title: { text: "decay of attention", standoff: 6 }, tickvals: places, ticktext: strengths.map(String), range: [low - margin, high + margin] } };
}

function absentNote(text) {
  return { text: plainText(text), showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5, font: { size: 14 } };
}

function noteUnless(found) {
  if (found) return [];
  const product = state.part === "query_key" && state.norm === "on";
  return [absentNote(product ? "Under QK-norm there is no product W_KᵀW_Q: choose W_Q or W_K." : "There is no value of this measure here.")];
}

const yMeasure = () => ({ title: { text: measureName(), standoff: 8 }, ...(LOGARITHMIC.includes(state.measure) ? { type: "log", exponentformat: "power" } : { rangemode: "tozero" }) });

function untrainedValue() {
  const values = run.cells.filter(fits).map((cell) => measured(cell.untrained)).filter(isKnown);
  return values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null;
}

// A chart against decay: a line per visible arm through a value of its cells.
function againstDecay(element, value, words, yaxis, untrained, error) {
  const { place, axis, break: gap } = decayAxis();
  const { muted } = theme();
  const traces = visibleArms().map((arm) => {
    const cells = ofArm(arm).filter((cell) => isKnown(value(cell)));
    const color = armColor(arm);
    const bars = error ? { error_y: { type: "data", array: cells.map(error), color, thickness: 1.4, width: 4 } } : {};
    return { x: cells.map((cell) => place(cell.strength)), y: cells.map(value), mode: "lines+markers", line: { color, width: 2.4, dash: run.arms[arm].dash },
      marker: { color, size: 8 }, customdata: cells.map((cell) => `<b>${cellWords(cell)}</b><br>${words(cell)}`), hovertemplate: "%{customdata}<extra></extra>", ...bars };
  }).filter((trace) => trace.x.length);
  const found = traces.length > 0;
  if (isKnown(untrained)) {
    traces.push({ x: axis.range, y: [untrained, untrained], mode: "lines", line: { color: muted, width: 1.4, dash: "dash" },
      customdata: [`untrained: ${digits(untrained)}`, `untrained: ${digits(untrained)}`], hovertemplate: "%{customdata}<extra></extra>" });
  }
  const shapes = gap === null ? [] : [{ type: "line", xref: "x", yref: "paper", x0: gap, x1: gap, y0: 0, y1: 1, line: { color: muted, width: 1, dash: "dot" } }];
  plot(element, traces, { hovermode: "closest", shapes, annotations: noteUnless(found), xaxis: { ...axis, showgrid: false }, yaxis });
}

chart("rank-chart", ["part", "measure", "layer", "norm", "mlp"], (element) => {
  const value = (cell) => measured(cell.ends);
  againstDecay(element, value, (cell) => `${measureName()}: ${digits(value(cell))}<br>${qualityWords(cell)}`, yMeasure(), untrainedValue());
});

const qualityAxis = () => (state.quality === "accuracy" ? { title: { text: "accuracy", standoff: 8 }, tickformat: ".0%" } : { title: { text: "loss", standoff: 8 } });

chart("quality-chart", ["quality", "norm", "mlp"], (element) => {
  const isLoss = state.quality === "loss";
  againstDecay(element, (cell) => cell[state.quality], qualityWords, qualityAxis(), null, isLoss ? (cell) => cell.error ?? 0 : null);
});

chart("cost-chart", ["part", "measure", "layer", "norm", "mlp", "quality"], (element) => {
  const { muted, text } = theme();
  const traces = visibleArms().map((arm) => {
    const cells = ofArm(arm).filter((cell) => isKnown(measured(cell.ends)) && isKnown(cell[state.quality]));
    const color = armColor(arm);
    const bars = state.quality === "loss" ? { error_y: { type: "data", array: cells.map((cell) => cell.error ?? 0), color, thickness: 1.2, width: 3 } } : {};
    return { x: cells.map((cell) => measured(cell.ends)), y: cells.map((cell) => cell[state.quality]), mode: "lines+markers+text", text: cells.map((cell) => String(cell.strength)),
      textposition: "top right", textfont: { color: text, size: 11.5 }, line: { color, width: 1, dash: "dot" }, marker: { color, size: 10 },
      customdata: cells.map((cell) => `<b>${cellWords(cell)}</b><br>${measureName()}: ${digits(measured(cell.ends))}<br>${qualityWords(cell)}`),
      hovertemplate: "%{customdata}<extra></extra>", ...bars };
  }).filter((trace) => trace.x.length);
  const untrained = untrainedValue();
  const shapes = isKnown(untrained) ? [{ type: "line", xref: "x", yref: "paper", x0: untrained, x1: untrained, y0: 0, y1: 1, line: { color: muted, width: 1.4, dash: "dash" } }] : [];
  const largest = Math.max(untrained ?? 0, ...traces.flatMap((trace) => trace.x));
  const range = LOGARITHMIC.includes(state.measure) ? {} : { range: [0, 1.08 * largest || 1] };
  plot(element, traces, { hovermode: "closest", shapes, annotations: noteUnless(traces.length), xaxis: { ...yMeasure(), ...range, title: { text: measureName(), standoff: 6 } }, yaxis: qualityAxis() });
});

chart("mlp-chart", ["mapped", "norm"], (element) => {
  const cells = run.cells.filter((cell) => cell.arm === Number(state.mapped) && (!state.norm || cell.norm === state.norm));
  const strengths = [...new Set(cells.map((cell) => cell.strength))].sort((a, b) => a - b);
  const mlps = [...new Set(cells.map((cell) => cell.mlp))].sort((a, b) => a - b);
  const at = (mlp, strength) => cells.find((cell) => cell.mlp === mlp && cell.strength === strength);
  const grid = (value) => mlps.map((mlp) => strengths.map((strength) => { const cell = at(mlp, strength); return cell ? value(cell) : null; }));
  const { map } = theme();
  const colorscale = map.map((color, index) => [index / (map.length - 1), color]);
  const narrow = !isWide(element);
  element.style.height = `${90 + 52 * mlps.length}px`;
  plot(element, [{ type: "heatmap", x: strengths.map(String), y: mlps, z: grid((cell) => cell.loss), text: grid((cell) => (isKnown(cell.loss) ? String(cell.loss) : "")),
    customdata: grid((cell) => `<b>${cellWords(cell)}</b><br>${qualityWords(cell)}`), texttemplate: narrow && strengths.length > 5 ? "" : "%{text}",
    hovertemplate: "%{customdata}<extra></extra>", colorscale, reversescale: true, showscale: false, xgap: 2, ygap: 2, hoverongaps: false }],
    { hovermode: "closest", annotations: cells.length ? lostNotes(cells) : noteUnless(false), xaxis: { type: "category", title: { text: "decay of attention", standoff: 6 }, showgrid: false },
      yaxis: { type: "category", title: { text: "decay of the MLPs", standoff: 8 }, showgrid: false } });
});

function lostNotes(cells) {
  return cells.filter((cell) => !isKnown(cell.loss) && cell.diverged)
    .map((cell) => ({ x: String(cell.strength), y: cell.mlp, text: "diverged", showarrow: false, font: { size: 12 } }));
}

// Grey without decay, from cold to warm the stronger it is.
function strengthColor(strength, strengths) {
  const stops = darkMode.matches ? ["#6cb2ff", "#dd8fe0", "#ff8f5c"] : ["#1d63b8", "#8b3a8f", "#c2410c"];
  if (strength === 0) return darkMode.matches ? "#8d939d" : "#767b84";
  const positive = strengths.filter((other) => other > 0);
  return blend(stops, positive.indexOf(strength) / Math.max(1, positive.length - 1));
}

// One chart, or one per layer on the same scale.
chart("training-chart", ["part", "measure", "layer", "norm", "mlp", "trained", "shown", "spread"], (element) => {
  const cells = ofArm(Number(state.trained)).filter((cell) => cell.step.length);
  const strengths = cells.map((cell) => cell.strength);
  const isMeasure = state.shown === "measure";
  const each = isMeasure && state.spread === "each" && run.layers > 1;
  const layers = each ? Array.from({ length: run.layers }, (_, index) => index + 1) : [Number(state.layer || 0)];
  const columns = each ? Math.max(1, Math.min(layers.length, Math.floor(element.clientWidth / SMALL.width))) : 1;
  const rows = Math.ceil(layers.length / columns);
  element.style.height = each ? `${rows * (SMALL.height + SMALL.gap) + 60}px` : "";
  const traces = [];
  layers.forEach((layer, index) => {
    for (const cell of cells) {
      const y = isMeasure ? measured(cell.over, layer) : cell.curve[state.shown];
      if (!y || !y.some(isKnown)) continue;
      const name = `decay ${cell.strength}`;
      traces.push({ x: cell.step, y, mode: "lines", line: { color: strengthColor(cell.strength, strengths), width: 2.2 }, name, legendgroup: name, showlegend: index === 0,
        xaxis: `x${index ? index + 1 : ""}`, yaxis: `y${index ? index + 1 : ""}`, customdata: y.map((value) => (isKnown(value) ? digits(value) : "")), ...hoverText(element, name, "step") });
    }
  });
  training(element, traces, layers, columns, rows, each, isMeasure);
});

function training(element, traces, layers, columns, rows, each, isMeasure) {
  const yTitle = isMeasure ? yMeasure() : { title: { text: state.shown.replace("_", "ing "), standoff: 8 }, ...(state.shown === "accuracy" ? { tickformat: ".0%" } : {}) };
  const xTitle = { title: { text: "step", standoff: 6 }, hoverformat: "," };
  if (!each) {
    plot(element, traces, { showlegend: true, legend: LEGEND, margin: { l: 44, r: 20, t: 40, b: 40 }, annotations: noteUnless(traces.length), xaxis: xTitle, yaxis: yTitle });
    return;
  }
  const { grid, rule, muted } = theme();
  const style = { gridcolor: grid, linecolor: rule, tickcolor: rule, zeroline: false, automargin: true, fixedrange: coarsePointer, nticks: 5 };
  const height = element.clientHeight - 100;
  const [across, down] = [36 / element.clientWidth, SMALL.gap / height];
  const [wide, high] = [(1 - across * (columns - 1)) / columns, (1 - down * (rows - 1)) / rows];
  const more = {};
  const annotations = noteUnless(traces.length);
  layers.forEach((layer, index) => {
    const [column, row] = [index % columns, Math.floor(index / columns)];
    const [left, top] = [column * (wide + across), 1 - row * (high + down)];
    const number = index ? String(index + 1) : "";
    const { title, ...scale } = yTitle;
    more[`xaxis${number}`] = { ...style, domain: [left, Math.min(1, left + wide)], anchor: `y${number}`, hoverformat: ",", ...(index ? { matches: "x" } : {}) };
    more[`yaxis${number}`] = { ...style, ...scale, ...(column ? {} : { title: { text: run.measures[state.measure], standoff: 6 } }), domain: [Math.max(0, top - high), top], anchor: `x${number}`, ...(index ? { matches: "y" } : {}) };
    annotations.push({ text: `layer ${layer}`, showarrow: false, xref: "paper", yref: "paper", x: left, xanchor: "left", y: top, yanchor: "bottom", font: { size: 12, color: muted } });
  });
  plot(element, traces, { showlegend: true, legend: { ...LEGEND, y: 1 + 24 / height }, margin: { l: 44, r: 20, t: 60, b: 40 }, hovermode: "closest", annotations, ...more });
}

darkMode.addEventListener("change", () => { drawLegends(); changed("theme"); });
drawLegends();
watchCharts();
