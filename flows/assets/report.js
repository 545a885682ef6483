"use strict";

const root = document.documentElement;
const find = (query, within = document) => within.querySelector(query);
const all = (query, within = document) => [...within.querySelectorAll(query)];

// -- theme: the system's, until the button is pressed

const system = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);

function showTheme() {
  find("#theme").textContent = isDark() ? "Light" : "Dark";
  find("#theme").setAttribute("aria-label", `Switch to the ${isDark() ? "light" : "dark"} theme`);
  find("#theme").setAttribute("aria-pressed", isDark());
  for (const redraw of drawn.values()) redraw();
}

find("#theme").addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  try { localStorage.setItem("vae-flows-theme", root.dataset.theme); } catch { /* a page from disk may have no storage */ }
  showTheme();
});
system.addEventListener("change", () => showTheme());

// -- films: a slider moves along the frames of a strip

for (const film of all(".film")) {
  const { captions } = JSON.parse(film.dataset.film);
  const [frame, input, output, strip] = [".frame", "input", "output", ".strip"].map((query) => find(query, film));
  if (strip) frame.style.backgroundImage = `url(${strip.src})`;
  const show = () => {
    frame.style.setProperty("--at", input.value);
    output.textContent = captions[input.value];
    input.setAttribute("aria-valuetext", captions[input.value]);
  };
  input.addEventListener("input", show);
  show();
}

// -- charts: drawn when they come near, and anew when the theme changes

const drawn = new Map();

function colours() {
  const style = getComputedStyle(document.body);
  const rule = getComputedStyle(find("footer")).borderTopColor;
  return { paper: style.backgroundColor, ink: style.color, soft: getComputedStyle(find(".kind")).color, rule };
}

function themed(layout) {
  const { ink, soft, rule } = colours();
  const axis = { gridcolor: rule, linecolor: rule, zeroline: false, tickcolor: rule, automargin: true };
  return {
    ...layout,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(find("nav")).fontFamily, size: 12, color: soft },
    margin: { l: 8, r: 8, t: 8, b: 8 },
    xaxis: { ...axis, showgrid: false, ...layout.xaxis },
    yaxis: { ...axis, ...layout.yaxis },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { color: ink } },
    hoverlabel: { font: { size: 12 } },
  };
}

function drawChart(place) {
  const { data, layout } = JSON.parse(find(`#plot-${place.dataset.plot}`).textContent);
  const draw = () => Plotly.react(place, structuredClone(data), themed(layout), { displayModeBar: false, responsive: true });
  drawn.set(place, draw);
  draw();
}

// -- the latent map

function drawMap() {
  const points = JSON.parse(find("#points").textContent);
  const map = find("#latent-map");
  const canvas = find(".canvas", map);
  const ring = find(".ring", map);
  const card = find(".hover", map);
  const count = points.ids.length;
  const hidden = new Set();
  const state = { colour: points.legend.length > 1 ? "label" : "score", projection: Object.keys(points.projections)[0], at: null };
  const members = points.legend.map((_, kind) => points.label.flatMap((own, point) => (own === kind ? [point] : [])));
  const position = () => points.projections[state.projection];
  const type = hasWebGL() ? "scattergl" : "scatter";

  const traces = () => members.map((own, kind) => ({
    type,
    mode: "markers",
    x: own.map((point) => position().x[point]),
    y: own.map((point) => position().y[point]),
    customdata: own,
    visible: !hidden.has(kind),
    hoverinfo: "none",
    marker: {
      size: count > 2000 ? 4 : 7,
      opacity: 0.75,
      symbol: points.legend[kind].symbol,
      ...(state.colour === "label"
        ? { color: points.legend[kind].color }
        : { color: own.map((point) => points.score[point]), coloraxis: "coloraxis" }),
    },
  }));

  const layout = () => {
    const sorted = Float64Array.from(points.score).sort();
    const bar = { thickness: 12, outlinewidth: 0, title: { text: points.scoreName, side: "right" } };
    const limits = { cmin: sorted[Math.floor(count * 0.02)], cmax: sorted[Math.floor((count - 1) * 0.98)] };
    return {
      ...themed({ xaxis: bare(), yaxis: { ...bare(), scaleanchor: "x" } }),
      showlegend: false,
      hovermode: "closest",
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "pan",
      uirevision: state.projection,
      coloraxis: { colorscale: "Cividis", ...limits, showscale: state.colour === "score", colorbar: bar },
      annotations: state.colour === "label" && members.length > 1 ? names() : [],
    };
  };
  const bare = () => ({ showticklabels: false, showgrid: false, zeroline: false, showline: false, ticks: "" });

  // Each label's name at the middle of its points, so that colour is not all that tells them apart.
  const names = () => members.flatMap((own, kind) => {
    if (!own.length || hidden.has(kind)) return [];
    const middle = (values) => own.map((point) => values[point]).sort((a, b) => a - b)[own.length >> 1];
    const { paper, ink } = colours();
    const name = points.legend[kind].name;
    return [{
      x: middle(position().x), y: middle(position().y), text: plain(name.length > 18 ? `${name.slice(0, 17)}…` : name),
      showarrow: false, font: { color: ink, size: 12 }, bgcolor: paper, opacity: 0.85, borderpad: 2, captureevents: false,
    }];
  });

  const draw = () => Plotly.react(canvas, traces(), layout(), { displayModeBar: false, responsive: true, scrollZoom: true, doubleClick: "reset" });

  const pixel = (point) => {
    const { xaxis, yaxis } = canvas._fullLayout;
    return [xaxis.d2p(position().x[point]) + xaxis._offset, yaxis.d2p(position().y[point]) + yaxis._offset];
  };

  const hide = () => { ring.hidden = card.hidden = true; };

  const show = (point) => {
    state.at = point;
    const [left, top] = pixel(point);
    const { columns, width, height, uri } = points.sprite;
    const scale = Math.max(1, Math.floor(112 / Math.max(width, height)));
    const thumb = find(".thumb", card);
    const rows = Math.ceil(count / columns);
    if (!thumb.style.backgroundImage) thumb.style.backgroundImage = `url(${uri})`;
    thumb.style.width = `${width * scale}px`;
    thumb.style.height = `${height * scale}px`;
    thumb.style.backgroundSize = `${columns * width * scale}px ${rows * height * scale}px`;
    thumb.style.backgroundPosition = `${-(point % columns) * width * scale}px ${-Math.floor(point / columns) * height * scale}px`;
    const label = points.labels.length ? points.labels[point] : points.legend[points.label[point]].name;
    find(".label", card).textContent = label === "no label" ? "" : label;
    find(".score", card).textContent = `${points.scoreName} ${String(points.score[point]).replace("-", "−")} nats`;
    find(".id", card).textContent = points.ids[point];
    ring.hidden = card.hidden = false;
    ring.style.left = `${left}px`;
    ring.style.top = `${top}px`;
    const beside = left + 16 + card.offsetWidth > map.clientWidth ? left - 16 - card.offsetWidth : left + 16;
    card.style.left = `${Math.max(4, Math.min(beside, map.clientWidth - card.offsetWidth - 4))}px`;
    card.style.top = `${Math.max(4, Math.min(top - 24, map.clientHeight - card.offsetHeight - 4))}px`;
  };

  const zoom = (factor) => {
    const ranges = {};
    for (const name of ["xaxis", "yaxis"]) {
      const [from, to] = canvas._fullLayout[name].range;
      const [middle, half] = [(from + to) / 2, ((to - from) / 2) * factor];
      ranges[`${name}.range`] = [middle - half, middle + half];
    }
    Plotly.relayout(canvas, ranges);
  };
  const reset = () => Plotly.relayout(canvas, { "xaxis.autorange": true, "yaxis.autorange": true });

  // The nearest visible point that lies in a direction, within 45 degrees of it.
  const step = (dx, dy) => {
    const [x0, y0] = state.at === null ? [map.clientWidth / 2, map.clientHeight / 2] : pixel(state.at);
    let [best, nearest] = [null, Infinity];
    for (let point = 0; point < count; point++) {
      if (point === state.at || hidden.has(points.label[point])) continue;
      const [x, y] = pixel(point);
      if (x < 0 || y < 0 || x > map.clientWidth || y > map.clientHeight) continue;
      const [along, across] = [(x - x0) * dx + (y - y0) * dy, Math.abs((x - x0) * dy + (y - y0) * dx)];
      if (state.at !== null && (along < 2 || across > along)) continue;
      const distance = Math.hypot(x - x0, y - y0);
      if (distance < nearest) [best, nearest] = [point, distance];
    }
    if (best !== null) show(best);
  };

  drawn.set(canvas, draw);
  draw().then(() => {
    canvas.on("plotly_hover", (event) => show(event.points[0].customdata));
    canvas.on("plotly_click", (event) => show(event.points[0].customdata));
    canvas.on("plotly_unhover", hide);
    canvas.on("plotly_relayouting", hide);
    canvas.on("plotly_relayout", hide);
    root.dataset.ready = Math.round(performance.now());
  });

  const legend = find(".legend");
  points.legend.forEach((one, kind) => {
    if (points.legend.length < 2) return;
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-pressed", "true");
    const swatch = Object.assign(document.createElement("i"), { className: one.symbol });
    swatch.style.background = one.color;
    const number = Object.assign(document.createElement("small"), { textContent: ` ${one.count.toLocaleString("en")}` });
    button.append(swatch, one.name, number);
    button.addEventListener("click", () => {
      if (!hidden.delete(kind)) hidden.add(kind);
      button.setAttribute("aria-pressed", !hidden.has(kind));
      hide();
      draw();
    });
    const item = document.createElement("li");
    item.append(button);
    legend.append(item);
  });

  find("#colour").value = state.colour;
  for (const name of ["colour", "projection"]) {
    find(`#${name}`)?.addEventListener("change", (event) => { state[name] = event.target.value; hide(); draw(); });
  }
  find("#closer").addEventListener("click", () => zoom(0.6));
  find("#farther").addEventListener("click", () => zoom(1 / 0.6));
  find("#all").addEventListener("click", reset);
  const keys = {
    ArrowLeft: () => step(-1, 0), ArrowRight: () => step(1, 0), ArrowUp: () => step(0, -1), ArrowDown: () => step(0, 1),
    "+": () => zoom(0.6), "=": () => zoom(0.6), "-": () => zoom(1 / 0.6), 0: reset, Escape: hide,
  };
  map.addEventListener("keydown", (event) => {
    if (!(event.key in keys) || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    keys[event.key]();
  });
  map.addEventListener("blur", hide);
}

function hasWebGL() {
  try { return Boolean(document.createElement("canvas").getContext("webgl")); } catch { return false; }
}

// Plotly reads text as a little HTML.
function plain(text) {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

function start() {
  const near = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      near.unobserve(target);
      drawChart(target);
    }
  }, { rootMargin: "400px" });
  for (const place of all(".plot")) near.observe(place);
  addEventListener("beforeprint", () => all(".plot").filter((place) => !drawn.has(place)).forEach(drawChart));
  drawMap();
}

try { root.dataset.theme = localStorage.getItem("vae-flows-theme") ?? ""; } catch { /* as above */ }
if (!root.dataset.theme) delete root.dataset.theme;
showTheme();
