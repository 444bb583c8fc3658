// Draws the charts of a page with the Vega bundle beside it, and again when the reader changes the theme.
(function () {
  const root = document.documentElement;
  const charts = () => document.querySelectorAll("div.chart > script[type='application/json']");

  function theme() {
    const dark = root.dataset.theme === "dark";
    const ink = dark ? "#d7dae0" : "#22262e", faint = dark ? "#3a3f4b" : "#e3e5ea";
    const text = { labelColor: ink, titleColor: ink, labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal" };
    return {
      background: "transparent",
      font: "system-ui, sans-serif",
      title: { color: ink, subtitleColor: ink, fontSize: 15, subtitleFontSize: 12, subtitlePadding: 4, offset: 12 },
      axis: { ...text, gridColor: faint, domainColor: faint, tickColor: faint, labelLimit: 260,
              labelSeparation: 8 },
      legend: { ...text, labelLimit: 220 },
      header: text,
      view: { stroke: "transparent" },
      text: { color: ink },
    };
  }

  // A chart a little wider than its column is drawn smaller; one much wider scrolls, for its words must stay legible.
  function fit(drawing) {
    const picture = drawing.querySelector("svg.marks");
    if (!picture) return;
    picture.style.maxWidth = "100%";
    picture.style.minWidth = 0.75 * picture.getAttribute("width") + "px";
    picture.style.height = "auto";
  }

  function draw() {
    if (!window.vegaEmbed) return;
    charts().forEach((script) => {
      const options = {
        config: theme(), renderer: "svg",
        actions: { export: true, source: false, compiled: false, editor: false },
        downloadFileName: "chart",
      };
      const drawing = script.previousElementSibling;
      window.vegaEmbed(drawing, JSON.parse(script.textContent), options).then(() => fit(drawing)).catch((error) => {
        drawing.textContent = "This chart could not be drawn: " + error;
      });
    });
  }

  document.addEventListener("DOMContentLoaded", function () {
    if (!charts().length) return;
    const bundle = document.createElement("script");
    bundle.src = root.dataset.content_root + "_static/vega.js";
    bundle.onload = draw;
    document.head.appendChild(bundle);
    new MutationObserver(draw).observe(root, { attributes: true, attributeFilter: ["data-theme"] });
  });
})();
