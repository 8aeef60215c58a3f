// Charts as SVG, without a library: lines, bands, points and cells on two axes, a description of what is under the
// pointer, zoom by dragging, the whole again by a double click. Every string becomes a text node: a name is only text.

const CIVIDIS = (
  "#00204c #002a66 #00346e #273f6c #3c4a6b #4c556b #5b5f6d #686a70 #757575 #838178 #928c78 #a19876 " +
  "#b0a572 #c0b16d #d1bf66 #e1cc5c #f3db4f #ffe945"
).split(" ");
const CHARACTER = 7.2; // pixels of a character of a label, at most in the mean
const NEAR = 40; // pixels from the pointer to the point that is described
const DASHES = { dash: "8 6" };

function node(tag, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== undefined) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// --- axes: { type: "linear" or "log", range, title, ticks: [[value, label], ...] where they are given, whole } ---

function scale(axis, from, to) {
  const log = axis.type === "log";
  const inner = log ? Math.log10 : (value) => value;
  const outer = log ? (value) => 10 ** value : (value) => value;
  const [low, high] = axis.range.map(inner);
  return {
    at: (value) => from + ((inner(value) - low) / (high - low)) * (to - from),
    of: (pixel) => outer(low + ((pixel - from) / (to - from)) * (high - low)),
  };
}

// Multiples of 1, 2 or 5 times a power of ten, at most `count` of them.
function linearTicks([low, high], count, whole) {
  const rough = (high - low) / Math.max(count, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const factor = [1, 2, 5, 10].find((times) => times * power >= rough * 0.999);
  const step = Math.max(factor * power, whole ? 1 : 0);
  const first = Math.ceil(low / step - 1e-9);
  const number = Math.floor(high / step + 1e-9) - first + 1;
  const values = Array.from({ length: Math.max(number, 0) }, (_, i) => Number(((first + i) * step).toPrecision(10)));
  return values.map((value) => [value, String(value)]);
}

const superscript = (text) => [...text].map((sign) => (sign === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[sign])).join("");
function logTicks([low, high], length, room) {
  const [first, last] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
  const decade = length / Math.log10(high / low);
  const times = decade > 6 * room ? [1, 2, 3, 5] : decade > 3 * room ? [1, 2, 5] : [1];
  const every = Math.max(1, Math.ceil(room / decade));
  const powers = low < 1e-4 || high > 1e4;
  const ticks = [];
  for (let power = first; power <= last; power += 1) {
    if (((power % every) + every) % every) continue;
    for (const factor of times) {
      const value = factor * 10 ** power;
      if (value < low * 0.9999 || value > high * 1.0001) continue;
      const decimal = String(Number(value.toPrecision(3)));
      const factored = `${factor > 1 ? `${factor}·` : ""}10${superscript(String(power))}`;
      ticks.push([value, powers && power ? factored : decimal]);
    }
  }
  return ticks.length > 1 ? ticks : linearTicks([low, high], Math.max(2, Math.floor(length / room / 1.5)));
}

// Of given ticks, as many as there is room for; `room` is that of one label.
function ticksOf(axis, length, room) {
  if (!axis.ticks && axis.type === "log") return logTicks(axis.range, length, room);
  if (!axis.ticks) return linearTicks(axis.range, Math.floor(length / room), axis.whole);
  const [low, high] = [Math.min(...axis.range), Math.max(...axis.range)];
  const inside = axis.ticks.filter(([value]) => value >= low && value <= high);
  const every = Math.max(1, Math.ceil((inside.length * room) / length));
  return inside.filter((_, i) => i % every === 0);
}

// --- a figure ---

// figure(element, { x, y, series, cells, height, right, unified, pick }) draws it in place of the one before.
//   series: { type: "line", "points", "band" or "signs", x, y, upper, color, colors, width, dash, opacity, size, open,
//     dots, name, words }; `words` say what is at each point, and a series without them is not described; null is a gap
//   cells: { values, words, range, chosen }, rows of columns: `undefined` is no cell, null one without a number
//   unified: says where a point is, in a wide chart, which describes every line there; pick(x, y): a click
function figure(element, content) {
  element.figure = content;
  if (!element.dataset.listens) listen(element);
  redraw(element);
}

const kindsOf = (element) => `${element.figure.x.type} ${element.figure.y.type}`;

function redraw(element) {
  const { x, y, series = [], cells, height = element.clientHeight, right = 20 } = element.figure;
  const { text: ink, muted, rule, grid } = theme();
  const family = getComputedStyle(document.body).fontFamily;
  if (element.zoom && element.zoom.kinds !== kindsOf(element)) element.zoom = null;
  const axes = element.zoom ? { x: { ...x, range: element.zoom.x }, y: { ...y, range: element.zoom.y } } : { x, y };

  const width = element.clientWidth;
  const bottom = height - 44;
  const rows = ticksOf(axes.y, bottom - 10, y.ticks ? 16 : 36);
  const start = 34 + CHARACTER * Math.max(1, ...rows.map(([, label]) => label.length));
  const end = width - right - (cells ? 52 : 0);
  const longest = x.ticks ? Math.max(...x.ticks.map(([, label]) => label.length)) : 4;
  const columns = ticksOf(axes.x, end - start, CHARACTER * longest + 14);
  const [across, down] = [scale(axes.x, start, end), scale(axes.y, bottom, 10)];

  const caption = element.closest("figure").querySelector("figcaption").textContent;
  const svg = node("svg", {
    width,
    height,
    viewBox: `0 0 ${width} ${height}`,
    role: "img",
    "aria-label": caption,
    "font-family": family,
    "font-size": 12.5,
    fill: muted,
  });
  const clip = node("clipPath", { id: `clip-${element.id}` });
  clip.append(node("rect", { x: start, y: 10, width: Math.max(end - start, 0), height: bottom - 10 }));
  const inside = node("g", { "clip-path": `url(#clip-${element.id})` });
  const lines = node("g", { stroke: grid });
  const labels = node("g", {});
  for (const [value, label] of rows) {
    const at = down.at(value);
    if (!cells) lines.append(node("line", { x1: start, x2: end, y1: at, y2: at }));
    labels.append(node("text", { x: start - 8, y: at + 4, "text-anchor": "end" }, label));
  }
  for (const [value, label] of columns) {
    const [at, half] = [across.at(value), (CHARACTER * label.length) / 2];
    if (!cells) lines.append(node("line", { x1: at, x2: at, y1: 10, y2: bottom }));
    labels.append(node("text", { x: Math.min(at, width - half), y: bottom + 18, "text-anchor": "middle" }, label));
  }
  if (!cells) lines.append(node("path", { d: `M${start} 10V${bottom}H${end}`, fill: "none", stroke: rule }));
  const middle = (10 + bottom) / 2;
  const title = { "text-anchor": "middle", "font-size": 14 };
  const halfTitle = (1.1 * CHARACTER * (x.title ?? "").length) / 2;
  const centre = Math.min((start + end) / 2, Math.max(width - halfTitle, width / 2));
  if (x.title) labels.append(node("text", { x: centre, y: height - 6, ...title }, x.title));
  const upright = { x: 14, y: middle, transform: `rotate(-90 14 ${middle})` };
  if (y.title) labels.append(node("text", { ...upright, ...title }, y.title));
  svg.append(clip, lines, labels, inside);

  if (cells) drawCells(svg, inside, cells, across, down, end + 12, bottom, muted);
  for (const item of series) drawSeries(inside, item, across, down, ink);
  inside.append(node("g", { class: "pointed" }));

  element.scales = { across, down, start, end, bottom };
  element.querySelector("svg")?.remove();
  element.prepend(svg);
  if (element.pointer) describe(element, element.pointer);
}

function drawSeries(parent, item, across, down, ink) {
  const { type, x, y, upper, color, colors, width = 2, dash, opacity = 1, size = 5, open, dots } = item;
  const point = (i, values = y) => [across.at(x[i]), down.at(values[i])];
  const place = (pair) => pair.map((value) => value.toFixed(2)).join(" ");
  const there = x.map((_, i) => i).filter((i) => x[i] !== null && y[i] !== null && y[i] !== undefined);
  if (type === "line" || type === "band") {
    const pieces = [];
    for (const i of there) {
      if (pieces.length && pieces.at(-1).at(-1) === i - 1) pieces.at(-1).push(i);
      else pieces.push([i]);
    }
    for (const piece of pieces) {
      const line = piece.map((i) => place(point(i))).join("L");
      if (type === "band") {
        const back = [...piece]
          .reverse()
          .map((i) => place(point(i, upper)))
          .join("L");
        parent.append(node("path", { d: `M${line}L${back}Z`, fill: color, "fill-opacity": opacity }));
      } else {
        parent.append(
          node("path", {
            d: `M${line}`,
            fill: "none",
            stroke: color,
            "stroke-width": width,
            "stroke-opacity": opacity,
            "stroke-linejoin": "round",
            "stroke-dasharray": DASHES[dash],
          }),
        );
      }
    }
  }
  for (const i of type === "points" || dots ? there : []) {
    const [cx, cy] = point(i);
    const own = colors ? colors[i] : color;
    parent.append(
      node("circle", {
        cx: cx.toFixed(2),
        cy: cy.toFixed(2),
        r: size / 2,
        opacity,
        ...(open ? { fill: "none", stroke: own } : { fill: own }),
      }),
    );
  }
  for (const i of type === "signs" ? there : []) {
    const [at, height] = point(i);
    parent.append(node("text", { x: at, y: height + 5, "text-anchor": "middle", "font-size": 16, fill: ink }, "×"));
  }
}

function drawCells(svg, inside, { values, range: [low, high], chosen }, across, down, bar, bottom, muted) {
  const share = (value) => (high > low ? (value - low) / (high - low) : 1);
  const cell = (row, column) => ({
    x: across.at(column - 0.5),
    y: down.at(row - 0.5),
    width: across.at(column + 0.5) - across.at(column - 0.5),
    height: down.at(row + 0.5) - down.at(row - 0.5),
  });
  values.forEach((line, row) =>
    line.forEach((value, column) => {
      if (value === undefined || value === null) return;
      const box = cell(row, column);
      const gap = Math.min(1, 0.2 * box.width, 0.2 * box.height);
      inside.append(
        node("rect", {
          x: box.x + gap / 2,
          y: box.y + gap / 2,
          width: box.width - gap,
          height: box.height - gap,
          fill: blend(CIVIDIS, share(value)),
        }),
      );
    }),
  );
  if (chosen) {
    const accent = getComputedStyle(document.documentElement).getPropertyValue("--accent").trim();
    svg.append(node("rect", { ...cell(...chosen), fill: "none", stroke: accent, "stroke-width": 2.5 }));
  }
  const fade = node("linearGradient", { id: `fade-${svg.querySelector("clipPath").id}`, x1: 0, x2: 0, y1: 1, y2: 0 });
  CIVIDIS.forEach((colour, i) => fade.append(node("stop", { offset: i / (CIVIDIS.length - 1), "stop-color": colour })));
  svg.append(fade, node("rect", { x: bar, y: 10, width: 10, height: bottom - 10, fill: `url(#${fade.id})` }));
  const axis = { type: "linear", range: [low, high] };
  const beside = scale(axis, bottom, 10);
  for (const [value, label] of high > low ? ticksOf(axis, bottom - 10, 40) : [[high, digits(high)]]) {
    svg.append(node("text", { x: bar + 15, y: high > low ? beside.at(value) + 4 : 18, fill: muted }, label));
  }
}

// --- pointer ---

// What is under the pointer: { lines, colours of them, at: [x, y], line: whether at all of an x }, or null.
function found(element, [px, py]) {
  const { series = [], cells, x, unified } = element.figure;
  const { across, down, start, end, bottom } = element.scales;
  if (px < start - 8 || px > end + 8 || py < 0 || py > bottom + 4) return null;
  if (cells) {
    const [row, column] = [Math.round(down.of(py)), Math.round(across.of(px))];
    const words = cells.words[row]?.[column];
    return words ? { lines: words, at: [across.at(column), down.at(row)] } : null;
  }
  let best = null;
  const wide = unified && isWide(element);
  for (const item of series.filter((some) => some.words)) {
    item.x.forEach((value, i) => {
      if (value === null || item.y[i] === null || item.y[i] === undefined) return;
      const [ax, ay] = [across.at(value), down.at(item.y[i])];
      const visible = ax >= start - 1 && ax <= end + 1 && ay >= 9 && ay <= bottom + 1;
      const distance = wide ? Math.abs(ax - px) : Math.hypot(ax - px, ay - py);
      if (visible && (!best || distance < best.distance)) best = { distance, item, i, value, at: [ax, ay] };
    });
  }
  if (!best || (!wide && best.distance > NEAR)) return null;
  if (!wide) return { lines: [best.item.name, ...[best.item.words[best.i]].flat()], at: best.at };
  const lines = [unified(best.value)];
  const colours = [null];
  for (const item of series.filter((some) => some.words)) {
    const i = item.x.indexOf(best.value);
    if (i < 0) continue;
    lines.push(`${item.name}: ${item.words[i]}`);
    colours.push(item.color);
  }
  return { lines, colours, at: [best.at[0], py], line: true };
}

function describe(element, pointer) {
  const label = element.querySelector(".hovertext");
  const group = element.querySelector(".pointed");
  const what = found(element, pointer);
  label.hidden = !what;
  group.replaceChildren();
  if (!what) return;
  label.replaceChildren(
    ...what.lines
      .filter((line) => line !== undefined && line !== "")
      .map((line, i) => {
        const item = document.createElement(i ? "div" : "b");
        if (what.colours?.[i]) {
          const swatch = document.createElement("i");
          swatch.style.background = what.colours[i];
          item.append(swatch);
        }
        item.append(line);
        return item;
      }),
  );
  const { bottom } = element.scales;
  const { muted } = theme();
  const [x, y] = what.at;
  if (what.line) group.append(node("line", { x1: x, x2: x, y1: 10, y2: bottom, stroke: muted }));
  else if (!element.figure.cells) group.append(node("circle", { cx: x, cy: y, r: 6, fill: "none", stroke: muted }));
  const beside = x + 14 + label.offsetWidth <= element.clientWidth ? x + 14 : x - 14 - label.offsetWidth;
  label.style.left = `${Math.max(0, Math.min(beside, element.clientWidth - label.offsetWidth))}px`;
  label.style.top = `${Math.max(0, y - label.offsetHeight / 2)}px`;
}

function listen(element) {
  element.dataset.listens = "yes";
  const label = document.createElement("div");
  label.className = "hovertext";
  label.hidden = true;
  const box = document.createElement("div");
  box.className = "zoombox";
  box.hidden = true;
  element.append(label, box);
  if (!coarsePointer) element.append(tools(element));

  const place = (event) => {
    const { left, top } = element.getBoundingClientRect();
    return [event.clientX - left, event.clientY - top];
  };
  let from = null; // where a drag began
  let dragged = false;
  const corners = (to) => {
    const { start, end, bottom } = element.scales;
    const within = ([x, y]) => [Math.min(Math.max(x, start), end), Math.min(Math.max(y, 10), bottom)];
    const [[x0, y0], [x1, y1]] = [within(from), within(to)];
    return { x: [Math.min(x0, x1), Math.max(x0, x1)], y: [Math.min(y0, y1), Math.max(y0, y1)] };
  };
  element.addEventListener("pointerdown", (event) => {
    if (event.target.closest(".tools")) return;
    element.pointer = place(event);
    describe(element, element.pointer);
    dragged = false;
    if (!element.figure.cells && !coarsePointer && event.button === 0) from = element.pointer;
  });
  element.addEventListener("pointermove", (event) => {
    element.pointer = place(event);
    describe(element, element.pointer);
    if (!from) return;
    const { x, y } = corners(element.pointer);
    dragged = dragged || x[1] - x[0] > 5 || y[1] - y[0] > 5;
    if (!dragged) return;
    if (!element.hasPointerCapture(event.pointerId)) element.setPointerCapture(event.pointerId);
    box.hidden = false;
    const sides = { left: x[0], top: y[0], width: x[1] - x[0], height: y[1] - y[0] };
    for (const [name, value] of Object.entries(sides)) box.style[name] = `${value}px`;
  });
  element.addEventListener("pointerup", (event) => {
    if (from && dragged) {
      const { x, y } = corners(place(event));
      const { across, down, start, end, bottom } = element.scales;
      // a drag along one axis zooms that one alone
      const [xs, ys] = [x[1] - x[0] > 10 ? x : [start, end], y[1] - y[0] > 10 ? y : [10, bottom]];
      element.zoom = { kinds: kindsOf(element), x: xs.map(across.of), y: [ys[1], ys[0]].map(down.of) };
      redraw(element);
    }
    from = null;
    box.hidden = true;
  });
  element.addEventListener("pointercancel", () => {
    from = null;
    box.hidden = true;
  });
  element.addEventListener("pointerleave", (event) => {
    if (event.pointerType === "touch") return; // a finger that was lifted: what it touched stays described
    element.pointer = null;
    label.hidden = true;
    element.querySelector(".pointed")?.replaceChildren();
  });
  element.addEventListener("click", (event) => {
    const { pick, cells } = element.figure;
    const [x, y] = place(event);
    if (!pick || dragged || !found(element, [x, y])) return;
    const { across, down } = element.scales;
    pick(cells ? Math.round(across.of(x)) : across.of(x), cells ? Math.round(down.of(y)) : down.of(y));
  });
  element.addEventListener("dblclick", () => whole(element));
}

function whole(element) {
  element.zoom = null;
  redraw(element);
}

function tools(element) {
  const made = document.createElement("div");
  made.className = "tools";
  const button = (text, title, act) => {
    const item = document.createElement("button");
    item.type = "button";
    item.textContent = text;
    item.title = title;
    item.addEventListener("click", act);
    made.append(item);
  };
  button("SVG", "Save the chart as SVG", () => save(element));
  if (!element.figure.cells) button("Reset", "Show the whole chart again", () => whole(element));
  return made;
}

function save(element) {
  const copy = element.querySelector("svg").cloneNode(true);
  copy.querySelector(".pointed").remove();
  copy.prepend(node("rect", { width: "100%", height: "100%", fill: theme().background }));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([new XMLSerializer().serializeToString(copy)], { type: "image/svg+xml" }));
  link.download = `${element.id}.svg`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
