// The charts of attention against its SVMs, all over the margin, and the pictures in two dimensions.

const isKnown = (value) => value !== null && value !== undefined;
const NORM_WORDS = { nuclear: "nuclear SVM", frobenius: "Frobenius SVM", "ℓ1": "ℓ1 solution", "ℓ2": "ℓ2 solution" };
const MARGIN_AXIS = { type: "log", exponentformat: "power", dtick: 1, title: { text: "margin", standoff: 6 }, hoverformat: ".2g", unifiedhovertitle: { text: "margin %{x}" } };
const tint = (color, share) => `rgba(${color.match(/\w\w/g).map((part) => parseInt(part, 16)).join(",")},${share})`;
const note = (text) => [{ text, showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5, font: { size: 13 } }];

// Powers of ten apart by what leaves about eight of them.
function marginAxis(margins) {
  const known = margins.filter((margin) => margin > 0).map(Math.log10);
  if (!known.length) return { ...MARGIN_AXIS };
  const [low, high] = known.reduce(([a, b], value) => [Math.min(a, value), Math.max(b, value)], [Infinity, -Infinity]);
  return { ...MARGIN_AXIS, dtick: Math.max(1, Math.ceil((high - low) / 8)), range: [low - 0.2, high + 0.3] };
}

function band(x, low, high, color) {
  const at = x.map((_, index) => index).filter((index) => low[index] > 0 && high[index] > 0);
  const back = [...at].reverse();
  return { x: [...at, ...back].map((index) => x[index]), y: [...at.map((index) => high[index]), ...back.map((index) => low[index])],
    mode: "lines", fill: "toself", fillcolor: tint(color, 0.1), line: { width: 0 }, hoverinfo: "skip" };
}

// One arm: the curve of a data set, or the mean and range of all with a dot at the end.
function armTraces(element, arm, measure) {
  const item = run.arms[arm];
  const color = armColor(arm);
  const line = { mode: "lines", line: { color, width: 2.4, dash: item.dash }, ...hoverText(element, plainText(item.label), "margin") };
  const dot = { mode: "markers", marker: { color, size: 8 }, hoverinfo: "skip" };
  if (state.set !== "mean") {
    const one = item.each[state.set];
    if (!one || !one.margin.length) return [];
    return [{ ...line, x: one.margin, y: one[measure], customdata: one[measure].map(worded) },
      { ...dot, x: [one.margin.at(-1)], y: [one[measure].at(-1)] }];
  }
  const { margin, sets } = item.mean;
  const traces = [];
  if (margin.length) {
    const { mean, low, high } = item.mean[measure];
    traces.push(band(margin, low, high, color));
    traces.push({ ...line, x: margin, y: mean, customdata: mean.map((value, index) => `${worded(value)}  (${worded(low[index])} to ${worded(high[index])}, ${sets[index]} sets)`) });
  }
  if (item.end.margin > 0 && isKnown(item.end[measure])) {
    const [x, y] = [[item.end.margin], [item.end[measure]]];
    if (margin.length) traces.push({ x: [margin.at(-1), ...x], y: [item.mean[measure].mean.at(-1), ...y], mode: "lines", line: { color, width: 1.2 }, hoverinfo: "skip" });
    traces.push({ ...dot, x, y, hoverinfo: "text", hovertext: `<b>${plainText(item.label)}</b><br>end: ${worded(y[0])}` });
  }
  return traces;
}

const inShort = (margin) => (margin < 1e4 ? digits(margin) : margin.toExponential(1).replace("e+", "e"));
const worded = (value) => (isKnown(value) ? digits(value) : "");

function marginChart(id, measure, yaxis) {
  chart(id, ["set"], (element) => {
    const traces = visibleArms().flatMap((arm) => armTraces(element, arm, measure));
    const annotations = traces.length ? [] : note("No arm shown has a margin in this data set.");
    // bands first, so that no line is under one
    traces.sort((a, b) => (b.fill ? 1 : 0) - (a.fill ? 1 : 0));
    plot(element, traces, { hovermode: "closest", annotations, xaxis: marginAxis(traces.flatMap((trace) => trace.x)), yaxis });
  });
}

const POWERS = { type: "log", exponentformat: "power", dtick: 1 };
marginChart("cosine-nuclear-chart", "cosine_nuclear", { title: { text: "cosine", standoff: 8 } });
marginChart("cosine-frobenius-chart", "cosine_frobenius", { title: { text: "cosine", standoff: 8 } });
marginChart("nuclear-excess-chart", "nuclear_excess", { ...POWERS, title: { text: "above the least", standoff: 8 } });
marginChart("frobenius-excess-chart", "frobenius_excess", { ...POWERS, title: { text: "above the least", standoff: 8 } });

chart("spectra-chart", ["set", "spectrum", "svm", "axis"], (element) => {
  const item = run.arms[Number(state.spectrum)];
  const of = state.set === "mean" ? item.mean : item.each[state.set];
  const { margin, singular_values: values } = of && of.margin.length ? of : { margin: [], singular_values: [] };
  const { background, muted } = theme();
  const color = armColor(Number(state.spectrum));
  const traces = [];
  const hues = darkMode.matches ? [color, "#5a606b"] : [color, "#c3c1ba"];
  values.forEach((value, index) => {
    const shade = blend(hues, index / Math.max(1, values.length - 1));
    const y = state.set === "mean" ? value.mean : value;
    const range = state.set === "mean" ? (at) => `  (${worded(value.low[at])} to ${worded(value.high[at])})` : () => "";
    traces.push({ x: margin, y: y.map((size) => (size > 1e-12 ? size : null)), mode: "lines", line: { color: shade, width: 2.2 },
      ...hoverText(element, `σ${index + 1}`, "margin"), customdata: y.map((size, at) => worded(size) + range(at)) });
  });
  const solution = (item.solutions[state.svm] || {})[state.set] || [];
  const ends = margin.length ? [margin[0], margin.at(-1)] : [];
  for (const size of margin.length ? solution.filter((value) => value > 1e-5 * solution[0]) : []) {
    traces.push({ x: ends, y: [size, size], mode: "lines", line: { color: muted, width: 1.4, dash: "dash" }, hoverinfo: "skip" });
  }
  const yaxis = state.axis === "log" ? { ...POWERS } : { rangemode: "tozero" };
  plot(element, traces, { hovermode: "closest", annotations: margin.length ? [] : note("This arm has no margin in this data set."),
    hoverlabel: { bgcolor: background }, xaxis: marginAxis(margin), yaxis: { ...yaxis, title: { text: "σ per unit of margin", standoff: 8 } } });
});

// --- the pictures ---

const R = 104; // of the circle that the arrow reaches at the end
const INSIDE = 84; // what the longest token or query is drawn as

const shape = (name, attributes, children = []) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
};
const polar = (angle, radius) => [radius * Math.cos(angle), -radius * Math.sin(angle)];
const written = (points) => points.map(([x, y]) => `${x.toFixed(2)} ${y.toFixed(2)}`).join(" L");
const apart = (a, b) => Math.abs(Math.atan2(Math.sin(a - b), Math.cos(a - b))) * (180 / Math.PI);

function arrow(tip, angle, color, width, name) {
  const [x, y] = tip;
  const head = [2.6, -2.6].map((turn) => [x + 4.5 * width * Math.cos(angle + turn), y - 4.5 * width * Math.sin(angle + turn)]);
  return shape("g", { class: name, fill: color, stroke: color, "stroke-linejoin": "round", "stroke-linecap": "round" }, [
    shape("line", { x1: 0, y1: 0, x2: x, y2: y, "stroke-width": width }),
    shape("path", { d: `M${written([tip, ...head])} Z`, "stroke-width": width / 2 }),
  ]);
}

function picture(example, number, course, moment, color, norms) {
  const { text, muted, rule, background } = theme();
  const longest = Math.max(...[...example.tokens, example.query].map(([x, y]) => Math.hypot(x, y))) || 1;
  const place = ([x, y]) => [(x * INSIDE) / longest, (-y * INSIDE) / longest];
  const radius = (at) => R * (0.25 + (0.75 * at) / Math.max(1, course.step.length - 1));
  const angle = course.angles[moment][number];
  const points = course.angles.map((row, at) => [row[number], at]).filter(([direction]) => isKnown(direction));
  const path = (kept) => `M${written(points.filter(([, at]) => kept(at)).map(([direction, at]) => polar(direction, radius(at))))}`;
  const parts = [shape("circle", { r: R, fill: "none", stroke: rule })];
  const toQuery = place(example.query);
  parts.push(arrow(toQuery, Math.atan2(-toQuery[1], toQuery[0]), muted, 1.1, "query"));
  [["nuclear", "7 4"], ["frobenius", "1.5 4"]].forEach(([norm, dash]) => {
    const target = course[norm] && course[norm][number];
    if (!isKnown(target)) return;
    const [x, y] = polar(target, R);
    parts.push(shape("line", { class: `target ${norm}`, x1: 0, y1: 0, x2: x, y2: y, stroke: text, "stroke-width": 1.5, "stroke-dasharray": dash, "stroke-linecap": "round" }));
  });
  const chosen = place(example.tokens[course.selected[number]]);
  if (isKnown(angle)) {
    const [ux, uy] = polar(angle, 1);
    const along = chosen[0] * ux + chosen[1] * uy;
    const half = Math.sqrt(Math.max(0, R * R - along * along));
    parts.push(shape("line", { class: "support", x1: along * ux - half * uy, y1: along * uy + half * ux, x2: along * ux + half * uy, y2: along * uy - half * ux, stroke: color, "stroke-width": 1, "stroke-opacity": 0.7 }));
  }
  if (points.length) {
    parts.push(shape("path", { class: "course", d: path(() => true), fill: "none", stroke: color, "stroke-width": 1.6, "stroke-opacity": 0.3 }));
    if (points.some(([, at]) => at <= moment)) parts.push(shape("path", { d: path((at) => at <= moment), fill: "none", stroke: color, "stroke-width": 2.2, "stroke-opacity": 0.75 }));
  }
  if (isKnown(angle)) parts.push(arrow(polar(angle, radius(moment)), angle, color, 3, "direction"));
  example.tokens.forEach((token, index) => {
    const [x, y] = place(token);
    parts.push(shape("circle", { class: "token", cx: x, cy: y, r: 5, fill: index === example.optimal ? text : background, stroke: text, "stroke-width": 1.6 }));
  });
  parts.push(shape("circle", { class: "selected", cx: chosen[0], cy: chosen[1], r: 9.5, fill: "none", stroke: color, "stroke-width": 2.4 }));
  const words = !isKnown(angle) ? "W z is zero: it has no direction" : ["nuclear", "frobenius"].map((norm, index) => [course[norm], norms[index]])
    .filter(([targets]) => targets && isKnown(targets[number]))
    .map(([targets, norm]) => `${apart(angle, targets[number]).toFixed(1)}° from the ${NORM_WORDS[norm]}`).join(", ") || "no SVM: its tokens are not selected or not separable";
  const figure = document.createElement("figure");
  const caption = document.createElement("figcaption");
  const small = document.createElement("small");
  small.textContent = words;
  caption.append(`Example ${number + 1}`, small);
  figure.append(caption, shape("svg", { viewBox: "-112 -112 224 224", role: "img", "aria-label": `Example ${number + 1}: the direction of W z is ${words}` }, parts));
  return figure;
}

const courseNow = () => run.pictures && run.pictures.arms[Number(state.pictured)] && run.pictures.arms[Number(state.pictured)][state.planar];

chart("pictures", ["pictured", "planar", "moment"], (element) => {
  const course = courseNow();
  const output = document.getElementById("moment-output");
  if (!course) {
    element.replaceChildren("This arm did not take part in this data set.");
    output.textContent = "";
    return;
  }
  const margin = course.margin[state.moment];
  output.textContent = `step ${course.step[state.moment].toLocaleString("en")}, margin ${margin > 0 ? inShort(margin) : "not yet"}`;
  const arm = Number(state.pictured);
  element.replaceChildren(...run.pictures.sets[state.planar].map((example, number) => picture(example, number, course, state.moment, armColor(arm), run.arms[arm].norms)));
});

function startPictures() {
  const slider = document.getElementById("moment");
  const restart = () => { // another arm or data set is shown at its end
    const course = courseNow();
    state.moment = course ? course.step.length - 1 : 0;
    slider.disabled = !course;
    slider.max = state.moment;
    slider.value = state.moment;
  };
  for (const name of ["pictured", "planar"]) {
    document.querySelector(`select[data-state="${name}"]`).addEventListener("change", () => { restart(); changed("moment"); });
  }
  slider.addEventListener("input", () => { state.moment = Number(slider.value); changed("moment"); });
  restart();
}

startPictures();
darkMode.addEventListener("change", () => { drawLegends(); changed("theme"); });
drawLegends();
watchCharts();
