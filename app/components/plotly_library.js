const WAIT_MILLISECONDS = 1000;

// Loads plotly once a page, for the first component that needs it. It blocks the browser for a second or two, so the
// rest of the page goes first, if it comes soon.
function library(path) {
  window.es2Plotly ??= restOfPage().then(() => run(address(path)));
  return window.es2Plotly;
}

async function restOfPage() {
  const until = performance.now() + WAIT_MILLISECONDS;
  const app = document.querySelector("[data-testid=stApp]");
  do await new Promise((resolve) => setTimeout(resolve, 50));
  while (app?.getAttribute("data-test-script-state") === "running" && performance.now() < until);
}

function run(source) {
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = source;
    script.onload = () => resolve(window.Plotly);
    script.onerror = () => {
      delete window.es2Plotly;
      reject(new Error(`${source} cannot be loaded; reload the page.`));
    };
    document.head.append(script);
  });
}

// Fetches plotly without running it, which would block the browser for a second.
function fetchAhead(path) {
  if (window.es2Plotly) return;
  const link = document.createElement("link");
  document.head.append(Object.assign(link, { rel: "preload", as: "script", href: address(path) }));
}

function address(path) {
  const served = document.querySelector('script[src*="static/js/"]')?.src.split("static/js/")[0];
  return new URL(path, served ?? document.baseURI).href;
}

