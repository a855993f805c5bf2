// The browser's store of figures at other layers; see other_layers.py. plots.js reads `window.es2Layers`.

const PAUSE_MILLISECONDS = 300; // the page's own figures, which come from other components, go first
const TRIES = 5;
const QUIET_MILLISECONDS = 1000;

if (window.es2Touched === undefined) {
  window.es2Touched = -Infinity;
  for (const event of ["pointerdown", "pointerup", "keydown"]) {
    document.addEventListener(event, () => (window.es2Touched = performance.now()), true);
  }
}

export default function ({ data, parentElement, setTriggerValue }) {
  if (window.es2Layers?.context !== data.context) window.es2Layers = { context: data.context, figures: new Map() };
  const { figures } = window.es2Layers;
  for (const [layer, found] of Object.entries(data.layers)) figures.set(Number(layer), found);
  const missing = data.wanted.filter((layer) => !figures.has(layer));
  const stop = () => clearTimeout(parentElement.es2Asking);
  const wait = () => (parentElement.es2Asking = setTimeout(ask, PAUSE_MILLISECONDS));
  let tries = TRIES;
  // A request while another page or address is on its way would make Streamlit return to the former one. Streamlit
  // shows late that it runs, so no request follows just after a click either. An answer calls this function anew; a
  // request may be lost to a click at the same moment.
  const ask = () => {
    if (!isRunning() && performance.now() - window.es2Touched > QUIET_MILLISECONDS) {
      setTriggerValue("missing", missing);
      tries -= 1;
    }
    if (tries > 0) wait();
  };
  stop();
  if (missing.length) wait();
  return stop;
}

function isRunning() {
  const state = document.querySelector("[data-testid=stApp]")?.getAttribute("data-test-script-state");
  return Boolean(state) && state !== "notRunning";
}
