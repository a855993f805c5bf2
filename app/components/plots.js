// The app's figures; see plots.py. Streamlit calls the default export whenever the data or the theme change, always with
// the same parent element, which therefore keeps the state: plots, moment, last selection.

const PLAY_MILLISECONDS = 1800;
const PAINT_MILLISECONDS = 50; // for the browser to paint the points, before plotly keeps it busy
const CROWD = 2000; // points of a figure above which WebGL draws them, since in SVG each is an element of its own
const MOST_WEBGL = 4; // figures, since each takes three of the contexts that a browser keeps
const LAYER_PICKED = "es2-layer-picked";
const PLAIN = { displayModeBar: false, scrollZoom: false, responsive: false, doubleClick: false };
const LINKED = {
  displaylogo: false,
  responsive: false,
  doubleClick: "reset",
  modeBarButtonsToRemove: ["autoScale2d", "zoom2d", "pan2d", "lasso2d", "select2d"],
  toImageButtonOptions: { format: "svg" },
};

if (!window.es2Quiet) {
  window.es2Quiet = true;
  // Plotly rejects an animation that another one interrupts, and its own buttons let that pass as an error.
  window.addEventListener("unhandledrejection", (event) => event.reason === undefined && event.preventDefault());
}

export default async function ({ data: [data], parentElement, setTriggerValue }) {
  const state = (parentElement.es2 ??= begin(parentElement));
  const turn = ++state.turn;
  state.report = setTriggerValue;
  state.data = data;
  // Prompts first, since each figure takes a tenth of a second.
  if (data.name) await showPoints(state);
  else await new Promise((resolve) => setTimeout(resolve));
  const Plotly = await library(data.library);
  state.goTo ??= listenForLayers(Plotly, state);
  if (turn === state.turn) await draw(Plotly, state, data.figures);
  return () => end(Plotly, state);
}

function begin(parent) {
  const root = parent.querySelector(".plots");
  const row = element("div", "plots-row");
  root.append(row);
  return { root, row, divs: [], selected: [], turn: 0, moment: 0, playing: 0, morph: null, halos: [] };
}

function end(Plotly, state) {
  state.turn += 1;
  state.sizes?.disconnect();
  document.removeEventListener(LAYER_PICKED, state.goTo);
  cancelAnimationFrame(state.playing);
  state.divs.forEach((div) => discard(Plotly, div));
}

// A browser keeps sixteen WebGL contexts, including those of removed figures until its next garbage collection.
function discard(Plotly, div) {
  const canvases = div.querySelectorAll(".gl-canvas");
  Plotly.purge(div);
  canvases.forEach((canvas) => canvas.getContext("webgl")?.getExtension("WEBGL_lose_context")?.loseContext());
}

function element(tag, name) {
  const made = document.createElement(tag);
  made.className = name;
  return made;
}

// ------------------------------------------------------------------------------------------------------- drawing

async function draw(Plotly, state, figures) {
  state.selected = state.data.selected ?? [];
  unhover(state);
  while (state.divs.length > figures.length) {
    const gone = state.divs.pop();
    discard(Plotly, gone);
    gone.remove();
  }
  makeRoom(state);
  state.sizes ??= watchSize(Plotly, state);
  if (!state.root.clientWidth) return; // hidden, as in a closed expander: drawn when it is shown
  const theme = themeOf(state);
  for (const [index, figure] of figures.entries()) await show(Plotly, state, index, figure, theme);
  scrubber(Plotly, state);
}

function makeRoom(state) {
  const { figures, height, alt, grid } = state.data;
  state.row.classList.toggle("plots-grid", Boolean(grid));
  state.row.style.gridAutoRows = grid ? `${height}px` : "";
  state.root.style.height = grid ? "auto" : `${height}px`;
  state.root.setAttribute("role", "img");
  state.root.setAttribute("aria-label", alt);
  while (state.divs.length < figures.length) {
    const made = element("div", "plots-plot");
    state.divs.push(made);
    state.row.append(made);
  }
}

// Shows the points while plotly starts, which takes a second or two.
async function showPoints(state) {
  if (window.Plotly) return;
  makeRoom(state);
  for (const [index, { data, layout }] of state.data.figures.entries()) {
    state.divs[index].replaceChildren(pointsOf(JSON.parse(data), JSON.parse(layout)));
  }
  await new Promise((resolve) => setTimeout(resolve, PAINT_MILLISECONDS));
}

function pointsOf(traces, { margin, height, xaxis, yaxis }) {
  const [[left, right], [low, high]] = [xaxis.range, yaxis.range];
  const svg = node("svg", {
    class: "plots-points",
    viewBox: [left, -high, right - left, high - low].join(" "),
    preserveAspectRatio: yaxis.scaleanchor ? "xMidYMid" : "none", // as plotly takes equal units
    style: `left: ${margin.l}px; top: ${margin.t}px; width: calc(100% - ${margin.l + margin.r}px); height: ${height - margin.t - margin.b}px`,
  });
  for (const { x, y, marker } of traces) {
    if (!marker) continue;
    const d = x.map((value, point) => `M${value},${-y[point]}h0`).join(""); // dots: lines without length, with round ends
    svg.append(node("path", { d, stroke: marker.color, "stroke-width": marker.size, opacity: marker.opacity ?? 1 }));
  }
  return svg;
}

function node(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

// Draws a figure, or only its changed parts.
async function show(Plotly, state, index, figure, theme) {
  const div = state.divs[index];
  const layout = JSON.parse(figure.layout);
  const traces = kindOf(state, JSON.parse(figure.data));
  const { shapes = [], ...others } = layout;
  const rest = JSON.stringify([others, theme, traces, figure.frames]);
  const shown = div.shown;
  div.shown = { layout: figure.layout, rest };
  const selecting = div._fullLayout?.selections?.length > 0; // an outline stays until the figure is drawn anew
  if (shown?.rest === rest && !selecting) {
    // Plotly draws shapes in a millisecond, and everything else in a hundred.
    if (shown.layout !== figure.layout) await Plotly.relayout(div, { shapes });
    return;
  }
  div.aims = traces.map((trace) => trace.meta?.to);
  div.starts = traces.map((trace) => ({ x: trace.x, y: trace.y }));
  dress(layout, theme, state.turn);
  layout.width = div.clientWidth;
  const { name, figures } = state.data;
  div.fn = `${name}${figures.length > 1 ? `-${index + 1}` : ""}`; // of images; as an option it would redraw everything
  const frames = figure.frames && JSON.parse(figure.frames);
  await Plotly.react(div, { data: traces, layout, config: name ? LINKED : PLAIN, frames });
  div.querySelector(".plots-points")?.remove();
  if (!div.listening) listen(Plotly, state, div);
}

// In a crowd WebGL draws all traces, since its canvas covers SVG.
function kindOf(state, traces) {
  const points = traces.reduce((sum, trace) => sum + (trace.customdata?.length ?? 0), 0);
  const crowd = state.data.name && points > CROWD && state.divs.length <= MOST_WEBGL && hasWebGL();
  return crowd ? traces.map((trace) => ({ ...trace, type: "scattergl" })) : traces;
}

function hasWebGL() {
  window.es2WebGL ??= Boolean(document.createElement("canvas").getContext("webgl")?.getExtension("OES_element_index_uint"));
  return window.es2WebGL;
}

// Streamlit's colours and font, which follow the system or the user's choice.
function themeOf(state) {
  const style = getComputedStyle(state.root);
  const names = ["text-color", "font", "border-color", "border-color-light", "background-color"];
  return names.map((name) => style.getPropertyValue(`--st-${name}`).trim());
}

function dress(layout, [text, family, border, grid, background], turn) {
  const muted = text.startsWith("#") && text.length === 7 ? `${text}a6` : text;
  layout.paper_bgcolor = layout.plot_bgcolor = "rgba(0,0,0,0)";
  layout.font = { family, color: text, size: 12 };
  for (const name of Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key))) {
    const axis = layout[name];
    axis.gridcolor = grid || border;
    axis.title = { ...axis.title, font: { size: 12.5, color: muted } };
    axis.tickfont = { size: 11.5, color: muted };
    axis.ticks = "";
  }
  const font = { family, color: text, size: 13 };
  layout.hoverlabel = { ...layout.hoverlabel, bgcolor: background, bordercolor: border, font };
  const control = { bgcolor: background, bordercolor: border };
  layout.updatemenus = layout.updatemenus?.map((menu) => ({ ...menu, ...control }));
  layout.sliders = layout.sliders?.map((slider) => ({ ...slider, ...control, activebgcolor: border, tickcolor: muted }));
  layout.modebar = { bgcolor: "rgba(0,0,0,0)", color: border, activecolor: text };
  layout.clickanywhere = true; // pointed() finds the point, if any
  layout.selections = [];
  layout.selectionrevision = turn;
}

function watchSize(Plotly, state) {
  const sizes = new ResizeObserver(() => {
    unhover(state);
    if (state.root.clientWidth && state.divs.some((div) => !div.shown)) draw(Plotly, state, state.data.figures);
    for (const div of state.divs) {
      if (div.layout && div.clientWidth && div.layout.width !== div.clientWidth) {
        Plotly.relayout(div, { width: div.clientWidth });
      }
    }
  });
  sizes.observe(state.root);
  return sizes;
}

// -------------------------------------------------------------------------------------------------- pointing and choosing

function listen(Plotly, state, div) {
  div.listening = true;
  if (!state.data.name) {
    div.on("plotly_click", ({ event }) => pick(state, pointed(div, event)));
    return;
  }
  const rowsOf = (points) => [...new Set(points.map((point) => point.customdata?.[1]).filter(Number.isInteger))];
  div.on("plotly_hover", (event) => hover(state, rowsOf(event.points)));
  div.on("plotly_unhover", () => unhover(state));
  div.on("plotly_click", ({ event }) => choose(state, rowsOf([{ customdata: pointed(div, event) }]), event.shiftKey));
  div.on("plotly_selected", (event) => {
    if (event?.points?.length) choose(state, rowsOf(event.points), false);
  });
  div.on("plotly_relayout", (change) => follow(Plotly, state, div, change));
  div.on("plotly_webglcontextlost", () => {
    window.es2WebGL = false; // such as after a restart of the graphics driver
    state.divs.forEach((one) => (one.shown = undefined));
    draw(Plotly, state, state.data.figures);
  });
}

// The `customdata` of the point under the mouse, by plotly's own rule. Plotly's click event has the point of its last
// hover, up to 50 ms old, so that a quick click would pick the former point, or none.
function pointed(div, event) {
  const { xaxis, yaxis, hovermode, hoverdistance } = div._fullLayout;
  const box = div.getBoundingClientRect();
  const { clientX, clientY } = event.touches?.[0] ?? event;
  const [left, top] = [clientX - box.left - xaxis._offset, clientY - box.top - yaxis._offset];
  let [nearest, found] = [hoverdistance < 0 ? Infinity : hoverdistance, undefined];
  eachPoint(div, (customdata, x, y, size) => {
    const radius = Math.max(3, size / 2);
    const distance = Math.max(Math.hypot(x - left, hovermode === "x" ? 0 : y - top) - radius, 1 - 3 / radius);
    if (distance <= nearest) [nearest, found] = [distance, customdata];
  });
  return found;
}

// Calls `visit` with every point's `customdata`, place in the plot and size, in pixels. It reads the traces, since
// plotly's list of points is empty where WebGL draws them.
function eachPoint(div, visit) {
  const { xaxis, yaxis } = div._fullLayout;
  for (const { customdata, visible, x, y, marker } of div._fullData) {
    if (!customdata || visible !== true) continue;
    const sizes = marker?.size ?? 0;
    customdata.forEach((data, at) => visit(data, xaxis.d2p(x[at]), yaxis.d2p(y[at]), sizes[at] ?? sizes));
  }
}

function pick(state, found) {
  if (!state.data.picks || !found) return;
  state.report("picked", found);
  if (found[0] === "layer") document.dispatchEvent(new CustomEvent(LAYER_PICKED, { detail: found[1] }));
}

// Draws a picked layer at once where the browser has its figures (other_layers.js); the page's answer redraws only
// differences.
function listenForLayers(Plotly, state) {
  const goTo = async ({ detail: layer }) => {
    const kept = window.es2Layers;
    const found = kept?.context === state.data.context ? kept.figures.get(layer) : undefined;
    if (found?.length === state.divs.length) await draw(Plotly, state, found.map((moving, index) => at(state, index, moving)));
  };
  if (state.data.context) document.addEventListener(LAYER_PICKED, goTo);
  return goTo;
}

// The current figure at another layer, with rings around selected points; lines to twins come with the page.
function at(state, index, moving) {
  const places = new Map();
  const traces = JSON.parse(state.data.figures[index].data);
  for (const [number, changed] of JSON.parse(moving.traces).entries()) {
    const trace = Object.assign(traces[number], changed);
    trace.customdata?.forEach(([model, row], point) => places.set(row, [trace.x[point], trace.y[point]]));
  }
  const rings = traces.find((trace) => trace.name === "selected");
  const ringed = state.selected.filter((row) => places.has(row)).map((row) => places.get(row));
  if (rings) Object.assign(rings, { x: ringed.map(([x]) => x), y: ringed.map(([, y]) => y) });
  return { data: JSON.stringify(traces), layout: moving.layout };
}

function choose(state, rows, add) {
  if (rows.length === 0) return;
  state.selected = add ? [...new Set([...state.selected, ...rows])] : rows;
  state.report("selected", state.selected);
}

// Rings every point of these rows in every plot, by plain elements, since plotly would redraw all points.
function hover(state, rows) {
  unhover(state);
  for (const div of state.divs) {
    const { xaxis, yaxis } = div._fullLayout;
    eachPoint(div, ([, row], left, top) => {
      if (!rows.includes(row)) return;
      if (left < 0 || left > xaxis._length || top < 0 || top > yaxis._length) return;
      const halo = element("div", "plots-halo");
      halo.style.left = `${xaxis._offset + left}px`;
      halo.style.top = `${yaxis._offset + top}px`;
      div.append(halo);
      state.halos.push(halo);
    });
  }
}

function unhover(state) {
  state.halos.splice(0).forEach((halo) => halo.remove());
}

// Gives all plots the range of the one that was zoomed or panned.
function follow(Plotly, state, div, change) {
  unhover(state);
  const moved = Object.keys(change).some((name) => /^[xy]axis\.(range|autorange)/.test(name));
  if (!moved) return;
  const { xaxis, yaxis } = div._fullLayout;
  const same = (one, other) => one.every((value, index) => Math.abs(value - other[index]) < 1e-9 * (1 + Math.abs(value)));
  for (const other of state.divs) {
    const theirs = other._fullLayout;
    if (other === div || (same(xaxis.range, theirs.xaxis.range) && same(yaxis.range, theirs.yaxis.range))) continue;
    Plotly.relayout(other, { "xaxis.range": [...xaxis.range], "yaxis.range": [...yaxis.range] });
  }
}

// ---------------------------------------------------------------------------------------------------- from base to tuned

function scrubber(Plotly, state) {
  const moves = state.divs.some((div) => div.aims.some(Boolean));
  stop(state);
  if (!moves) {
    state.morph?.remove();
    state.morph = null;
    return;
  }
  if (!state.morph) {
    state.morph = element("div", "plots-morph");
    const play = element("button", "plots-play");
    play.type = "button";
    const slider = element("input", "plots-moment");
    Object.assign(slider, { type: "range", min: 0, max: 1, step: 0.01 });
    slider.setAttribute("aria-label", "From base to tuned");
    play.onclick = () => (state.playing ? stop(state) : start(Plotly, state));
    slider.oninput = () => {
      stop(state);
      move(Plotly, state, Number(slider.value));
    };
    const [from, to] = ["base", "tuned"].map((name) => Object.assign(element("span", ""), { textContent: name }));
    state.morph.append(play, from, slider, to);
    state.root.append(state.morph);
    Object.assign(state, { play, slider });
  }
  stop(state);
  move(Plotly, state, state.moment);
}

function start(Plotly, state) {
  const from = state.moment >= 1 ? 0 : state.moment;
  const began = performance.now() - from * PLAY_MILLISECONDS;
  state.play.textContent = "Pause";
  const frame = async (now) => {
    const part = Math.min(1, Math.max(0, (now - began) / PLAY_MILLISECONDS));
    await move(Plotly, state, part);
    if (!state.playing) return;
    if (part < 1) state.playing = requestAnimationFrame(frame);
    else stop(state);
  };
  state.playing = requestAnimationFrame(frame);
}

function stop(state) {
  cancelAnimationFrame(state.playing);
  state.playing = 0;
  if (state.play) state.play.textContent = "Play";
}

async function move(Plotly, state, moment) {
  state.moment = moment;
  state.slider.value = moment;
  unhover(state);
  const eased = moment * moment * (3 - 2 * moment);
  for (const div of state.divs) {
    const traces = div.aims.flatMap((aim, index) => (aim ? [index] : []));
    const between = (axis) =>
      traces.map((index) => {
        const [from, to] = [div.starts[index][axis], div.aims[index][axis]];
        return Array.from(from, (value, point) => value + eased * (to[point] - value));
      });
    await Plotly.restyle(div, { x: between("x"), y: between("y") }, traces);
  }
}
