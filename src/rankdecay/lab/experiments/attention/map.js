// The loss of every pair of decays, of attention and of the MLPs: the stronger the colour, the less.

chart("mlp-chart", ["mapped", "norm"], (element) => {
  const cells = run.map.filter(
    (cell) => cell.arm === Number(state.mapped) && (!state.norm || cell.norm === state.norm),
  );
  const strengths = [...new Set(cells.map((cell) => cell.strength))].sort((a, b) => a - b);
  const mlps = [...new Set(cells.map((cell) => cell.mlp))];
  const at = (mlp, strength) => cells.find((cell) => cell.mlp === mlp && cell.strength === strength);
  const grid = (value) =>
    mlps.map((mlp) => strengths.map((strength) => (at(mlp, strength) ? value(at(mlp, strength)) : null)));
  const colors = theme().map;
  const trace = {
    type: "heatmap",
    x: strengths.map(String),
    y: mlps,
    z: grid((cell) => cell.loss),
    text: grid((cell) => (isKnown(cell.loss) ? String(cell.loss) : "")),
    customdata: grid((cell) => `<b>${plainText(cell.words)}</b><br>${plainText(cell.quality)}`),
    texttemplate: !isWide(element) && strengths.length > 5 ? "" : "%{text}",
    hovertemplate: "%{customdata}<extra></extra>",
    colorscale: colors.map((color, index) => [index / (colors.length - 1), color]),
    reversescale: true,
    showscale: false,
    xgap: 2,
    ygap: 2,
    hoverongaps: false,
  };
  const lost = cells.filter((cell) => !isKnown(cell.loss));
  element.style.height = `${90 + 52 * mlps.length}px`;
  plot(element, [trace], {
    hovermode: "closest",
    annotations: lost.map((cell) => ({ x: String(cell.strength), y: cell.mlp, text: "diverged", showarrow: false })),
    xaxis: { type: "category", title: { text: "decay of attention", standoff: 6 }, showgrid: false },
    yaxis: { type: "category", title: { text: "decay of the MLPs", standoff: 8 }, showgrid: false },
  });
});
