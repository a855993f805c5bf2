// What the browser has of the other layers; see other_layers.py. plots.js reads `window.es2Layers`.

const PAUSE_MILLISECONDS = 300; // the page's own figures, which come from other components, go first

export default function ({ data, parentElement, setTriggerValue }) {
  if (window.es2Layers?.context !== data.context) window.es2Layers = { context: data.context, figures: new Map() };
  const { figures } = window.es2Layers;
  for (const [layer, found] of Object.entries(data.layers)) figures.set(Number(layer), found);
  const missing = data.wanted.filter((layer) => !figures.has(layer));
  const stop = () => clearTimeout(parentElement.es2Asking);
  const wait = () => (parentElement.es2Asking = setTimeout(ask, PAUSE_MILLISECONDS));
  // Whoever asks while another page or address is on its way tells Streamlit the one from before, and it stays there.
  const ask = () => (isRunning() ? wait() : setTriggerValue("missing", missing));
  stop();
  if (missing.length) wait();
  return stop;
}

function isRunning() {
  const state = document.querySelector("[data-testid=stApp]")?.getAttribute("data-test-script-state");
  return Boolean(state) && state !== "notRunning";
}
