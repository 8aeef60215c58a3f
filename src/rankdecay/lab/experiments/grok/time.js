// Time: the slider and the play button, and what the chosen snapshot holds.

const time = run.time;
state.step = time.steps.length - 1;

// The chosen seed's row of every visible arm in the snapshot at the slider; `row` is null where it has left the batch.
function membersNow(name) {
  const frame = time.frames[state.step];
  return time.members
    .map((member, index) => ({ ...member, row: frame[name] ? frame[name][index] : null }))
    .filter((member) => !state.hidden.has(member.arm));
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
  slider.value = state.step; // browsers keep an old position over a reload
  let timer = null;
  const stop = () => {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  };
  slider.addEventListener("input", () => {
    stop();
    goTo(Number(slider.value));
  });
  play.addEventListener("click", () => {
    if (timer) return stop();
    const last = time.steps.length - 1;
    if (state.step === last) goTo(0);
    play.textContent = "Pause";
    timer = setInterval(() => (state.step < last ? goTo(state.step + 1) : stop()), 400);
  });
  slider.setAttribute("aria-valuetext", `step ${time.steps[state.step]}`);
}

startTimeline();
