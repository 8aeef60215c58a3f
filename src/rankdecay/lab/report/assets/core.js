// State, theme and scheduling. A chart names the state it depends on; it is drawn when it first comes into view and
// again when that state changes, at most once per animation frame.

const run = JSON.parse(document.getElementById("run-data").textContent);

const state = { hidden: new Set() };
const charts = [];
const darkMode = window.matchMedia("(prefers-color-scheme: dark)");
// The same to listen to: Chromium tells no change to a query whose `matches` a chart has read just before.
const darkModeSwitch = window.matchMedia(darkMode.media);
const coarsePointer = window.matchMedia("(pointer: coarse)").matches;

function chart(id, depends, draw) {
  const element = document.getElementById(id);
  if (element)
    charts.push({ element, depends: new Set([...depends, "hidden", "theme"]), draw, near: false, dirty: true });
}

let scheduled = false;
function schedule() {
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => {
    scheduled = false;
    for (const item of charts) {
      if (!item.near || !item.dirty) continue;
      item.dirty = false;
      item.draw(item.element);
    }
  });
}

function changed(key) {
  for (const item of charts) if (item.depends.has(key)) item.dirty = true;
  schedule();
}

function watchCharts() {
  const nearView = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) charts.find((item) => item.element === entry.target).near = entry.isIntersecting;
      schedule();
    },
    { rootMargin: "400px" },
  );
  const resized = new ResizeObserver((entries) => {
    for (const entry of entries) {
      const item = charts.find((candidate) => candidate.element === entry.target);
      const width = Math.round(entry.contentRect.width);
      if (item.width !== undefined && item.width !== width) item.dirty = true;
      item.width = width;
    }
    schedule();
  });
  for (const item of charts) {
    nearView.observe(item.element);
    resized.observe(item.element);
  }
}

function theme() {
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(`--${name}`).trim();
  return {
    background: color("background"),
    raised: color("raised"),
    text: color("text"),
    muted: color("muted"),
    rule: color("rule"),
    grid: color("grid"),
    map: [color("map-low"), color("map-middle"), color("map-high")],
  };
}

const armColor = (arm) => (darkMode.matches ? run.arms[arm].dark : run.arms[arm].light);
const visibleArms = () => run.arms.map((_, arm) => arm).filter((arm) => !state.hidden.has(arm));
// A colour on the way through #rrggbb stops, which are evenly spaced.
function blend(stops, share) {
  const colours = stops.map((stop) => stop.match(/\w\w/g).map((part) => parseInt(part, 16)));
  const at = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
  const from = Math.min(Math.floor(at), stops.length - 2);
  return `rgb(${colours[from].map((part, i) => Math.round(part + (colours[from + 1][i] - part) * (at - from)))})`;
}
function digits(value) {
  if (value === 0) return "0";
  return Math.abs(value) < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
}
// A wide chart lists every line at the point under the pointer; on a phone that list would cover the chart.
const isWide = (element) => element.clientWidth > 700;
