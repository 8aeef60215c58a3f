// Legends: one per chart, all the same; a name hides or shows its arm everywhere on the page.

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
    legend.replaceChildren(
      ...run.arms.map((item, arm) => {
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
      }),
    );
    if (focused >= 0) legend.children[focused].focus();
  }
}
