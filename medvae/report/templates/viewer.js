"use strict";
(() => {
  const byId = name => document.getElementById("viewer-" + name);
  const canvas = byId("canvas"), said = byId("said");
  const numbers = text => text.split(",").map(Number);
  const shape = numbers(canvas.dataset.shape), spacing = numbers(canvas.dataset.spacing);
  const labels = JSON.parse(canvas.dataset.labels);
  const voxels = Uint8Array.from(atob(canvas.dataset.volumes), letter => letter.charCodeAt(0));
  const flat = shape.length === 2;
  const [depth, height, width] = flat ? [1, ...shape] : shape;
  const [dz, dy, dx] = flat ? [1, ...spacing] : spacing;
  const inputs = ["scan", "axis", "slice", "light"].map(byId);
  const [scan, axis, slice, light] = inputs;

  // rows and columns of a cut, and how to find its voxels; a 3D array runs right, anterior, superior along its axes
  const cuts = {
    0: { rows: width, columns: height, count: depth, step: [dx, dy], at: (r, c, s) => (s * height + c) * width + (width - 1 - r) },
    1: { rows: width, columns: depth, count: height, step: [dx, dz], at: (r, c, s) => (c * height + s) * width + (width - 1 - r) },
    2: { rows: height, columns: depth, count: width, step: [dy, dz], at: (r, c, s) => (c * height + (height - 1 - r)) * width + s },
    plane: { rows: height, columns: width, count: 1, step: [dy, dx], at: (r, c) => r * width + c },
  };

  const draw = () => {
    const cut = cuts[flat ? "plane" : axis.value];
    const place = flat ? 0 : Math.min(Number(slice.value), cut.count - 1);
    const start = Number(scan.value) * depth * height * width, gain = Number(light.value) / 100;
    const picture = new ImageData(cut.columns, cut.rows);
    for (let r = 0, i = 0; r < cut.rows; r++)
      for (let c = 0; c < cut.columns; c++, i += 4) {
        const grey = Math.min(255, gain * voxels[start + cut.at(r, c, place)]);
        picture.data.set([grey, grey, grey, 255], i);
      }
    const small = document.createElement("canvas");
    [small.width, small.height] = [cut.columns, cut.rows];
    small.getContext("2d").putImageData(picture, 0, 0);
    const tall = cut.rows * cut.step[0], wide = cut.columns * cut.step[1], scale = 320 / Math.max(tall, wide);
    const context = canvas.getContext("2d");
    context.fillStyle = "#000";
    context.fillRect(0, 0, 320, 320);
    context.imageSmoothingEnabled = true;
    context.drawImage(small, (320 - wide * scale) / 2, (320 - tall * scale) / 2, wide * scale, tall * scale);
    said.textContent = labels[Number(scan.value)] + (flat ? "" : ", slice " + (place + 1) + " of " + cut.count);
  };

  if (axis) axis.addEventListener("change", () => {
    slice.max = cuts[axis.value].count - 1;
    slice.value = Math.floor(cuts[axis.value].count / 2);
  });
  inputs.filter(Boolean).forEach(input => input.addEventListener("input", draw));
  if (axis) axis.addEventListener("change", draw);
  draw();
})();
