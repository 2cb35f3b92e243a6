// Draws every figure of the page in the colours of the moment: light, dark, or paper.
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const inks = {
    light: { text: "#3d4450", grid: "#e7e9ee", box: "#ffffff" },
    dark: { text: "#c3c9d4", grid: "#2c323d", box: "#1d222b" },
  };
  const font = getComputedStyle(document.body).fontFamily;
  const config = {
    responsive: true,
    displayModeBar: false,
  };

  function themed(layout, ink) {
    const result = {
      ...layout,
      font: { family: font, size: 12, color: ink.text },
      hoverlabel: { bgcolor: ink.box, bordercolor: ink.grid, font: { family: font, color: ink.text } },
    };
    for (const key of Object.keys(layout)) {
      if (/^[xy]axis/.test(key)) result[key] = { ...layout[key], gridcolor: ink.grid, linecolor: ink.grid };
    }
    return result;
  }

  function draw(ink, width) {
    for (const place of document.querySelectorAll(".plot")) {
      const spec = JSON.parse(place.nextElementSibling.textContent);
      const layout = { ...themed(spec.layout, ink), width };
      Plotly.react(place, spec.data, layout, config);
    }
  }

  const onScreen = () => draw(dark.matches ? inks.dark : inks.light);
  onScreen();
  dark.addEventListener("change", onScreen);
  addEventListener("beforeprint", () => draw(inks.light, 640));
  addEventListener("afterprint", onScreen);
})();
