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

// The library is text until the first chart needs it: to read its five megabytes takes a second.
function library() {
  if (window.Plotly) return;
  const script = document.createElement("script");
  script.textContent = find("#library").textContent;
  document.head.append(script);
}

function drawChart(place) {
  library();
  const { data, layout } = JSON.parse(find(`#plot-${place.dataset.plot}`).textContent);
  const draw = () => Plotly.react(place, structuredClone(data), themed(layout), { displayModeBar: false, responsive: true });
  drawn.set(place, draw);
  draw();
}

// -- the latent map: on a canvas of its own, since plotly alone takes a second to start and WebGL may be missing

const CIVIDIS = ["#00204d", "#00336f", "#39486b", "#575c6d", "#707173", "#8a8779", "#a69d75", "#c4b56c", "#e4cf5b", "#ffea46"];
// Without the end that would vanish against the paper.
const shades = () => (isDark() ? CIVIDIS.slice(3) : CIVIDIS.slice(0, -2));
let latentMap = null;

class LatentMap {
  constructor(points, place) {
    Object.assign(this, { points, place, hidden: new Set(), at: null, medians: {} });
    this.canvas = find("canvas", place);
    this.context = this.canvas.getContext("2d");
    this.projection = Object.keys(points.projections)[0];
    this.colour = points.legend.length > 1 ? "label" : "score";
    this.count = points.ids.length;
    const sorted = Float64Array.from(points.score).sort();
    this.limits = [sorted[Math.floor((this.count - 1) * 0.02)], sorted[Math.ceil((this.count - 1) * 0.98)]];
    new ResizeObserver(() => this.resize()).observe(place);
    this.resize();
  }

  get xy() { return this.points.projections[this.projection]; }

  visible(point) { return !this.hidden.has(this.points.label[point]); }

  resize() {
    const scale = devicePixelRatio || 1;
    [this.width, this.height] = [this.place.clientWidth, this.place.clientHeight];
    [this.canvas.width, this.canvas.height] = [this.width * scale, this.height * scale];
    this.context.setTransform(scale, 0, 0, scale, 0, 0);
    this.reset();
  }

  // Both axes at one scale, all points in view.
  reset() {
    const { x, y } = this.xy;
    const [left, right, low, high] = [Math.min(...x), Math.max(...x), Math.min(...y), Math.max(...y)];
    this.scale = this.whole = 0.93 * Math.min(this.width / (right - left || 1), this.height / (high - low || 1));
    this.middle = [(left + right) / 2, (low + high) / 2];
    this.draw();
  }

  // Of a point, in pixels of the page: small where there are many, larger as one zooms in.
  get radius() { return (this.count > 2000 ? 2 : 3.5) * Math.max(1, Math.min(3, Math.sqrt(this.scale / this.whole))); }

  // Where a place of the projection is on the map, in pixels of the page.
  placeOf(x, y) {
    const [x0, y0] = this.middle;
    return [(x - x0) * this.scale + this.width / 2, (y0 - y) * this.scale + this.height / 2];
  }

  pixel(point) { return this.placeOf(this.xy.x[point], this.xy.y[point]); }

  zoom(factor, left = this.width / 2, top = this.height / 2) {
    const [dx, dy] = [(left - this.width / 2) / this.scale, (this.height / 2 - top) / this.scale];
    this.middle = [this.middle[0] + dx * (1 - 1 / factor), this.middle[1] + dy * (1 - 1 / factor)];
    this.scale *= factor;
    this.draw();
  }

  pan(dx, dy) {
    this.middle = [this.middle[0] - dx / this.scale, this.middle[1] + dy / this.scale];
    this.draw();
  }

  draw() {
    if (this.asked) return;
    this.asked = requestAnimationFrame(() => { this.asked = 0; this.paint(); });
  }

  // By pixels: ten thousand pictures a frame, drawn one by one, would take four times as long.
  paint() {
    const { context, canvas, points, middle: [x0, y0], xy: { x, y } } = this;
    const [{ width, height }, ratio, paper] = [canvas, devicePixelRatio || 1, rgb(colours().paper)];
    if (!width || !height) return; // not laid out yet, or hidden
    const size = this.radius * ratio;
    const picture = context.createImageData(width, height);
    new Uint32Array(picture.data.buffer).fill(new Uint32Array(Uint8Array.of(...paper, 255).buffer)[0]);
    const byLabel = this.colour === "label";
    const stamps = byLabel
      ? points.legend.map((one) => stamp(one.color, one.symbol, size))
      : shades().map((color) => stamp(color, "circle", size));
    for (let point = 0; point < this.count; point++) {
      if (!this.visible(point)) continue;
      const left = Math.round(((x[point] - x0) * this.scale + this.width / 2) * ratio);
      const top = Math.round(((y0 - y[point]) * this.scale + this.height / 2) * ratio);
      press(stamps[byLabel ? points.label[point] : this.shade(points.score[point], stamps.length)], picture, left, top);
    }
    context.putImageData(picture, 0, 0);
    if (byLabel && points.legend.length > 1) this.name();
    this.hide();
  }

  // Which of so many shades a score gets.
  shade(score, count) {
    const [low, high] = this.limits;
    return Math.max(0, Math.min(count - 1, Math.floor(((score - low) / (high - low || 1)) * count)));
  }

  // Each label's name at the middle of its points, so that colour is not all that tells them apart.
  name() {
    const { context, points } = this;
    const { paper, ink } = colours();
    context.font = `600 13px ${getComputedStyle(find("nav")).fontFamily}`;
    Object.assign(context, { textAlign: "center", textBaseline: "middle", lineWidth: 4, lineJoin: "round", strokeStyle: paper, fillStyle: ink });
    const taken = [];
    points.legend.forEach((one, kind) => {
      if (this.hidden.has(kind)) return;
      let [left, top] = this.placeOf(...this.centres[kind]);
      const name = one.name.length > 18 ? `${one.name.slice(0, 17)}…` : one.name;
      const half = context.measureText(name).width / 2;
      const clashes = (other) => Math.abs(other.left - left) < other.half + half + 4 && Math.abs(other.top - top) < 15;
      while (taken.some(clashes)) top += 3;
      taken.push({ left, top, half });
      context.strokeText(name, left, top);
      context.fillText(name, left, top);
    });
  }

  // The median of each label's points, found once for each projection.
  get centres() {
    const { label, legend } = this.points;
    const median = (values) => values.sort((a, b) => a - b)[values.length >> 1];
    return (this.medians[this.projection] ??= legend.map((_, kind) =>
      [this.xy.x, this.xy.y].map((axis) => median(axis.filter((_, point) => label[point] === kind)))));
  }

  nearest(left, top, within, fits = () => true) {
    let [best, shortest] = [null, within];
    for (let point = 0; point < this.count; point++) {
      if (!this.visible(point)) continue;
      const [x, y] = this.pixel(point);
      const distance = Math.hypot(x - left, y - top);
      if (distance < shortest && x >= 0 && y >= 0 && x <= this.width && y <= this.height && fits(point, x - left, y - top)) {
        [best, shortest] = [point, distance];
      }
    }
    return best;
  }

  // To the nearest point that lies within 45 degrees of a direction.
  stepTo(dx, dy) {
    const [left, top] = this.at === null ? [this.width / 2, this.height / 2] : this.pixel(this.at);
    const ahead = (point, x, y) => this.at === null || (point !== this.at && x * dx + y * dy > 2 && Math.abs(x * dy + y * dx) <= x * dx + y * dy);
    const found = this.nearest(left, top, Infinity, ahead);
    if (found !== null) this.show(found);
  }

  hide() {
    find(".ring", this.place).hidden = find(".hover", this.place).hidden = true;
  }

  show(point) {
    this.at = point;
    const { points, place } = this;
    const [ring, card] = [find(".ring", place), find(".hover", place)];
    const { columns, width, height, uri } = points.sprite;
    const scale = Math.max(1, Math.floor(112 / Math.max(width, height)));
    const thumb = find(".thumb", card);
    if (!thumb.style.backgroundImage) thumb.style.backgroundImage = `url(${uri})`;
    Object.assign(thumb.style, {
      width: `${width * scale}px`,
      height: `${height * scale}px`,
      backgroundSize: `${columns * width * scale}px ${Math.ceil(this.count / columns) * height * scale}px`,
      backgroundPosition: `${-(point % columns) * width * scale}px ${-Math.floor(point / columns) * height * scale}px`,
    });
    const label = points.labels.length ? points.labels[point] : points.legend[points.label[point]].name;
    find(".label", card).textContent = label === "no label" ? "" : label;
    find(".score", card).textContent = `${points.scoreName} ${String(points.score[point]).replace("-", "−")} nats`;
    find(".id", card).textContent = points.ids[point];
    ring.hidden = card.hidden = false;
    const [left, top] = this.pixel(point);
    Object.assign(ring.style, { left: `${left}px`, top: `${top}px` });
    const beside = left + 16 + card.offsetWidth > this.width ? left - 16 - card.offsetWidth : left + 16;
    card.style.left = `${Math.max(4, Math.min(beside, this.width - card.offsetWidth - 4))}px`;
    card.style.top = `${Math.max(4, Math.min(top - 24, this.height - card.offsetHeight - 4))}px`;
  }
}

const rgb = (colour) => colour.match(/[\d.]+/g).slice(0, 3).map(Number);

// A point's mark as pixels, drawn once and pressed ten thousand times: where each is, and how much it covers.
function stamp(color, symbol, size) {
  const side = 2 * Math.ceil(size + 1) + 1;
  const context = Object.assign(document.createElement("canvas"), { width: side, height: side }).getContext("2d");
  context.globalAlpha = 0.8;
  context.translate(side / 2, side / 2);
  context.beginPath();
  if (symbol === "circle") context.arc(0, 0, size, 0, 7);
  else {
    if (symbol === "diamond") context.rotate(Math.PI / 4);
    context.rect(-size * 0.9, -size * 0.9, size * 1.8, size * 1.8);
  }
  context.fillStyle = color;
  context.fill();
  const { data } = context.getImageData(0, 0, side, side);
  const reach = side >> 1;
  const covered = [...Array(side * side).keys()].filter((at) => data[4 * at + 3]);
  const marks = covered.map((at) => [(at % side) - reach, Math.floor(at / side) - reach, data[4 * at + 3] / 255]);
  const [red, green, blue] = [1, 3, 5].map((at) => parseInt(color.slice(at, at + 2), 16));
  return { marks, reach, red, green, blue };
}

// Lay a stamp over a picture, unless it would cross the edge.
function press({ marks, reach, red, green, blue }, { data, width, height }, left, top) {
  if (left < reach || top < reach || left >= width - reach || top >= height - reach) return;
  for (const [dx, dy, cover] of marks) {
    const at = 4 * ((top + dy) * width + left + dx);
    data[at] += (red - data[at]) * cover;
    data[at + 1] += (green - data[at + 1]) * cover;
    data[at + 2] += (blue - data[at + 2]) * cover;
  }
}

// Drag to pan, pinch to zoom; the wheel zooms once the map has the focus, so that it does not trap a scroll.
function steer(map) {
  const { place } = map;
  const fingers = new Map();
  const spot = (event) => { const box = place.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
  const spread = () => { const [a, b] = [...fingers.values()]; return Math.hypot(a[0] - b[0], a[1] - b[1]); };
  place.addEventListener("pointerdown", (event) => { fingers.set(event.pointerId, spot(event)); place.setPointerCapture(event.pointerId); });
  place.addEventListener("pointermove", (event) => {
    const now = spot(event);
    const before = fingers.get(event.pointerId);
    if (!before) {
      const point = map.nearest(...now, 12);
      if (point === null) map.hide(); else map.show(point);
      return;
    }
    if (fingers.size === 2) {
      const [apart, [left, top]] = [spread(), now];
      fingers.set(event.pointerId, now);
      map.zoom(spread() / (apart || 1), left, top);
    } else if (Math.hypot(now[0] - before[0], now[1] - before[1]) > 1) {
      fingers.set(event.pointerId, now);
      map.pan(now[0] - before[0], now[1] - before[1]);
    }
  });
  for (const end of ["pointerup", "pointercancel"]) place.addEventListener(end, (event) => fingers.delete(event.pointerId));
  place.addEventListener("click", (event) => { const point = map.nearest(...spot(event), 20); if (point !== null) map.show(point); });
  place.addEventListener("pointerleave", () => { if (!fingers.size) map.hide(); });
  place.addEventListener("wheel", (event) => {
    if (document.activeElement !== place && !event.ctrlKey) return;
    event.preventDefault();
    map.zoom(Math.exp(-event.deltaY / 400), ...spot(event));
  }, { passive: false });
  const keys = {
    ArrowLeft: () => map.stepTo(-1, 0), ArrowRight: () => map.stepTo(1, 0), ArrowUp: () => map.stepTo(0, -1), ArrowDown: () => map.stepTo(0, 1),
    "+": () => map.zoom(1.6), "=": () => map.zoom(1.6), "-": () => map.zoom(1 / 1.6), 0: () => map.reset(), Escape: () => map.hide(),
  };
  place.addEventListener("keydown", (event) => {
    if (!(event.key in keys) || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    keys[event.key]();
  });
  find("#closer").addEventListener("click", () => map.zoom(1.6));
  find("#farther").addEventListener("click", () => map.zoom(1 / 1.6));
  find("#all").addEventListener("click", () => map.reset());
}

// The labels as buttons that hide and show their points; for a score, the range of its colours.
function explain(map) {
  const { points } = map;
  const legend = find(".legend");
  const scale = find("#scale");
  const [low, high] = map.limits.map((value) => Math.round(value).toString().replace("-", "−"));
  scale.append(`${low} and less`, document.createElement("i"), `${high} nats and more`);
  const recolour = () => {
    scale.hidden = map.colour === "label";
    scale.style.setProperty("--colours", shades().join(","));
    map.draw();
  };
  points.legend.forEach((one, kind) => {
    if (points.legend.length < 2) return;
    const button = Object.assign(document.createElement("button"), { type: "button" });
    button.setAttribute("aria-pressed", "true");
    const swatch = Object.assign(document.createElement("i"), { className: one.symbol });
    swatch.style.background = one.color;
    button.append(swatch, one.name, Object.assign(document.createElement("small"), { textContent: ` ${one.count.toLocaleString("en")}` }));
    button.addEventListener("click", () => {
      if (!map.hidden.delete(kind)) map.hidden.add(kind);
      button.setAttribute("aria-pressed", !map.hidden.has(kind));
      map.draw();
    });
    const item = document.createElement("li");
    item.append(button);
    legend.append(item);
  });
  find("#colour").value = map.colour;
  find("#colour").addEventListener("change", (event) => { map.colour = event.target.value; recolour(); });
  find("#projection")?.addEventListener("change", (event) => {
    map.projection = event.target.value;
    for (const note of all("[data-projection]")) note.hidden = note.dataset.projection !== map.projection;
    map.reset();
  });
  recolour();
  drawn.set(map.place, recolour); // and when the theme changes
}

function start() {
  latentMap = new LatentMap(JSON.parse(find("#points").textContent), find("#latent-map"));
  steer(latentMap);
  explain(latentMap);
  const near = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      near.unobserve(target);
      drawChart(target);
    }
  }, { rootMargin: "800px" });
  for (const place of all(".plot")) near.observe(place);
  addEventListener("beforeprint", () => all(".plot").filter((place) => !drawn.has(place)).forEach(drawChart));
  requestAnimationFrame(() => requestAnimationFrame(() => { root.dataset.ready = Math.round(performance.now()); }));
}

try { root.dataset.theme = localStorage.getItem("vae-flows-theme") ?? ""; } catch { /* as above */ }
if (!root.dataset.theme) delete root.dataset.theme;
showTheme();
start();
