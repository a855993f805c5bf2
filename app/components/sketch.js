// A figure of points before plotly has come, which takes a browser a second or two: the same points on the same axes, to
// look at, not to point at. plots.js puts it where plotly draws soon, and takes it away then.

const SVG = "http://www.w3.org/2000/svg";
const LINE = 1.3; // of the font's size
const DIAMOND = 1.3; // plotly's is wider than its circle by so much

function sketchOf(traces, layout, width, [text, family, border, grid]) {
  const { l: left, r: right, t: top, b: bottom } = layout.margin;
  const [wide, high] = [Math.max(width - left - right, 1), layout.height - top - bottom];
  const [x, y] = rangesOf(layout, wide, high);
  const atX = (value) => left + ((value - x[0]) / (x[1] - x[0])) * wide;
  const atY = (value) => top + high - ((value - y[0]) / (y[1] - y[0])) * high;
  const svg = node("svg", { width, height: layout.height, class: "plots-sketch", "font-family": family, fill: text });
  const inside = node("svg", { x: left, y: top, width: wide, height: high, viewBox: `${left} ${top} ${wide} ${high}` });
  const muted = { "fill-opacity": 0.65, "font-size": 11.5 };
  for (const value of layout.xaxis.showticklabels === false ? [] : ticksOf(x, wide / 80)) {
    inside.append(node("path", { d: `M${atX(value)},${top}v${high}`, stroke: grid || border }));
    svg.append(words(number(value), { x: atX(value), y: top + high + 15, "text-anchor": "middle", ...muted }));
  }
  for (const value of layout.yaxis.showticklabels === false ? [] : ticksOf(y, high / 40)) {
    inside.append(node("path", { d: `M${left},${atY(value)}h${wide}`, stroke: grid || border }));
    svg.append(words(number(value), { x: left - 4, y: atY(value) + 4, "text-anchor": "end", ...muted }));
  }
  for (const { x0, line } of layout.shapes ?? []) {
    inside.append(node("path", { d: `M${atX(x0)},${top}v${high}`, stroke: line.color, "stroke-width": line.width, "stroke-dasharray": "6 4" }));
  }
  for (const trace of traces) inside.append(...marksOf(trace, atX, atY));
  svg.append(inside);
  for (const { x: at, xshift, xanchor, text: side, font } of layout.annotations ?? []) {
    const anchor = xanchor === "right" ? "end" : "start";
    svg.append(words(side, { x: atX(at) + xshift, y: top + 14, "text-anchor": anchor, "font-size": font.size, fill: font.color }));
  }
  if (layout.title) {
    const { size, color = text } = layout.title.font;
    svg.append(words(layout.title.text, { x: left, y: 20, "font-size": size, "font-weight": "bold", fill: color }));
  }
  legend(svg, traces, left, top - 0.02 * high - 10);
  const named = { "text-anchor": "middle", "font-size": 12.5, "fill-opacity": 0.65 };
  svg.append(words(layout.xaxis.title.text, { x: left + wide / 2, y: top + high + 36, ...named }));
  const turned = `translate(14 ${top + high / 2}) rotate(-90)`;
  svg.append(words(layout.yaxis.title.text, { x: 0, y: 0, transform: turned, ...named }));
  return svg;
}

// As plotly takes them: with equal units one of them is widened about its middle.
function rangesOf({ xaxis, yaxis }, wide, high) {
  const [x, y] = [xaxis.range, yaxis.range];
  if (!yaxis.scaleanchor) return [x, y];
  const unit = Math.max((x[1] - x[0]) / wide, (y[1] - y[0]) / high);
  const around = ([low, top], pixels) => [(low + top - unit * pixels) / 2, (low + top + unit * pixels) / 2];
  return [around(x, wide), around(y, high)];
}

function ticksOf([low, high], room) {
  const rough = (high - low) / (Math.min(9, Math.max(4, room)) + 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((one) => one * power >= rough * (1 - 1e-9));
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, index) => (first + index) * step);
}

const number = (value) => String(Number(value.toPrecision(6))).replace("-", "−");

function marksOf(trace, atX, atY) {
  const { line = {}, marker = {} } = trace;
  const points = trace.x.map((x, index) => (x === null ? null : [atX(x), atY(trace.y[index])]));
  if (trace.mode === "lines") {
    const d = points.map((point, index) => (point ? `${points[index - 1] ? "L" : "M"}${point}` : "")).join("");
    return [node("path", { d, fill: "none", stroke: line.color, "stroke-width": line.width })];
  }
  return points.map(([x, y]) => symbol(marker, x, y));
}

function symbol(marker, x, y) {
  const open = marker.symbol.endsWith("-open");
  const edge = marker.line ?? {};
  const ink = {
    fill: open ? "none" : marker.color,
    stroke: open ? marker.color : edge.color ?? "none",
    "stroke-width": edge.width ?? 0,
    opacity: marker.opacity ?? 1,
  };
  const radius = marker.size / 2;
  if (!marker.symbol.startsWith("diamond")) return node("circle", { cx: x, cy: y, r: radius, ...ink });
  const reach = radius * DIAMOND;
  return node("path", { d: `M${x + reach},${y}l${-reach},${reach}l${-reach},${-reach}l${reach},${-reach}z`, ...ink });
}

function legend(svg, traces, left, y) {
  let x = left;
  for (const { name, marker } of traces.filter((trace) => trace.marker && trace.showlegend !== false)) {
    svg.append(symbol(marker, x + 20, y - 4), words(name, { x: x + 40, y, "font-size": 12 }));
    x += 60 + 6.5 * name.length;
  }
}

// Plotly's labels are a little HTML; only line breaks count here. What is parsed is never put into the page.
function words(label, attributes) {
  const made = node("text", attributes);
  for (const [index, line] of label.split("<br>").entries()) {
    const part = node("tspan", { x: attributes.x, dy: index ? `${LINE}em` : 0 });
    part.textContent = new DOMParser().parseFromString(line, "text/html").body.textContent;
    made.append(part);
  }
  return made;
}

function node(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

