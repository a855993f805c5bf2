// What the browser has of the other layers; see other_layers.py. plots.js reads `window.es2Layers`.

const PAUSE_MILLISECONDS = 300; // the page's own figures, which come from other components, go first

export default function ({ data, setTriggerValue }) {
  // Asking while the browser goes back would tell Streamlit the address from before, and it would stay there. Once a
  // page: the function is the same one for as long as the script is.
  window.addEventListener("popstate", wait);
  wait();
  if (window.es2Layers?.context !== data.context) window.es2Layers = { context: data.context, figures: new Map() };
  const kept = window.es2Layers;
  for (const [layer, figures] of Object.entries(data.layers)) kept.figures.set(Number(layer), figures);
  const missing = data.wanted.filter((layer) => !kept.figures.has(layer));
  if (missing.length) kept.asking = setTimeout(() => setTriggerValue("missing", missing), PAUSE_MILLISECONDS);
}

function wait() {
  clearTimeout(window.es2Layers?.asking);
}
