// The pictures of attention in two dimensions: tokens, the query, both SVMs and the direction of W z through time.

const R = 104; // of the circle that the arrow reaches at the end
const INSIDE = 84; // what the longest token or query is drawn as
const TARGETS = [
  { norm: "nuclear", dash: "7 4", full: "nuclear SVM", diagonal: "ℓ1 solution" },
  { norm: "frobenius", dash: "1.5 4", full: "Frobenius SVM", diagonal: "ℓ2 solution" },
];

const shape = (name, attributes, children = []) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
};
const polar = (angle, radius) => [radius * Math.cos(angle), -radius * Math.sin(angle)];
const written = (points) => points.map(([x, y]) => `${x.toFixed(2)} ${y.toFixed(2)}`).join(" L");
const apart = (a, b) => Math.abs(Math.atan2(Math.sin(a - b), Math.cos(a - b))) * (180 / Math.PI);
const inShort = (margin) => (margin < 1e4 ? digits(margin) : margin.toExponential(1).replace("e+", "e"));
const armNamed = (name) => run.arms.findIndex((arm) => arm.name === name);
const courseNow = () => run.pictures.arms[state.pictured][state.planar];

function arrow(tip, angle, color, width, name) {
  const [x, y] = tip;
  const head = [2.6, -2.6].map((turn) => [
    x + 4.5 * width * Math.cos(angle + turn),
    y - 4.5 * width * Math.sin(angle + turn),
  ]);
  const look = { class: name, fill: color, stroke: color, "stroke-linejoin": "round", "stroke-linecap": "round" };
  return shape("g", look, [
    shape("line", { x1: 0, y1: 0, x2: x, y2: y, "stroke-width": width }),
    shape("path", { d: `M${written([tip, ...head])} Z`, "stroke-width": width / 2 }),
  ]);
}

// The line through the selected token, across the direction: what is behind it has less attention.
function supportLine([x, y], angle, color) {
  const [ux, uy] = polar(angle, 1);
  const along = x * ux + y * uy;
  const half = Math.sqrt(Math.max(0, R * R - along * along));
  const [cx, cy] = [along * ux, along * uy];
  const ends = { x1: cx - half * uy, y1: cy + half * ux, x2: cx + half * uy, y2: cy - half * ux };
  return shape("line", { class: "support", ...ends, stroke: color, "stroke-width": 1, "stroke-opacity": 0.7 });
}

// The path of the arrow's tip, faint where it is still to come.
function coursePaths(course, number, moment, radius, color) {
  const points = course.angles.map((row, at) => [row[number], at]).filter(([direction]) => isKnown(direction));
  const path = (kept) => `M${written(kept.map(([direction, at]) => polar(direction, radius(at))))}`;
  const past = points.filter(([, at]) => at <= moment);
  const look = (opacity, width) => ({
    fill: "none",
    stroke: color,
    "stroke-width": width,
    "stroke-opacity": opacity,
  });
  return [
    ...(points.length ? [shape("path", { class: "course", d: path(points), ...look(0.3, 1.6) })] : []),
    ...(past.length ? [shape("path", { d: path(past), ...look(0.75, 2.2) })] : []),
  ];
}

function drawing(example, number, course, moment, color) {
  const { text, muted, rule, background } = theme();
  const longest = Math.max(...[...example.tokens, example.query].map(([x, y]) => Math.hypot(x, y))) || 1;
  const place = ([x, y]) => [(x * INSIDE) / longest, (-y * INSIDE) / longest];
  const radius = (at) => R * (0.25 + (0.75 * at) / Math.max(1, course.step.length - 1));
  const angle = course.angles[moment][number];
  const query = place(example.query);
  const chosen = place(example.tokens[course.selected[number]]);
  const targets = TARGETS.filter(({ norm }) => course[norm] && isKnown(course[norm][number])).map(({ norm, dash }) => {
    const [x2, y2] = polar(course[norm][number], R);
    return shape("line", {
      class: `target ${norm}`,
      x1: 0,
      y1: 0,
      x2,
      y2,
      stroke: text,
      "stroke-width": 1.5,
      "stroke-dasharray": dash,
      "stroke-linecap": "round",
    });
  });
  const tokens = example.tokens.map((token, index) => {
    const [cx, cy] = place(token);
    const fill = index === example.optimal ? text : background;
    return shape("circle", { class: "token", cx, cy, r: 5, fill, stroke: text, "stroke-width": 1.6 });
  });
  return [
    shape("circle", { r: R, fill: "none", stroke: rule }),
    arrow(query, Math.atan2(-query[1], query[0]), muted, 1.1, "query"),
    ...targets,
    ...(isKnown(angle) ? [supportLine(chosen, angle, color)] : []),
    ...coursePaths(course, number, moment, radius, color),
    ...(isKnown(angle) ? [arrow(polar(angle, radius(moment)), angle, color, 3, "direction")] : []),
    ...tokens,
    shape("circle", {
      class: "selected",
      cx: chosen[0],
      cy: chosen[1],
      r: 9.5,
      fill: "none",
      stroke: color,
      "stroke-width": 2.4,
    }),
  ];
}

function inWords(number, course, moment) {
  const angle = course.angles[moment][number];
  if (!isKnown(angle)) return "W z is zero: it has no direction";
  const family = state.pictured === "diagonal" ? "diagonal" : "full";
  const known = TARGETS.filter(({ norm }) => course[norm] && isKnown(course[norm][number]));
  return (
    known
      .map((target) => `${apart(angle, course[target.norm][number]).toFixed(1)}° from the ${target[family]}`)
      .join(", ") || "no SVM: its tokens are not selected or not separable"
  );
}

function picture(example, number, course, moment, color) {
  const words = inWords(number, course, moment);
  const figure = document.createElement("figure");
  const caption = document.createElement("figcaption");
  const small = document.createElement("small");
  small.textContent = words;
  caption.append(`Example ${number + 1}`, small);
  const label = `Example ${number + 1}: the direction of W z is ${words}`;
  const look = { viewBox: "-112 -112 224 224", role: "img", "aria-label": label };
  figure.append(caption, shape("svg", look, drawing(example, number, course, moment, color)));
  return figure;
}

chart("pictures", ["pictured", "planar", "moment"], (element) => {
  const course = courseNow();
  const output = document.getElementById("moment-output");
  if (!course) {
    element.replaceChildren("This arm did not take part in this data set.");
    output.textContent = "";
    return;
  }
  const margin = course.margin[state.moment];
  const at = margin > 0 ? inShort(margin) : "not yet";
  output.textContent = `step ${course.step[state.moment].toLocaleString("en")}, margin ${at}`;
  const color = armColor(armNamed(state.pictured));
  const examples = run.pictures.sets[state.planar];
  element.replaceChildren(...examples.map((one, number) => picture(one, number, course, state.moment, color)));
});

function startPictures() {
  const slider = document.getElementById("moment");
  const restart = () => {
    // another arm or data set is shown at its end
    const course = courseNow();
    state.moment = course ? course.step.length - 1 : 0;
    slider.disabled = !course;
    slider.max = state.moment;
    slider.value = state.moment;
  };
  for (const name of ["pictured", "planar"]) {
    document.querySelector(`select[data-state="${name}"]`).addEventListener("change", () => {
      restart();
      changed("moment");
    });
  }
  slider.addEventListener("input", () => {
    state.moment = Number(slider.value);
    changed("moment");
  });
  restart();
}

startPictures();
