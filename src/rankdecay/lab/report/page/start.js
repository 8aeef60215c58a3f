// Controls: every select, the slider, the play button and the legends write to `state` and say what changed.

function sample(arm) {
  const dashes = { solid: "", dash: "6 3", dot: "2 3", dashdot: "6 2 2 2", longdash: "9 3", longdashdot: "9 2 2 2" };
  const holder = document.createElement("span");
  holder.innerHTML = `<svg width="26" height="10" aria-hidden="true"><line x1="1" y1="5" x2="25" y2="5" stroke-width="3"/></svg>`;
  const line = holder.querySelector("line");
  line.setAttribute("stroke", armColor(arm));
  line.setAttribute("stroke-dasharray", dashes[run.arms[arm].dash] || "");
  return holder.firstChild;
}

function drawLegends() {
  for (const legend of document.querySelectorAll(".legend")) {
    const focused = [...legend.children].indexOf(document.activeElement);
    legend.replaceChildren(...run.arms.map((item, arm) => {
      const button = document.createElement("button");
      button.type = "button";
      button.setAttribute("aria-pressed", String(!state.hidden.has(arm)));
      button.append(sample(arm), item.label);
      button.addEventListener("click", () => {
        if (!state.hidden.delete(arm)) state.hidden.add(arm);
        drawLegends();
        changed("hidden");
      });
      return button;
    }));
    if (focused >= 0) legend.children[focused].focus();
  }
}

function goTo(step) {
  state.step = step;
  const slider = document.getElementById("step-slider");
  slider.value = step;
  slider.setAttribute("aria-valuetext", `step ${time.steps[step]}`);
  document.getElementById("step-output").textContent = time.steps[step].toLocaleString("en");
  changed("step");
}

function startTimeline() {
  const slider = document.getElementById("step-slider");
  const play = document.getElementById("play");
  if (!slider) return;
  slider.value = state.step; // browsers keep an old position over a reload
  let timer = null;
  const stop = () => {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  };
  slider.addEventListener("input", () => { stop(); goTo(Number(slider.value)); });
  play.addEventListener("click", () => {
    if (timer) return stop();
    const last = time.steps.length - 1;
    if (state.step === last) goTo(0);
    play.textContent = "Pause";
    timer = setInterval(() => (state.step < last ? goTo(state.step + 1) : stop()), 400);
  });
  slider.setAttribute("aria-valuetext", `step ${time.steps[state.step]}`);
}

for (const select of document.querySelectorAll("select[data-state]")) {
  select.selectedIndex = 0; // browsers keep an old choice over a reload
  state[select.dataset.state] = select.value;
  select.addEventListener("change", () => {
    state[select.dataset.state] = select.value;
    changed(select.dataset.state);
  });
}
darkMode.addEventListener("change", () => { drawLegends(); changed("theme"); });
drawLegends();
startTimeline();
watchCharts();
