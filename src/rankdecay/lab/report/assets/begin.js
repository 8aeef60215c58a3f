// The last script of a page: everything is declared, so it can be drawn.

darkModeSwitch.addEventListener("change", () => {
  drawLegends();
  changed("theme");
});
drawLegends();
watchCharts();
