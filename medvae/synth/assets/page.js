const byId = name => document.getElementById(name);
const data = JSON.parse(byId("data").textContent);
const said = byId("said");
const bytes = name => Uint8Array.from(atob(byId(name).textContent), c => c.charCodeAt(0));
const [rows, columns] = data.shape;
const COLOURS = [[255, 80, 60], [60, 170, 255], [90, 230, 110], [255, 210, 60], [220, 110, 255], [60, 230, 230]];

const noise = new Float32Array(data.codeSize);
const condition = new Float32Array(data.width);
const resets = [];
let opacity = 0.4;

const element = (tag, given, ...inside) => {
  const made = Object.assign(document.createElement(tag), given);
  made.append(...inside);
  return made;
};

function slider(where, id, label, low, high, start, digits, set) {
  const input = element("input", { type: "range", id, min: low, max: high, step: "any" });
  const output = element("output", { htmlFor: id });
  const take = value => {
    input.value = value;
    output.value = Number(value).toFixed(digits);
    input.setAttribute("aria-valuetext", output.value);
    set(Number(value));
  };
  // `step` stays "any" so that a draw is not rounded; keys move by a hundredth of the range.
  input.addEventListener("keydown", event => {
    const by = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10 }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    take(Math.min(high, Math.max(low, Number(input.value) + by * (high - low) / 100)));
    refresh();
  });
  input.addEventListener("input", () => { take(input.value); refresh(); });
  byId(where).append(element("div", { className: "row" }, element("label", { htmlFor: id, textContent: label }), input, output));
  byId(where).hidden = false;
  resets.push(() => take(start));
  take(start);
  return take;
}

let column = 0;
data.conditions.forEach((given, index) => {
  const first = column, id = `condition-${index}`;
  if (given.kind === "class") {
    column += given.classes.length;
    const select = element("select", { id }, ...given.classes.map((name, i) => element("option", { value: i, textContent: name })));
    const take = value => { select.value = value; given.classes.forEach((_, i) => { condition[first + i] = Number(i === Number(value)); }); };
    select.addEventListener("change", () => { take(select.value); refresh(); });
    byId("conditions").append(element("div", { className: "row" }, element("label", { htmlFor: id, textContent: given.name }), select));
    byId("conditions").hidden = false;
    resets.push(() => take(given.start));
    take(given.start);
  } else {
    column += 1;
    const [low, high] = given.range;
    slider("conditions", id, given.name, low, high, given.start, 1, value => { condition[first] = 2 * (value - low) / (high - low) - 1; });
  }
});
const codes = new Map(data.codes.map(code =>
  [code, slider("codes", `code-${code}`, `code ${code}`, -data.reach, data.reach, 0, 2, value => { noise[code] = value; })]));
if (data.components > 1) {
  const last = data.codeSize - 1;
  codes.set(last, slider("codes", `code-${last}`, "component", -data.reach, data.reach, 0, 2, value => { noise[last] = value; }));
}
if (data.labels.length) slider("masks", "opacity", "opacity", 0, 1, opacity, 2, value => { opacity = value; });

const canvas = Object.assign(byId("picture"), { width: columns, height: rows });
canvas.style.aspectRatio = `${columns * data.spacing[1]} / ${rows * data.spacing[0]}`;
const pen = canvas.getContext("2d");

function paint(image, mask) {
  const picture = pen.createImageData(columns, rows);
  for (let i = 0; i < rows * columns; i++) {
    let colour = Array(3).fill(255 * image[i]);
    data.labels.forEach((_, m) => {
      const share = mask[m * rows * columns + i] > 0.5 ? opacity : 0;
      colour = colour.map((value, k) => (1 - share) * value + share * COLOURS[m % COLOURS.length][k]);
    });
    picture.data.set([...colour.map(Math.round), 255], 4 * i);
  }
  pen.putImageData(picture, 0, 0);
}

let session, busy = false, wanted = false, drawn = 0;

async function decode() {
  const feeds = z => ({
    z: new ort.Tensor("float32", z, [1, data.codeSize]),
    ...(data.width ? { condition: new ort.Tensor("float32", condition.slice(), [1, data.width]) } : {}),
  });
  const { prior } = await session.run(feeds(noise.slice()), ["prior"]);
  return session.run(feeds(Float32Array.from(prior.data)), data.labels.length ? ["image", "mask"] : ["image"]);
}

async function refresh() {
  wanted = true;
  if (busy || !session) return;
  busy = true;
  try {
    while (wanted) {
      wanted = false;
      const { image, mask } = await decode();
      paint(image.data, mask?.data);
      document.body.dataset.shown = String(++drawn);
    }
  } catch (error) {
    said.textContent = `The picture could not be decoded: ${error.message}`;
  } finally {
    busy = false;
  }
}

function normal() {
  return Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
}

byId("draw").addEventListener("click", () => {
  for (let j = 0; j < noise.length; j++) noise[j] = normal();
  for (const [code, take] of codes) take(Math.min(data.reach, Math.max(-data.reach, noise[code])));
  said.textContent = "A random sample of the prior at these conditions.";
  refresh();
});
byId("reset").addEventListener("click", () => {
  noise.fill(0);
  resets.forEach(reset => reset());
  said.textContent = "The centre of the prior at the first conditions.";
  refresh();
});
byId("controls").addEventListener("submit", event => event.preventDefault());

try {
  const unpacked = new Blob([bytes("engine")]).stream().pipeThrough(new DecompressionStream("gzip"));
  ort.env.wasm.wasmBinary = await new Response(unpacked).arrayBuffer();
  ort.env.wasm.numThreads = 1;
  session = await ort.InferenceSession.create(bytes("model"), { executionProviders: ["wasm"] });
  byId("draw").disabled = byId("reset").disabled = false;
  said.textContent = "The centre of the prior at the first conditions.";
  await refresh();
} catch (error) {
  said.textContent = `This browser cannot run the decoder (${error.message}): it needs WebAssembly and DecompressionStream.`;
}
document.body.dataset.ready = String(Boolean(session));
