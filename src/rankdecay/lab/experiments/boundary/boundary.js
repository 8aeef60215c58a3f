// The boundaries at best strength, a point and an interval per arm.

chart("boundaries-chart", [], (element) => {
  const { text, muted } = theme();
  const shown = run.best.filter((item) => !state.hidden.has(item.arm));
  const ends = shown.flatMap((item) => [item.at, item.low, item.high]).filter((value) => value > 0);
  const [least, most] = [Math.min(...ends) / 1.12, Math.max(...ends) * 1.12];
  // An end that the grid leaves open runs to the edge of the picture.
  const low = (item) => item.low ?? least;
  const high = (item) => item.high ?? most;
  const names = shown.map((item) => plainText(run.arms[item.arm].label));
  const symbols = { below: "triangle-left", above: "triangle-right" };
  const thin = (_, index) => index % Math.ceil(run.ticks.length / (isWide(element) ? 14 : 6)) === 0;
  element.style.height = `${46 + 26 * shown.length}px`;
  const intervals = shown.map((item, index) => ({
    x: [low(item), high(item)],
    y: [index, index],
    mode: "lines",
    hoverinfo: "skip",
    line: { color: armColor(item.arm), width: 5 },
    opacity: 0.35,
  }));
  const points = {
    x: shown.map((item) => item.at),
    y: shown.map((_, index) => index),
    mode: "markers",
    customdata: shown.map((item, index) => `${names[index]}: ${item.words}`),
    marker: {
      size: shown.map((item) => (item.censored ? 13 : 10)),
      opacity: 1,
      color: shown.map((item) => armColor(item.arm)),
      symbol: shown.map((item) => symbols[item.censored] || "circle"),
    },
    hovertemplate: "%{customdata}<extra></extra>",
  };
  plot(element, [...intervals, points], {
    margin: { l: 10, r: 16, t: 4, b: 40 },
    hovermode: "closest",
    dragmode: false,
    xaxis: {
      type: "log",
      range: [Math.log10(least), Math.log10(most)],
      title: { text: plainText(run.data), standoff: 6 },
      tickvals: run.ticks.filter(thin),
      ticktext: run.rows.filter(thin),
      color: muted,
    },
    yaxis: {
      tickvals: shown.map((_, index) => index),
      ticktext: names,
      autorange: false,
      range: [shown.length - 0.5, -0.5],
      tickfont: { color: text },
      showgrid: false,
    },
  });
});
