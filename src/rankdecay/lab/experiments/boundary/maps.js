// Phase maps as SVG: a coloured cell per strength and amount of data, the fitted boundary with its band over them.
// Cells are buttons: hover or focus shows a cell, a click or Enter keeps it; arrow keys move between them and on to the
// next map. `state.cell` is the cell shown, `state.kept` up to two that stay, each as [map, cell].

const SIZE = { width: 38, height: 26, left: 52, right: 8, top: 6, bottom: 40 };
const KEPT = 2;
const FAINTEST = 0.12; // of the colours, for the least of a measure that has no zero: it must differ from no value at all
const rows = run.rows.length;
state.cell = run.first.length ? run.first : null;
state.kept = [];

function svg(name, attributes = {}, children = []) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

const same = (a, b) => a !== null && b !== null && a[0] === b[0] && a[1] === b[1];
const cellOf = ([map, cell]) => run.maps[map].cells[cell];
const shownMaps = () =>
  run.maps
    .map((map, index) => ({ ...map, index }))
    .filter(
      (map) =>
        !state.hidden.has(map.arm) &&
        (!state.rest || state.rest === "all" || map.rest === "its own" || state.rest === map.rest),
    );

function valueOf(cell) {
  return state.measure === "generalised" ? cell.generalised / cell.seeds : cell[state.measure];
}

// One scale for all maps, so that a colour means the same in each.
function scaleOf() {
  if (run.measures[state.measure].scale === "share") return { low: 0, high: 1, share: (value) => value };
  const values = run.maps.flatMap((map) => map.cells.map(valueOf)).filter((value) => value > 0);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  return {
    low,
    high,
    share: (value) => FAINTEST + (1 - FAINTEST) * (high > low ? Math.log(value / low) / Math.log(high / low) : 0.5),
  };
}

function inWords(map, cell) {
  const strength = map.strengths[cell.column] ? `, strength ${map.strengths[cell.column]}` : "";
  return `${run.arms[map.arm].label}${strength}, ${cell.amount}: ${cell.generalised} of ${cell.seeds} seeds generalised`;
}

function drawFace(map, index, cell, colours) {
  const x = SIZE.left + cell.column * SIZE.width + 1;
  const y = SIZE.top + (rows - 1 - cell.row) * SIZE.height + 1;
  const box = { x, y, width: SIZE.width - 2, height: SIZE.height - 2, rx: 2 };
  const value = valueOf(cell);
  const parts = [
    svg("rect", {
      ...box,
      class: value === null ? "face unreached" : "face",
      ...(value === null ? {} : { style: `fill:${blend(colours.map, colours.scale.share(value))}` }),
    }),
  ];
  if (cell.steps_to_generalise === null) parts.push(svg("rect", { ...box, fill: "url(#hatch)" }));
  if (cell.diverged) {
    const [cx, cy] = [x + box.width - 8, y + 8];
    parts.push(svg("path", { class: "diverged", d: `M${cx - 4} ${cy - 4} l8 8 m0 -8 l-8 8` }));
  }
  return svg(
    "g",
    {
      class: "button",
      role: "button",
      tabindex: -1,
      "data-map": map.index,
      "data-cell": index,
      "aria-label": inWords(map, cell),
    },
    parts,
  );
}

function drawBoundary(map) {
  const x = (column) => SIZE.left + (column + 0.5) * SIZE.width;
  const y = (position) => SIZE.top + (rows - 0.5 - position) * SIZE.height;
  const fits = new Map(map.fits.map((fit) => [fit.column, fit]));
  // A line runs on to the outer edges of its first and last column, so that a single column has one too.
  const wide = (columns, name) => {
    const ends = [columns[0], columns.at(-1)].map((column, end) => [
      x(column) + (end - 0.5) * (SIZE.width - 2),
      y(fits.get(column)[name]),
    ]);
    return [ends[0], ...columns.map((column) => [x(column), y(fits.get(column)[name])]), ends[1]].map((point) =>
      point.map((part) => part.toFixed(1)).join(","),
    );
  };
  const bands = map.neighbours.map((columns) =>
    svg("polygon", { class: "band", points: [...wide(columns, "low"), ...wide(columns, "high").reverse()].join(" ") }),
  );
  const lines = map.segments.flatMap((columns) =>
    ["halo", "boundary"].map((name) => svg("polyline", { class: name, points: wide(columns, "at").join(" ") })),
  );
  const beyond = map.fits
    .filter((fit) => fit.at === null)
    .map((fit) => {
      const [cx, up] = [x(fit.column), fit.censored === "above" ? -1 : 1];
      const base = up < 0 ? SIZE.top + 11 : SIZE.top + rows * SIZE.height - 11;
      return svg("path", { class: "beyond", d: `M${cx - 5} ${base} L${cx} ${base + up * 9} L${cx + 5} ${base} Z` });
    });
  return svg("g", { class: "over" }, [...bands, ...lines, ...beyond]);
}

function drawMap(map, colours) {
  const columns = map.strengths.length;
  const [inner, height] = [columns * SIZE.width, rows * SIZE.height];
  const bottom = SIZE.top + height;
  const text = (words, attributes) => {
    const element = svg("text", attributes);
    element.textContent = words;
    return element;
  };
  const figure = document.createElement("figure");
  const caption = document.createElement("figcaption");
  const name = document.createElement("span");
  name.textContent = run.arms[map.arm].label;
  caption.append(sample(map.arm), name);
  if (new Set(run.maps.map((item) => item.rest)).size > 1) {
    const rest = document.createElement("small");
    rest.textContent = `decay of the rest: ${map.rest}`;
    caption.append(rest);
  }
  const width = SIZE.left + inner + SIZE.right;
  const picture = svg(
    "svg",
    { width, height: bottom + SIZE.bottom, role: "group", "aria-label": `${run.arms[map.arm].label}: phase map` },
    [
      ...run.rows.map((words, row) =>
        text(words, { x: SIZE.left - 6, y: bottom - (row + 0.5) * SIZE.height + 4, "text-anchor": "end" }),
      ),
      ...map.strengths.map((words, column) =>
        text(words.replace(/^0\./, "."), {
          x: SIZE.left + (column + 0.5) * SIZE.width,
          y: bottom + 15,
          "text-anchor": "middle",
        }),
      ),
      text(map.strengths[0] === "" && columns === 1 ? "" : "strength", {
        x: SIZE.left + inner / 2,
        y: bottom + 32,
        "text-anchor": "middle",
      }),
      svg(
        "g",
        {},
        map.cells.map((cell, index) => drawFace(map, index, cell, colours)),
      ),
      drawBoundary(map),
    ],
  );
  figure.style.maxWidth = `${Math.max(width, 150)}px`;
  figure.append(caption, picture);
  return figure;
}

function drawScale(colours) {
  const element = document.getElementById("map-scale");
  const bar = document.createElement("i");
  const end = (value) =>
    Object.assign(document.createElement("span"), { textContent: Number.isFinite(value) ? digits(value) : "—" });
  const { low, high, share } = colours.scale;
  const stops = [share(low), 0.5, share(high)].map((at) => blend(colours.map, at));
  bar.style.background = `linear-gradient(90deg, ${stops.join(", ")})`;
  element.replaceChildren(end(colours.scale.low), bar, end(colours.scale.high));
}

// One cell per map can be reached with Tab: the one shown, or its first.
function markCells() {
  for (const figure of document.querySelectorAll("#maps figure")) {
    const buttons = [...figure.querySelectorAll(".button")];
    const at = (button) => [Number(button.dataset.map), Number(button.dataset.cell)];
    for (const button of buttons) {
      const isKept = state.kept.some((cell) => same(cell, at(button)));
      button.classList.toggle("current", same(state.cell, at(button)));
      button.classList.toggle("kept", isKept);
      button.setAttribute("aria-pressed", String(isKept));
      button.setAttribute("tabindex", -1);
    }
    (figure.querySelector(".current") || buttons[0])?.setAttribute("tabindex", 0);
  }
}

function show(cell) {
  if (same(cell, state.cell) || cell === state.cell) return;
  state.cell = cell;
  markCells();
  changed("cell");
}

function keep(cell) {
  const others = state.kept.filter((item) => !same(item, cell));
  state.kept = others.length < state.kept.length ? others : [...others.slice(-(KEPT - 1)), cell];
  state.cell = cell;
  markCells();
  changed("cell");
}

function move(button, across, up) {
  const map = run.maps[button.dataset.map];
  const { column, row } = map.cells[button.dataset.cell];
  const index = map.cells.findIndex((cell) => cell.column === column + across && cell.row === row + up);
  if (index >= 0) return document.querySelector(`.button[data-map="${button.dataset.map}"][data-cell="${index}"]`);
  if (!across) return null;
  const figures = [...document.querySelectorAll("#maps figure")];
  const next = figures[figures.indexOf(button.closest("figure")) + across];
  const cells = next
    ? [...next.querySelectorAll(".button")].filter((item) => cellOf([item.dataset.map, item.dataset.cell]).row === row)
    : [];
  return cells.at(across > 0 ? 0 : -1) || null;
}

chart("maps", ["measure", "rest"], (element) => {
  const colours = { map: theme().map, scale: scaleOf() };
  element.replaceChildren(...shownMaps().map((map) => drawMap(map, colours)));
  drawScale(colours);
  markCells();
});

const board = document.getElementById("maps");
if (board) {
  const under = (event) => event.target.closest(".button");
  const at = (button) => [Number(button.dataset.map), Number(button.dataset.cell)];
  const keys = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
  board.addEventListener("pointerover", (event) => {
    if (under(event)) show(at(under(event)));
  });
  board.addEventListener("focusin", (event) => {
    if (under(event)) show(at(under(event)));
  });
  board.addEventListener("click", (event) => {
    if (under(event)) keep(at(under(event)));
  });
  board.addEventListener("pointerleave", () => {
    if (state.kept.length) show(state.kept.at(-1));
  });
  board.addEventListener("keydown", (event) => {
    const button = under(event);
    if (!button) return;
    if (event.key === "Enter" || event.key === " ") keep(at(button));
    else if (keys[event.key]) move(button, ...keys[event.key])?.focus();
    else return;
    event.preventDefault();
  });
}
