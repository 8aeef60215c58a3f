// Draws every chart of the page from its description (lab/report/chart.py): the lines of the chosen options, in the
// colours of their arms.

const MARKS = {
  line: {},
  thin: { width: 1 },
  dashed: { width: 1.4, dash: "dash" },
  dotted: { width: 1.6, dash: "dot" },
};
const COLD_TO_WARM = {
  light: ["#767b84", "#1d63b8", "#8b3a8f", "#c2410c"],
  dark: ["#8d939d", "#6cb2ff", "#dd8fe0", "#ff8f5c"],
};
const ZERO_GAP = 0.7; // of decades: how far left of the least positive value the place of 0 is
const FEWEST_TICKS = 3; // times the least value, from which on, and
const FEW_DECADES = 1000; // up to which, a logarithmic axis has the ticks below
const TICKS = [1, 1.5, 2, 3, 5, 7];
const BAND = 0.12; // opacity of a band

const isKnown = (value) => value !== null && value !== undefined;
const isAt = (spec, line) =>
  Object.entries(line.where || {}).every(([name, value]) => (state[name] ?? spec.fixed[name]) === value);
const isShown = (line) => line.arm === undefined || !state.hidden.has(line.arm);

function lineColor(line) {
  if (line.shade !== undefined) return blend(COLD_TO_WARM[darkMode.matches ? "dark" : "light"], line.shade);
  return line.arm === undefined ? theme().muted : armColor(line.arm);
}

function translucent(color, opacity) {
  const parts = color.startsWith("#") ? color.match(/\w\w/g).map((part) => parseInt(part, 16)) : color.match(/\d+/g);
  return `rgba(${parts.join(",")},${opacity})`;
}

// Places on an axis of decades that has one for 0.
function decades(lines) {
  const values = [...new Set(lines.flatMap((line) => run.places[line.x]).filter(isKnown))].sort((a, b) => a - b);
  const positive = values.filter((value) => value > 0).map(Math.log10);
  const zero = positive.length ? positive[0] - ZERO_GAP : 0;
  const place = (value) => (value > 0 ? Math.log10(value) : zero);
  const ends = [place(values[0] ?? 0), place(values.at(-1) ?? 0)];
  const margin = Math.max(0.15, 0.04 * (ends[1] - ends[0]));
  return {
    place,
    gap: values[0] === 0 && positive.length ? zero + ZERO_GAP / 2 : null,
    axis: { tickvals: values.map(place), ticktext: values.map(String), range: [ends[0] - margin, ends[1] + margin] },
  };
}

function plotlyAxis(axis, standoff) {
  const made = { title: { text: plainText(axis.title), standoff } };
  if (axis.scale === "log") Object.assign(made, { type: "log", exponentformat: "power" });
  if (axis.limits) made.range = axis.scale === "log" ? axis.limits.map(Math.log10) : axis.limits;
  else if (axis.from_zero) made.rangemode = "tozero";
  if (axis.percent) made.tickformat = ".0%";
  return made;
}

// Ticks of a logarithmic axis that are numbers, where powers of ten would be too few.
function fewDecades(lines) {
  const values = lines
    .flatMap((line) => [...line.y, ...(line.low || []), ...(line.high || [])])
    .filter((value) => value > 0);
  const low = values.reduce((a, b) => Math.min(a, b), Infinity);
  const high = values.reduce((a, b) => Math.max(a, b), 0);
  if (!(high > FEWEST_TICKS * low && high < FEW_DECADES * low)) return {};
  const [first, last] = [low, high].map((value) => Math.floor(Math.log10(value)));
  const powers = Array.from({ length: last - first + 2 }, (_, index) => first + index);
  const tickvals = powers.flatMap((power) => TICKS.map((tick) => Number(`${tick}e${power}`)));
  return { tickvals, ticktext: tickvals.map(String) };
}

function valueWords(line, index, percent) {
  if (line.words) return plainText(line.words[index]);
  const said = (value) => (isKnown(value) ? (percent ? `${digits(100 * value)} %` : digits(value)) : "");
  if (!line.low || !isKnown(line.low[index]) || line.low[index] === line.high[index]) return said(line.y[index]);
  return `${said(line.y[index])}  (${said(line.low[index])} to ${said(line.high[index])})`;
}

// Of a chart of points each says where it is; elsewhere all lines at the pointer's place share a box.
function lineHover(element, name, along, hasPoints) {
  if (!hasPoints) return hoverText(element, name, along);
  return { name, meta: name, hovertemplate: `<b>%{meta}</b><br>${along} %{hovertext}<br>%{customdata}<extra></extra>` };
}

function lineTraces(element, spec, line, place, xaxis, yaxis) {
  const color = lineColor(line);
  const x = run.places[line.x].map((value) => (isKnown(value) ? place(value) : null));
  const known = (value) => (isKnown(value) && !(yaxis.scale === "log" && value <= 0) ? value : null);
  const hasPoints = line.mark.includes("points");
  const isMain = hasPoints || line.mark === "line";
  const look = line.arm === undefined || line.shade !== undefined ? {} : { dash: run.arms[line.arm].dash };
  const trace = {
    x,
    y: line.y.map(known),
    mode: ({ points: "markers", "line+points": "lines+markers" }[line.mark] || "lines") + (line.tags ? "+text" : ""),
    text: (line.tags || []).map(plainText),
    textposition: "top right",
    textfont: { color: theme().text, size: 11.5 },
    hovertext: run.places[line.x].map((value) => (isKnown(value) ? digits(value) : "")),
    line: { color, width: 2.4, ...look, ...MARKS[line.mark] },
    marker: { color, size: 8 },
    opacity: line.mark === "thin" ? 0.4 : 1,
    legendgroup: line.label,
    showlegend: isMain && (line.arm === undefined || line.shade !== undefined),
    customdata: line.y.map((_, index) => valueWords(line, index, yaxis.percent)),
    ...(isMain || line.words
      ? lineHover(element, plainText(line.label), plainText(xaxis.title), hasPoints)
      : { hoverinfo: "skip" }),
  };
  if (!line.low) return [trace];
  if (hasPoints) {
    const reach = (ends, sign) => ends.map((end, index) => (isKnown(end) ? sign * (end - line.y[index]) : 0));
    const [array, arrayminus] = [reach(line.high, 1), reach(line.low, -1)];
    return [
      { ...trace, error_y: { type: "data", symmetric: false, array, arrayminus, color, thickness: 1.4, width: 4 } },
    ];
  }
  const [low, high] = [line.low.map(known), line.high.map(known)];
  const both = x.map((_, index) => index).filter((index) => isKnown(low[index]) && isKnown(high[index]));
  const back = [...both].reverse();
  const band = {
    x: [...both, ...back].map((index) => x[index]),
    y: [...both.map((index) => high[index]), ...back.map((index) => low[index])],
    mode: "lines",
    fill: "toself",
    fillcolor: translucent(color, BAND),
    line: { width: 0 },
    showlegend: false,
    legendgroup: line.label,
    hoverinfo: "skip",
  };
  return [band, trace];
}

function drawChart(element, spec) {
  const lines = spec.lines.filter((line) => isAt(spec, line) && isShown(line));
  const axis = (axes, by) => (by ? axes[state[by] ?? spec.fixed[by]] : axes);
  const [xaxis, yaxis] = [axis(spec.x, spec.x_by), axis(spec.y, spec.y_by)];
  const places = xaxis.scale === "symlog" ? decades(spec.lines.filter((line) => isAt(spec, line))) : null;
  const traces = lines.flatMap((line) =>
    lineTraces(element, spec, line, places ? places.place : (value) => value, xaxis, yaxis),
  );
  traces.sort((a, b) => (b.fill ? 1 : 0) - (a.fill ? 1 : 0)); // bands first, so that no line is under one
  const note = { text: plainText(spec.empty), showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5 };
  const named = traces.filter((trace) => trace.showlegend).length > 1;
  const broken = {
    type: "line",
    xref: "x",
    yref: "paper",
    y0: 0,
    y1: 1,
    line: { color: theme().muted, width: 1, dash: "dot" },
  };
  plot(element, traces, {
    annotations: traces.length ? [] : [note],
    shapes: places && places.gap !== null ? [{ ...broken, x0: places.gap, x1: places.gap }] : [],
    hovermode: lines.some((line) => line.mark.includes("points"))
      ? "closest"
      : isWide(element)
        ? "x unified"
        : "closest",
    showlegend: named,
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 12.5 } },
    margin: { l: 44, r: 20, t: named ? 40 : 10, b: 40 },
    xaxis: {
      ...plotlyAxis(xaxis, 6),
      hoverformat: xaxis.scale === "log" ? ",.4~g" : ",",
      unifiedhovertitle: { text: `${plainText(xaxis.title)} %{x}` },
      ...(places ? { ...places.axis, showgrid: false } : {}),
    },
    yaxis: { ...plotlyAxis(yaxis, 8), ...(yaxis.scale === "log" ? fewDecades(lines) : {}) },
  });
}

for (const spec of run.charts) chart(`${spec.id}-chart`, spec.choices, (element) => drawChart(element, spec));
