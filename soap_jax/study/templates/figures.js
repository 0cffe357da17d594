const { specs, longest } = JSON.parse(document.getElementById("specs").textContent);

function draw(name, linear) {
  const place = document.getElementById("plot-" + name);
  const text = JSON.stringify(specs[name]);
  const spec = JSON.parse(linear ? text.replaceAll('"type":"log"', '"type":"linear"') : text);
  spec.width = "container";
  spec.config.legend.columns = Math.max(1, Math.floor((place.clientWidth - 60) / (30 + 6 * longest)));
  vegaEmbed(place, spec, {
    renderer: "svg",
    ast: true, // expressions are read, not run: the page allows no eval
    actions: { export: true, source: false, compiled: false, editor: false },
    downloadFileName: name,
  });
}

for (const name of Object.keys(specs)) {
  draw(name, false);
  if (JSON.stringify(specs[name]).includes('"type":"log"')) {
    const button = document.createElement("button");
    button.textContent = "Linear axes";
    button.setAttribute("aria-pressed", "false");
    button.onclick = () => {
      const linear = button.getAttribute("aria-pressed") === "false";
      button.setAttribute("aria-pressed", linear);
      draw(name, linear);
    };
    document.getElementById("plot-" + name).before(button);
  }
}
