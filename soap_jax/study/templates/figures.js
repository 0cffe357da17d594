const { specs, longest } = JSON.parse(document.getElementById("specs").textContent);

function draw(name, linear) {
  const place = document.getElementById("plot-" + name);
  const text = JSON.stringify(specs[name]);
  const spec = JSON.parse(linear ? text.replaceAll('"type":"log"', '"type":"linear"') : text);
  spec.width = "container"; // follows the width of the page
  spec.config.legend.columns = Math.max(1, Math.floor((place.clientWidth - 60) / (30 + 6 * longest)));
  vegaEmbed(place, spec, {
    renderer: "svg",
    ast: true, // expressions are interpreted, since the page does not allow eval
    actions: { export: true, source: false, compiled: false, editor: false },
    downloadFileName: name,
  });
}

for (const name of Object.keys(specs)) {
  const logs = JSON.stringify(specs[name]).includes('"type":"log"');
  const button = document.createElement("button");
  button.textContent = "Linear axes";
  button.setAttribute("aria-pressed", "false");
  const redraw = () => draw(name, button.getAttribute("aria-pressed") === "true");
  button.onclick = () => {
    button.setAttribute("aria-pressed", button.getAttribute("aria-pressed") === "false");
    redraw();
  };
  if (logs) document.getElementById("plot-" + name).before(button);
  matchMedia("(max-width: 40rem)").addEventListener("change", redraw); // when a phone is turned
  redraw();
}
