// One set of charts per kind of matrix: a map of every head, the spectrum of one, and means through layers and training.

const LAST = run.labels.length - 1;
const FLOOR = 1e-7; // of the largest singular value
const mean = (values) => (values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null);
const known = (values) => values.filter((value) => value !== null);
const shown = (value) => (value === null || value === undefined ? "×" : digits(value));
const shortened = (text) => (text.length > 22 ? `…${text.slice(-21)}` : text);
const categories = (names) => names.map((name, i) => [i, name]);

// From 0, or below it, to a little above the largest of some numbers that may be missing.
function fromZero(values) {
  const all = known(values);
  const [low, high] = [Math.min(0, ...all), Math.max(...all, 1e-30)];
  return [low < 0 ? low - 0.06 * (high - low) : 0, high + 0.06 * (high - low)];
}

// From the first checkpoint, or layer, to the last: a colour that also darkens.
function ramp(share) {
  const style = getComputedStyle(document.documentElement);
  return blend(
    [0, 1, 2].map((stop) => style.getPropertyValue(`--ramp-${stop}`).trim()),
    share,
  );
}

function colourKeys() {
  for (const item of document.querySelectorAll("[data-ramp]")) item.style.borderColor = ramp(Number(item.dataset.ramp));
}

const padded = (low, high) => [low - 0.04 * (high - low || 1), high + 0.04 * (high - low || 1)];

function draw(kind) {
  const name = (control) => `${control}:${kind.key}`;
  const names = (...controls) => controls.map(name);
  const measure = () => state[name("measure")];
  const report = () => Number(state[name("report")] ?? LAST);
  const layersOf = (index) => kind.reports[index];
  const find = (index, layer) => layersOf(index).find((item) => item.layer === layer);
  const heads = kind.heads;
  const numbers = [...new Set(kind.reports.flat().map((layer) => layer.layer))].sort((a, b) => a - b);
  const labels = new Map(kind.reports.flat().map((layer) => [layer.layer, layer.label]));
  const called = (number) => labels.get(number) ?? number;
  const towers = [...labels].some(([number, label]) => String(number) !== label); // places in an order, not numbers

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
    const there = (row, column) => cells[row][column] >= 0;
    const value = (row, column) => (there(row, column) ? layers[row].values[measure()][cells[row][column]] : undefined);
    const words = layers.map((layer, row) =>
      heads.map((head, column) =>
        there(row, column)
          ? [
              `${shown(value(row, column))}, untrained ${shown(layer.baseline[measure()])}`,
              `layer ${layer.label}, head ${head}`,
              layer.name,
            ]
          : ["no such head"],
      ),
    );
    const broken = { x: [], y: [] };
    numbers.forEach((_, row) =>
      heads.forEach((head, column) => {
        if (value(row, column) !== null) return;
        broken.x.push(column);
        broken.y.push(row);
      }),
    );
    const baselines = layers.filter(Boolean).map((layer) => layer.baseline[measure()]);
    const [low, high] = [Math.min(...baselines), Math.max(...baselines)].map(digits);
    document.getElementById(`untrained-${kind.key}`).textContent = baselines.length
      ? `untrained: ${low === high ? low : `${low} to ${high}`}`
      : "";

    const count = numbers.length;
    const height = Math.max(Math.min(count * 80, 320), Math.min(count * 30, 420), count * 14) + 60;
    element.style.height = `${height}px`;
    const row = numbers.indexOf(Number(state[name("layer")]));
    const column = heads.indexOf(Number(state[name("head")]));
    figure(element, {
      height,
      right: 4,
      x: { type: "linear", range: [-0.5, heads.length - 0.5], ticks: categories(heads.map(String)), title: "head" },
      y: {
        type: "linear",
        range: [count - 0.5, -0.5],
        ticks: categories(numbers.map(called).map(String)),
        title: "layer",
      },
      cells: {
        values: layers.map((_, i) => heads.map((_, j) => value(i, j))),
        words,
        range: range(),
        chosen: row < 0 || column < 0 ? null : [row, column],
      },
      series: [{ type: "signs", ...broken }],
      pick: (x, y) => {
        select(name("layer"), numbers[y]);
        select(name("head"), heads[x]);
      },
    });
  });

  chart(`spectrum-${kind.key}`, names("report", "layer", "head", "scale", "measure"), (element) => {
    const [number, head] = [Number(state[name("layer")]), Number(state[name("head")])];
    const log = state[name("scale")] === "log";
    const layer = find(report(), number);
    const series = [];
    function add(values, label, look) {
      if (!values) return;
      const shares = values.map((value) => value / (values[0] || 1));
      series.push({
        type: "line",
        name: label,
        x: shares.map((_, i) => i + 1),
        y: log ? shares.map((value) => Math.max(value, FLOOR)) : shares,
        words: shares.map((share, i) => `${digits(share)}  (${digits(values[i])})`),
        ...look,
      });
    }
    const column = (item) => (item ? item.heads.indexOf(head) : -1);
    if (layer) add(run.untrained[layer.untrained], "untrained", { color: theme().muted, dash: "dash" });
    const order = run.labels.map((_, i) => i).sort((a, b) => (a === report()) - (b === report())); // the chosen one on top
    for (const i of order) {
      const item = find(i, number);
      const chosen = i === report();
      const values = item && item.spectra && column(item) >= 0 ? item.spectra[column(item)] : null;
      const look = chosen ? { width: 2.8 } : { width: 1.4, opacity: 0.6 };
      add(values, run.labels[i], { color: ramp(LAST ? i / LAST : 1), ...look });
    }
    const at = column(layer);
    const said =
      at < 0
        ? "no such head"
        : layer.spectra === null
          ? "its singular values are not in the page"
          : layer.spectra[at] === null
            ? "not finite"
            : `${kind.measures[measure()]} ${shown(layer.values[measure()][at])}, untrained ${shown(layer.baseline[measure()])}`;
    document.getElementById(`cell-${kind.key}`).textContent =
      `Layer ${called(number)}, head ${head}: ${said}. ${layer ? layer.name : ""}`;
    const lowest = Math.min(1, ...series.flatMap((item) => item.y));
    const longest = Math.max(2, ...series.map((item) => item.x.length));
    figure(element, {
      series,
      unified: (index) => `singular value ${index}`,
      x: { type: "linear", range: padded(1, longest), whole: true, title: "index" },
      y: {
        title: "σ / σ₁",
        ...(log ? { type: "log", range: [0.8 * lowest, 1.2] } : { type: "linear", range: [-0.02, 1.04] }),
      },
    });
  });

  const averages = (index) =>
    numbers.map((number) => {
      const layer = find(index, number);
      const values = layer ? known(layer.values[measure()]) : [];
      return {
        mean: mean(values),
        low: values.length ? Math.min(...values) : null,
        high: values.length ? Math.max(...values) : null,
      };
    });
  const dotted = (count) => count <= 48;

  chart(`profile-${kind.key}`, names("measure", "report"), (element) => {
    const band = averages(report());
    const colour = (i) => ramp(LAST ? i / LAST : 1);
    const baseline = numbers.map((number) => find(report(), number)?.baseline[measure()] ?? null);
    const [low, high] = [band.map((item) => item.low), band.map((item) => item.high)];
    const lines = run.labels.map((label, i) => {
      const items = averages(i);
      return {
        type: "line",
        name: shortened(label),
        x: numbers,
        y: items.map((item) => item.mean),
        color: colour(i),
        width: i === report() ? 2.8 : 1.6,
        dots: dotted(numbers.length),
        size: i === report() ? 7 : 5,
        words: items.map((item) => `${shown(item.mean)}  (${shown(item.low)} to ${shown(item.high)})`),
      };
    });
    figure(element, {
      series: [
        { type: "band", x: numbers, y: low, upper: high, color: colour(report()), opacity: 0.14 },
        {
          type: "line",
          name: "untrained",
          x: numbers,
          y: baseline,
          color: theme().muted,
          dash: "dash",
          dots: numbers.length === 1,
          words: baseline.map(shown),
        },
        ...lines,
      ],
      unified: (layer) => `layer ${called(layer)}`,
      x: {
        type: "linear",
        range: padded(numbers[0], numbers.at(-1)),
        whole: true,
        title: towers ? "layer, in the order of the table" : "layer",
      },
      y: {
        type: "linear",
        range: fromZero([...high, ...low, ...baseline, ...lines.flatMap((line) => line.y)]),
        title: kind.measures[measure()],
      },
    });
  });

  chart(`trajectory-${kind.key}`, names("measure"), (element) => {
    const steps = run.labels.map((_, i) => i);
    const every = steps.map(averages);
    const series = numbers.map((number, row) => ({
      type: "line",
      name: `layer ${called(number)}`,
      x: steps,
      y: every.map((items) => items[row].mean),
      dots: dotted(steps.length),
      color: ramp(numbers.length > 1 ? row / (numbers.length - 1) : 1),
      words: every.map((items, i) => `${run.labels[i]}: ${shown(items[row].mean)}`),
    }));
    figure(element, {
      series,
      x: { type: "linear", range: [-0.15, LAST + 0.15], ticks: categories(run.labels.map(shortened)) },
      y: { type: "linear", range: fromZero(series.flatMap((item) => item.y)), title: kind.measures[measure()] },
    });
  });

  // Pairs of numbers that are equal at balance: on the diagonal. Logarithmic, so that a share of a large number and of
  // a small one are as far from it; what is 0 is at the edge.
  function diagonal(id, x, y, pairs, untrained) {
    chart(id, names("report"), (element) => {
      const items = numbers.map((number) => find(report(), number)).filter((layer) => layer && layer.norms);
      const own = items.flatMap((layer) => pairs(layer).map((point) => ({ ...point, layer: layer.layer })));
      const grey = [...new Set(items.map((layer) => layer.untrained_pairs))].flatMap((i) =>
        untrained(run.untrained_pairs[i]),
      );
      const finite = (some) => some.filter((point) => point.x !== null && point.y !== null);
      const all = finite([...own, ...grey]);
      const high = Math.max(...all.flatMap((point) => [point.x, point.y]), 1e-30);
      const low = Math.max(
        Math.min(...all.flatMap((point) => [point.x, point.y]).filter((value) => value > 0), high),
        1e-6 * high,
      );
      const range = [low / 1.2, high * 1.2];
      const points = (some, label, look) => ({
        type: "points",
        size: 6,
        x: some.map((point) => Math.max(point.x, range[0])),
        y: some.map((point) => Math.max(point.y, range[0])),
        ...look,
        words: some.map((point) => [label(point), `${x} ${digits(point.x)}`, `${y} ${digits(point.y)}`]),
      });
      const place = (layer) => (numbers.length > 1 ? numbers.indexOf(layer) / (numbers.length - 1) : 1);
      figure(element, {
        series: [
          { type: "line", x: range, y: range, color: theme().muted, width: 1 },
          points(finite(own), (point) => `layer ${called(point.layer)}, ${point.what}`, {
            colors: finite(own).map((point) => ramp(place(point.layer))),
            opacity: 0.75,
          }),
          points(finite(grey), () => "untrained", { color: theme().muted, open: true }),
        ],
        x: { type: "log", range, title: x },
        y: { type: "log", range, title: y },
      });
    });
  }

  if (kind.factors) {
    const [first, second] = kind.factors;
    const norms = ([xs, ys], head) => xs.map((value, i) => ({ x: value, y: ys[i], what: `head ${head}, row ${i}` }));
    diagonal(
      `norms-${kind.key}`,
      `‖row of ${first}‖²`,
      `‖its partner in ${second}‖²`,
      (layer) => norms(layer.norms, layer.heads[0]),
      (pairs) => norms(pairs),
    );
    diagonal(
      `bounds-${kind.key}`,
      "bound: mean squared norm of the factors",
      "nuclear norm",
      (layer) => layer.bounds.map(([mean, nuclear], i) => ({ x: mean, y: nuclear, what: `head ${layer.heads[i]}` })),
      ([, , [mean, nuclear]]) => [{ x: mean, y: nuclear }],
    );
  }

  // Begin at the head the words name: that of the lowest pseudo rank in the last checkpoint.
  const cells = layersOf(LAST).flatMap((layer) =>
    layer.heads.map((head, i) => [layer.values.pseudo_rank[i], layer.layer, head]),
  );
  const [lowest] = cells.filter(([value]) => value !== null).sort((a, b) => a[0] - b[0] || a[1] - b[1] || a[2] - b[2]);
  if (lowest) {
    select(name("layer"), lowest[1]);
    select(name("head"), lowest[2]);
  }
}

run.kinds.forEach(draw);
colourKeys();
darkModeSwitch.addEventListener("change", () => {
  colourKeys();
  changed("theme");
});
watchCharts();
