// Charts by plotly, in the colours of the page.

// Plotly reads a little markup in its text; a name is only ever text.
const plainText = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

function hoverText(element, name, along) {
  const text = isWide(element) ? "%{customdata}" : `<b>%{meta}</b><br>${along} %{x}: %{customdata}<extra></extra>`;
  return { name, meta: name, hovertemplate: text };
}

function layout(element, more) {
  const { background, text, muted, rule, grid } = theme();
  const axis = {
    gridcolor: grid,
    linecolor: rule,
    zeroline: false,
    tickcolor: rule,
    automargin: true,
    fixedrange: coarsePointer,
  };
  const { xaxis = {}, yaxis = {}, ...rest } = more;
  return {
    width: element.clientWidth,
    height: element.clientHeight,
    uirevision: "keep",
    showlegend: false,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: muted },
    margin: { l: 44, r: 20, t: 10, b: 40 },
    dragmode: coarsePointer ? false : "zoom",
    hovermode: isWide(element) ? "x unified" : "closest",
    hoverlabel: {
      bgcolor: background,
      bordercolor: rule,
      font: { color: text, size: 12.5 },
      align: "left",
      namelength: -1,
    },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: muted, activecolor: text },
    xaxis: { ...axis, spikecolor: muted, spikethickness: 1, spikedash: "solid", ...xaxis },
    yaxis: { ...axis, ...yaxis },
    ...rest,
  };
}

function plot(element, traces, more) {
  Plotly.react(element, traces, layout(element, more), {
    displaylogo: false,
    displayModeBar: coarsePointer ? false : "hover",
    modeBarButtons: [["toImage", "resetScale2d"]],
    toImageButtonOptions: { format: "svg", filename: element.id },
  });
}
