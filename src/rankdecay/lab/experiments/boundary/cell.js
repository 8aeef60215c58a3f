// The runs of the cells that are shown: what became of each seed in words, curves over steps, singular values.

const FLOOR = 1e-4; // of the largest singular value
const OUTCOMES = { budget: "not within", diverged: "diverged" };
const DATA_TICKS = [0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300, 500];
const FINE_TICKS = [1, 10, 100].flatMap((power) =>
  [1, 1.2, 1.5, 1.7, 2, 2.5, 3, 4, 5, 6, 7, 8, 9].map((digit) => Number((digit * power).toPrecision(2))),
);
const POWERS = { 1: "1", 0.1: "0.1", 0.01: "0.01", 0.001: "10⁻³", 0.0001: "10⁻⁴" };
const INNER = { stable_rank: "Stable rank of W_Q, W_K", query_norm: "‖W_Q‖, Frobenius" };

// The cells that are kept, then the one under the pointer; each with the colour it is drawn in.
function shownCells() {
  const cells = [
    ...state.kept,
    ...(state.cell && !state.kept.some((cell) => same(cell, state.cell)) ? [state.cell] : []),
  ];
  const { muted, text } = theme();
  return cells.map((at, index) => {
    const map = run.maps[at[0]];
    const before = cells.slice(0, index).filter(([other]) => run.maps[other].arm === map.arm).length;
    const [colour, dash] = [
      [armColor(map.arm), "solid"],
      [text, "dash"],
      [muted, "dot"],
    ][before];
    return { map, cell: cellOf(at), colour, dash, runs: cellOf(at).runs.map((number) => run.runs[number]) };
  });
}

const percent = (value) => `${Math.round(value * 100)}`;
const count = (value) => Number(value).toLocaleString("en");

function where({ map, cell }) {
  const rest = new Set(run.maps.map((item) => item.rest)).size > 1 ? `decay of the rest: ${map.rest}` : "";
  return [map.strengths[cell.column] && `strength ${map.strengths[cell.column]}`, cell.amount, rest]
    .filter(Boolean)
    .join(" · ");
}

function outcome({ cell }, brief) {
  const time =
    cell.steps_to_generalise === null
      ? `fewer than half within ${count(cell.budget)} steps`
      : `median ${count(cell.steps_to_generalise)} steps`;
  if (brief) return `${cell.generalised} of ${cell.seeds} seeds generalised, ${time}.`;
  const figures = [
    ["best test accuracy", cell.best_test_accuracy],
    ["stable rank", cell.stable_rank],
    ["‖W_Q‖", cell.query_norm],
  ]
    .filter(([, value]) => value !== null && value !== undefined)
    .map(([name, value]) => `${name} ${digits(value)}`);
  return (
    `${cell.generalised} of ${cell.seeds} seeds generalised (95 % interval ${percent(cell.generalised_low)}–${percent(cell.generalised_high)} %), ` +
    `${time}.${figures.length ? ` Means: ${figures.join(", ")}.` : ""}`
  );
}

function seeds({ runs }) {
  return runs
    .map(
      (item) =>
        `seed ${item.seed}: ${
          item.outcome === "generalised"
            ? `${count(item.steps)} steps`
            : item.outcome === "budget"
              ? `${OUTCOMES.budget} ${count(item.budget)}`
              : OUTCOMES.diverged
        }`,
    )
    .join(" · ");
}

function describe() {
  const cells = shownCells();
  document.getElementById("cell-words").replaceChildren(
    ...cells.map((item) => {
      const block = document.createElement("div");
      const add = (name, words, className) => {
        const element = Object.assign(document.createElement(name), { textContent: words, className });
        block.append(element);
        return element;
      };
      const line = sample(item.map.arm);
      line.firstChild.setAttribute("stroke", item.colour);
      add("h3", run.arms[item.map.arm].label, "").prepend(line);
      add("p", where(item), "where");
      add("p", outcome(item, cells.length > 1), "");
      if (cells.length === 1 && item.runs.length <= 12) add("p", seeds(item), "seeds");
      return block;
    }),
  );
}

function seedTraces(name, ys = (values) => values) {
  const several = shownCells().length > 1;
  return shownCells().flatMap(({ map, cell, colour, dash, runs }) =>
    runs
      .filter((item) => item.curves[name])
      .map((item) => ({
        x: run.pools[item.at],
        y: ys(item.curves[name]),
        mode: "lines",
        line: { color: colour, width: 1.8, dash },
        opacity: item.outcome === "generalised" ? 1 : 0.55,
        meta: `${several ? `${plainText(run.arms[map.arm].label)}, ${plainText(where({ map, cell }))}<br>` : ""}seed ${item.seed}`,
        hovertemplate: "<b>%{meta}</b><br>step %{x:,}: %{y:.3~g}<extra></extra>",
      })),
  );
}

const small = { margin: { l: 40, r: 10, t: 6, b: 30 }, hovermode: "closest" };
const titled = (text) => ({ title: { text, standoff: 4, font: { size: 12 } } });
const steps = { ...titled("step"), nticks: 5 };

chart("cell-accuracy", ["cell"], (element) => {
  describe();
  const training = shownCells().flatMap(({ colour, runs }) =>
    runs
      .filter((item) => item.curves.train_accuracy)
      .map((item) => ({
        x: run.pools[item.at],
        y: item.curves.train_accuracy,
        mode: "lines",
        line: { color: colour, width: 1, dash: "dot" },
        opacity: 0.4,
        hoverinfo: "skip",
      })),
  );
  const shapes =
    run.threshold === null
      ? []
      : [
          {
            type: "line",
            xref: "paper",
            x0: 0,
            x1: 1,
            y0: run.threshold,
            y1: run.threshold,
            line: { color: theme().muted, width: 1, dash: "dash" },
            layer: "below",
          },
        ];
  plot(element, [...training, ...seedTraces("test_accuracy")], {
    ...small,
    shapes,
    xaxis: steps,
    yaxis: { range: [-0.02, 1.04], nticks: 6 },
  });
});

chart("cell-inner", ["cell", "inner"], (element) => {
  document.getElementById("inner-caption").textContent = INNER[state.inner];
  const traces = seedTraces(state.inner);
  const values = traces.flatMap((trace) => trace.y).filter((value) => value > 0);
  const ticks = Math.max(...values) > 3 * Math.min(...values) ? DATA_TICKS : FINE_TICKS;
  plot(element, traces, {
    ...small,
    xaxis: steps,
    yaxis: { type: "log", tickvals: ticks, ticktext: ticks.map(String) },
  });
});

chart("cell-spectrum", ["cell"], (element) => {
  const traces = shownCells().flatMap(({ map, colour, dash, runs }) =>
    runs
      .filter((item) => item.spectrum.length)
      .map((item) => ({
        x: run.pools[item.index],
        y: item.spectrum.map((value) => (value === null ? null : Math.max(value, FLOOR))),
        mode: "lines",
        line: { color: colour, width: 1.6, dash },
        opacity: 0.75,
        meta: `${plainText(run.arms[map.arm].label)}, seed ${item.seed}`,
        hovertemplate: "<b>%{meta}</b><br>σ%{x}/σ₁: %{y:.2~g}<extra></extra>",
      })),
  );
  plot(element, traces, {
    ...small,
    xaxis: { ...titled("index i of σᵢ/σ₁"), nticks: 6 },
    yaxis: {
      type: "log",
      range: [Math.log10(FLOOR) - 0.1, 0.1],
      tickvals: Object.keys(POWERS).map(Number),
      ticktext: Object.values(POWERS),
    },
  });
});
