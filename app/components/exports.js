// Saves a figure as a picture for paper and slides: dark on white in every theme; see exports.py.

const TEXT = "#1d2127";
const GRID = "#d9dde3";
const WIDTH = 1000;
const HEIGHT = 450;

export default function ({ data, parentElement }) {
  const root = parentElement.querySelector(".images");
  root.replaceChildren(...["svg", "png"].map((format) => button(format, data)));
}

function button(format, data) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = format.toUpperCase();
  made.setAttribute("aria-label", `Save ${data.name} as ${format.toUpperCase()}`);
  made.onclick = async () => {
    made.disabled = true;
    made.title = "";
    try {
      await save(format, data);
    } catch (error) {
      made.title = String(error.message ?? error);
      made.textContent = `${format.toUpperCase()} failed`;
    } finally {
      made.disabled = false;
    }
  };
  return made;
}

async function save(format, data) {
  const Plotly = await library(data.library);
  const figure = JSON.parse(data.figure);
  const { width, height } = figure.layout;
  const size = { width: width ?? WIDTH, height: height ?? HEIGHT };
  const picture = { data: figure.data, layout: onPaper(figure.layout), config: { plotlyServerURL: "" } };
  const address = await Plotly.toImage(picture, { format, ...size, scale: format === "png" ? 2 : 1 });
  const link = document.createElement("a");
  link.href = address;
  link.download = `${data.file}.${format}`;
  link.click();
}

function onPaper(layout) {
  const { template, ...own } = layout;
  const dressed = { ...own, paper_bgcolor: "white", plot_bgcolor: "white", font: { ...own.font, color: TEXT, size: 12 } };
  for (const name of Object.keys(own).filter((key) => /^[xy]axis/.test(key)))
    dressed[name] = { ...own[name], gridcolor: GRID, linecolor: GRID, automargin: true };
  return dressed;
}
