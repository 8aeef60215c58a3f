// One set of charts per kind of matrix: a map of every head, the spectrum of one, and means through layers and training.

const LAST = run.labels.length - 1;
const FLOOR = 1e-7; // of the largest singular value
const mean = (values) => (values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null);
const known = (values) => values.filter((value) => value !== null);
const shown = (value) => (value === null || value === undefined ? "×" : digits(value));
const shortened = (text) => plainText(text.length > 22 ? `…${text.slice(-21)}` : text);

// From the first checkpoint, or layer, to the last: a colour that also darkens.
function ramp(share) {
  const style = getComputedStyle(document.documentElement);
  return blend([0, 1, 2].map((stop) => style.getPropertyValue(`--ramp-${stop}`).trim()), share);
}

function colourKeys() {
  for (const item of document.querySelectorAll("[data-ramp]")) item.style.borderColor = ramp(Number(item.dataset.ramp));
}

function draw(kind) {
  const name = (control) => `${control}:${kind.key}`;
  const names = (...controls) => controls.map(name);
  const measure = () => state[name("measure")];
  const report = () => Number(state[name("report")] ?? LAST);
  const layersOf = (index) => kind.reports[index];
  const find = (index, layer) => layersOf(index).find((item) => item.layer === layer);
  const heads = kind.heads;
  const numbers = [...new Set(kind.reports.flat().map((layer) => layer.layer))].sort((a, b) => a - b);

  // From the lowest to the highest of all checkpoints, so that a colour means the same in each, and never so close
  // together that the scatter of untrained heads looks like a difference.
  function range() {
    const all = kind.reports.flat().flatMap((layer) => [...known(layer.values[measure()]), layer.baseline[measure()]]);
    const high = Math.max(...all, 1e-30);
    return [Math.min(...all, 0.75 * high), high];
  }

  chart(`map-${kind.key}`, names("measure", "report", "layer", "head"), (element) => {
    const layers = numbers.map((number) => find(report(), number));
    const cells = layers.map((layer) => heads.map((head) => layer && layer.heads.indexOf(head)));
    const value = (row, column) => (cells[row][column] >= 0 ? layers[row].values[measure()][cells[row][column]] : undefined);
    const text = layers.map((layer, row) => heads.map((head, column) => (cells[row][column] >= 0
      ? `<b>${shown(value(row, column))}</b>, untrained ${shown(layer.baseline[measure()])}<br>layer ${layer.layer}, head ${head}<br>${plainText(layer.name)}`
      : "no such head")));
    const broken = { x: [], y: [] };
    numbers.forEach((number, row) => heads.forEach((head, column) => {
      if (value(row, column) !== null) return;
      broken.x.push(String(head));
      broken.y.push(String(number));
    }));
    const baselines = layers.filter(Boolean).map((layer) => layer.baseline[measure()]);
    const [low, high] = [Math.min(...baselines), Math.max(...baselines)].map(digits);
    document.getElementById(`untrained-${kind.key}`).textContent = baselines.length ? `untrained: ${low === high ? low : `${low} to ${high}`}` : "";

    const { text: ink } = theme();
    const accent = getComputedStyle(document.documentElement).getPropertyValue("--accent").trim();
    const [zmin, zmax] = range();
    const height = Math.max(Math.min(numbers.length * 80, 320), Math.min(numbers.length * 30, 420), numbers.length * 14) + 60;
    element.style.height = `${height}px`;
    const x = heads.map(String);
    const y = numbers.map(String);
    const [row, column] = [y.indexOf(state[name("layer")]), x.indexOf(state[name("head")])];
    const axis = { type: "category", showgrid: false, showspikes: false, fixedrange: true, ticks: "" };
    plot(element, [
      { type: "heatmap", x, y, z: layers.map((_, i) => heads.map((_, j) => value(i, j) ?? null)), customdata: text,
        zmin, zmax, colorscale: "Cividis", xgap: 1, ygap: 1, hovertemplate: "%{customdata}<extra></extra>",
        colorbar: { thickness: 10, outlinewidth: 0, len: 1, xpad: 6, nticks: 6 } },
      { ...broken, type: "scatter", mode: "text", text: broken.x.map(() => "×"), textfont: { size: 16, color: ink }, hoverinfo: "skip" },
    ], {
      height, hovermode: "closest", dragmode: false, margin: { l: 44, r: 10, t: 4, b: 40 },
      xaxis: { ...axis, title: { text: "head", standoff: 6 } },
      yaxis: { ...axis, autorange: "reversed", title: { text: "layer", standoff: 6 } },
      shapes: row < 0 || column < 0 ? [] : [{ type: "rect", x0: column - 0.5, x1: column + 0.5, y0: row - 0.5, y1: row + 0.5,
        line: { color: accent, width: 2.5 } }],
    });
    if (element.dataset.listens) return;
    element.dataset.listens = "yes";
    element.on("plotly_click", ({ points: [point] }) => {
      select(name("layer"), point.y);
      select(name("head"), point.x);
    });
  });

  chart(`spectrum-${kind.key}`, names("report", "layer", "head", "scale", "measure"), (element) => {
    const [number, head] = [Number(state[name("layer")]), Number(state[name("head")])];
    const log = state[name("scale")] === "log";
    const layer = find(report(), number);
    const traces = [];
    function add(values, label, line, opacity = 1) {
      if (!values) return;
      const shares = values.map((value) => value / (values[0] || 1));
      traces.push({ x: shares.map((_, i) => i + 1), y: log ? shares.map((value) => Math.max(value, FLOOR)) : shares, opacity, line,
        mode: "lines", customdata: shares.map((share, i) => `${digits(share)}  (${digits(values[i])})`),
        ...hoverText(element, plainText(label), "singular value") });
    }
    const column = (item) => (item ? item.heads.indexOf(head) : -1);
    if (layer) add(run.untrained[layer.untrained], "untrained", { color: theme().muted, width: 2, dash: "dash" });
    const order = run.labels.map((_, i) => i).sort((a, b) => (a === report()) - (b === report())); // the chosen one on top
    for (const i of order) {
      const item = find(i, number);
      const chosen = i === report();
      const values = item && item.spectra && column(item) >= 0 ? item.spectra[column(item)] : null;
      add(values, run.labels[i], { color: ramp(LAST ? i / LAST : 1), width: chosen ? 2.8 : 1.4 }, chosen ? 1 : 0.6);
    }
    const at = column(layer);
    const words = at < 0 ? "no such head" : layer.spectra === null ? "its singular values are not in the page"
      : layer.spectra[at] === null ? "not finite"
      : `${kind.measures[measure()]} ${shown(layer.values[measure()][at])}, untrained ${shown(layer.baseline[measure()])}`;
    document.getElementById(`cell-${kind.key}`).textContent = `Layer ${number}, head ${head}: ${words}. ${layer ? layer.name : ""}`;
    const lowest = Math.min(1, ...traces.flatMap((trace) => trace.y));
    plot(element, traces, {
      xaxis: { title: { text: "index", standoff: 6 }, unifiedhovertitle: { text: "singular value %{x}" } },
      yaxis: { title: { text: "σ / σ₁", standoff: 8 }, autorange: false, ...(log
        ? { type: "log", range: [Math.log10(lowest) - 0.1, 0.08], exponentformat: "power", ...(lowest < 0.05 ? { dtick: 1 } : {}) }
        : { type: "linear", range: [-0.02, 1.04] }) },
    });
  });

  const averages = (index) => numbers.map((number) => {
    const layer = find(index, number);
    const values = layer ? known(layer.values[measure()]) : [];
    return { mean: mean(values), low: values.length ? Math.min(...values) : null, high: values.length ? Math.max(...values) : null };
  });
  const markers = (count) => (count <= 48 ? "lines+markers" : "lines");

  chart(`profile-${kind.key}`, names("measure", "report"), (element) => {
    const band = averages(report());
    const colour = (i) => ramp(LAST ? i / LAST : 1);
    const edge = { x: numbers, mode: "lines", line: { width: 0 }, hoverinfo: "skip" };
    const filled = colour(report()).replace("rgb(", "rgba(").replace(")", ", 0.14)");
    const baseline = numbers.map((number) => find(report(), number)?.baseline[measure()] ?? null);
    plot(element, [
      { ...edge, y: band.map((item) => item.low) },
      { ...edge, y: band.map((item) => item.high), fill: "tonexty", fillcolor: filled },
      { x: numbers, y: baseline, mode: numbers.length > 1 ? "lines" : "markers", customdata: baseline.map(shown),
        line: { color: theme().muted, width: 2, dash: "dash" }, ...hoverText(element, "untrained", "layer") },
      ...run.labels.map((label, i) => {
        const items = averages(i);
        return { x: numbers, y: items.map((item) => item.mean), mode: markers(numbers.length),
          line: { color: colour(i), width: i === report() ? 2.8 : 1.6 }, marker: { size: i === report() ? 7 : 5 },
          customdata: items.map((item) => `${shown(item.mean)}  (${shown(item.low)} to ${shown(item.high)})`),
          ...hoverText(element, shortened(label), "layer") };
      }),
    ], {
      xaxis: { title: { text: "layer", standoff: 6 }, dtick: Math.ceil(numbers.length / 16), unifiedhovertitle: { text: "layer %{x}" } },
      yaxis: { title: { text: plainText(kind.measures[measure()]), standoff: 8 }, rangemode: "tozero" },
    });
  });

  chart(`trajectory-${kind.key}`, names("measure"), (element) => {
    const steps = run.labels.map((_, i) => i);
    const every = steps.map(averages);
    plot(element, numbers.map((number, row) => ({
      x: steps, y: every.map((items) => items[row].mean), mode: markers(steps.length),
      line: { color: ramp(numbers.length > 1 ? row / (numbers.length - 1) : 1), width: 2 },
      name: `layer ${number}`, customdata: every.map((items, i) => `${plainText(run.labels[i])}: ${shown(items[row].mean)}`),
      hovertemplate: `<b>layer ${number}</b><br>%{customdata}<extra></extra>`,
    })), {
      hovermode: "closest", margin: { l: 44, r: 40, t: 10, b: 40 },
      xaxis: { tickvals: steps, ticktext: run.labels.map(shortened), range: [-0.15, LAST + 0.15] },
      yaxis: { title: { text: plainText(kind.measures[measure()]), standoff: 8 }, rangemode: "tozero" },
    });
  });

  // Pairs of numbers that are equal at balance: on the diagonal. Logarithmic, so that a share of a large number and of
  // a small one are as far from it; what is 0 is at the edge.
  function diagonal(id, x, y, points, untrained) {
    chart(id, names("report"), (element) => {
      const items = numbers.map((number) => find(report(), number)).filter((layer) => layer && layer.norms);
      const own = items.flatMap((layer) => points(layer).map((point) => ({ ...point, layer: layer.layer })));
      const grey = [...new Set(items.map((layer) => layer.untrained_pairs))].flatMap((i) => untrained(run.untrained_pairs[i]));
      const finite = (some) => some.filter((point) => point.x !== null && point.y !== null);
      const all = finite([...own, ...grey]);
      const high = Math.max(...all.flatMap((point) => [point.x, point.y]), 1e-30);
      const low = Math.max(Math.min(...all.flatMap((point) => [point.x, point.y]).filter((value) => value > 0), high), 1e-6 * high);
      const range = [Math.log10(low) - 0.08, Math.log10(high) + 0.08];
      const trace = (some, marker, label) => ({
        x: some.map((point) => Math.max(point.x, 10 ** range[0])), y: some.map((point) => Math.max(point.y, 10 ** range[0])),
        mode: "markers", marker, customdata: some.map((point) => `<b>${label(point)}</b><br>${plainText(x)} ${digits(point.x)}<br>${plainText(y)} ${digits(point.y)}`),
        hovertemplate: "%{customdata}<extra></extra>",
      });
      const place = (layer) => (numbers.length > 1 ? numbers.indexOf(layer) / (numbers.length - 1) : 1);
      const ends = range.map((value) => 10 ** value);
      plot(element, [
        { x: ends, y: ends, mode: "lines", line: { color: theme().muted, width: 1 }, hoverinfo: "skip" },
        { ...trace(finite(own), { size: 6, opacity: 0.75, color: finite(own).map((point) => ramp(place(point.layer))) },
          (point) => `layer ${point.layer}, ${point.what}`), name: "trained" },
        { ...trace(finite(grey), { size: 6, symbol: "circle-open", color: theme().muted }, () => "untrained"), name: "untrained" },
      ], {
        hovermode: "closest",
        xaxis: { type: "log", range, title: { text: x, standoff: 6 }, showspikes: false },
        yaxis: { type: "log", range, title: { text: y, standoff: 8 }, showspikes: false },
      });
    });
  }

  if (kind.factors) {
    const [first, second] = kind.factors;
    const norms = ([xs, ys], head) => xs.map((value, i) => ({ x: value, y: ys[i], what: `head ${head}, row ${i}` }));
    diagonal(`norms-${kind.key}`, `‖row of ${first}‖²`, `‖its partner in ${second}‖²`,
      (layer) => norms(layer.norms, layer.heads[0]), (pairs) => norms(pairs));
    diagonal(`bounds-${kind.key}`, "bound: mean squared norm of the factors", "nuclear norm",
      (layer) => layer.bounds.map(([mean, nuclear], i) => ({ x: mean, y: nuclear, what: `head ${layer.heads[i]}` })),
      ([, , [mean, nuclear]]) => [{ x: mean, y: nuclear }]);
  }

  // Begin at the head the words name: that of the lowest pseudo rank in the last checkpoint.
  const cells = layersOf(LAST).flatMap((layer) => layer.heads.map((head, i) => [layer.values.pseudo_rank[i], layer.layer, head]));
  const [lowest] = cells.filter(([value]) => value !== null).sort((a, b) => a[0] - b[0] || a[1] - b[1] || a[2] - b[2]);
  if (lowest) {
    select(name("layer"), lowest[1]);
    select(name("head"), lowest[2]);
  }
}

run.kinds.forEach(draw);
colourKeys();
darkMode.addEventListener("change", () => { colourKeys(); changed("theme"); });
watchCharts();
