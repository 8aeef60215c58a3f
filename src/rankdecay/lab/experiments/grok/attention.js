// Attention maps: a grid of heat maps, arms down and heads across, all on one scale from 0 to 1.

chart("attention-chart", ["step", "seed", "layer"], (element) => {
  const maps = membersNow("attention").filter((member) => String(member.seed) === state.seed && member.row);
  const heads = time.attention_shape[1];
  const width = element.clientWidth;
  const { map, text, muted } = theme();
  const tickFont = { size: width < 600 ? 10 : 12 };
  const longest = Math.max(...time.groups.map((name) => name.length), 3);
  const left = Math.min(longest * (width < 600 ? 5.8 : 7) + 10, width * 0.25);
  const longestPosition = Math.max(...time.positions.map((name) => name.length), 1);
  const [top, bottom, titleHeight, gap] = [26, longestPosition * 6.2 + 14, 24, 10];
  const rowHeight = Math.max(70, time.groups.length * 15);
  const height = top + bottom + maps.length * (rowHeight + titleHeight + gap);
  const inner = height - top - bottom;
  const more = {
    height,
    margin: { l: left, r: 4, t: top, b: bottom },
    hovermode: "closest",
    dragmode: false,
    annotations: [],
  };
  const traces = [];
  maps.forEach((member, index) => {
    const ceiling = 1 - (index * (rowHeight + titleHeight + gap) + titleHeight) / inner;
    const floor = ceiling - rowHeight / inner;
    const label = plainText(run.arms[member.arm].label);
    more.annotations.push({
      text: `<b>${label}</b>`,
      x: 0,
      y: ceiling,
      xref: "paper",
      yref: "paper",
      xanchor: "left",
      yanchor: "bottom",
      showarrow: false,
      font: { size: 12.5, color: armColor(member.arm) },
    });
    for (let head = 0; head < heads; head += 1) {
      const number = traces.length ? traces.length + 1 : "";
      const share = 1 / heads;
      const space = head ? 0.006 : 0;
      traces.push({
        type: "heatmap",
        z: member.row[Number(state.layer)][head],
        x: time.positions.map(plainText),
        y: time.groups.map(plainText),
        xaxis: `x${number}`,
        yaxis: `y${number}`,
        zmin: 0,
        zmax: 1,
        showscale: false,
        xgap: 1,
        ygap: 1,
        meta: `${label}, head ${head + 1}`,
        colorscale: map.map((color, step) => [step / 2, color]),
        hovertemplate: "%{meta}<br>%{y} → %{x}: %{z:.2f}<extra></extra>",
      });
      const shared = {
        showgrid: false,
        zeroline: false,
        showline: false,
        ticks: "",
        fixedrange: true,
        automargin: false,
        tickfont: tickFont,
        ticklabelstandoff: 5,
      };
      more[`xaxis${number}`] = {
        ...shared,
        type: "category",
        domain: [head * share + space, (head + 1) * share - 0.006],
        anchor: `y${number}`,
        tickangle: -90,
        showticklabels: index === maps.length - 1,
      };
      more[`yaxis${number}`] = {
        ...shared,
        type: "category",
        domain: [Math.max(0, floor), ceiling],
        anchor: `x${number}`,
        autorange: "reversed",
        showticklabels: head === 0,
      };
      if (index === 0) {
        more.annotations.push({
          text: `head ${head + 1}`,
          x: (head + 0.5) * share,
          y: 1,
          xref: "paper",
          yref: "paper",
          xanchor: "center",
          yanchor: "bottom",
          showarrow: false,
          font: { size: 12, color: muted },
        });
      }
    }
  });
  element.style.height = `${height}px`;
  plot(element, traces, more);
});
