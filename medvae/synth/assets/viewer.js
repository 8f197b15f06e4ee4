"use strict";
(async () => {
  const byId = name => document.getElementById(name);
  const { scans, flat } = JSON.parse(byId("scans").textContent);
  const { Niivue, NVImage, SLICE_TYPE } = niivue;
  const said = byId("said");
  const view = new Niivue({
    isRadiologicalConvention: true, dragAndDropEnabled: false, loadingText: "", show3Dcrosshair: true,
    multiplanarShowRender: 1, backColor: [0, 0, 0, 1], logLevel: "error",
  });
  const layouts = {
    all: SLICE_TYPE.MULTIPLANAR, axial: SLICE_TYPE.AXIAL, coronal: SLICE_TYPE.CORONAL, sagittal: SLICE_TYPE.SAGITTAL,
    render: SLICE_TYPE.RENDER,
  };
  try {
    await view.attachToCanvas(byId("canvas"));
  } catch (error) {
    said.textContent = "This browser gives no WebGL 2, which the viewer needs.";
    return;
  }
  let shown = -1;
  const show = async index => {
    const scan = scans[index];
    const image = await NVImage.loadFromBase64({ base64: scan.image, name: "scan.nii.gz", colormap: "gray", cal_min: 0, cal_max: 255 });
    const layers = [image];
    if (scan.mask) layers.push(await NVImage.loadFromBase64({ base64: scan.mask, name: "mask.nii.gz", colormap: "actc", cal_min: 0.5 }));
    for (const old of [...view.volumes]) view.removeVolume(old);
    layers.forEach(layer => view.addVolume(layer));
    fade();
    view.drawScene();
    shown = index;
    said.textContent = scan.label;
    document.body.dataset.shown = String(index);
  };
  const fade = () => { if (view.volumes.length > 1) view.setOpacity(1, Number(byId("opacity").value) / 100); };
  const arrange = () => view.setSliceType(flat ? SLICE_TYPE.AXIAL : layouts[byId("layout").value]);
  byId("scan").addEventListener("change", event => show(Number(event.target.value)));
  const step = by => {
    byId("scan").value = String((shown + by + scans.length) % scans.length);
    show(Number(byId("scan").value));
  };
  byId("before").addEventListener("click", () => step(-1));
  byId("after").addEventListener("click", () => step(1));
  byId("opacity").addEventListener("input", fade);
  if (!flat) byId("layout").addEventListener("change", arrange);
  arrange();
  await show(0);
})();
