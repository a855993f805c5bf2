const WAIT_MILLISECONDS = 1000;

// Once a page, by whichever component comes first. To run it takes a second or two in which the browser shows nothing
// new, so the words of the page go first, if they come soon.
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

// Bring it here without running it, which takes a second in which nothing else can be drawn.
function fetchAhead(path) {
  if (window.es2Plotly) return;
  const link = document.createElement("link");
  document.head.append(Object.assign(link, { rel: "preload", as: "script", href: address(path) }));
}

function address(path) {
  const served = document.querySelector('script[src*="static/js/"]')?.src.split("static/js/")[0];
  return new URL(path, served ?? document.baseURI).href;
}

