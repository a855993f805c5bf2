// Once a page, by whichever component comes first.
function library(path) {
  window.es2Plotly ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = address(path);
    script.onload = () => resolve(window.Plotly);
    script.onerror = () => {
      delete window.es2Plotly;
      reject(new Error(`${script.src} cannot be loaded; reload the page.`));
    };
    document.head.append(script);
  });
  return window.es2Plotly;
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

