// The slider and the play button of the page of a run; then everything begins.

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

darkMode.addEventListener("change", () => { drawLegends(); changed("theme"); });
drawLegends();
startTimeline();
watchCharts();
