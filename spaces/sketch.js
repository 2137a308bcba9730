// A black canvas, with a pen that is white at first and as wide as the strokes in the model's images. The value of the
// canvas is a PNG as a data URL.
const canvas = element.querySelector("canvas"), pen = canvas.getContext("2d");
let isDrawing = false;
const clear = () => {
  pen.fillStyle = "black";
  pen.fillRect(0, 0, canvas.width, canvas.height);
};
const place = (event) => {
  const box = canvas.getBoundingClientRect();
  return [((event.clientX - box.left) * canvas.width) / box.width, ((event.clientY - box.top) * canvas.height) / box.height];
};
clear();
canvas.addEventListener("pointerdown", (event) => {
  isDrawing = true;
  canvas.setPointerCapture(event.pointerId);
  Object.assign(pen, { lineWidth: props.pen, lineCap: "round", lineJoin: "round" });
  pen.strokeStyle = element.querySelector("input").value;
  pen.beginPath();
  pen.moveTo(...place(event));
  pen.lineTo(...place(event));
  pen.stroke();
});
canvas.addEventListener("pointermove", (event) => {
  if (!isDrawing) return;
  pen.lineTo(...place(event));
  pen.stroke();
});
const stop = () => {
  if (!isDrawing) return;
  isDrawing = false;
  props.value = canvas.toDataURL("image/png");
  trigger("change");
};
canvas.addEventListener("pointerup", stop);
canvas.addEventListener("pointercancel", stop);
element.querySelector("button").addEventListener("click", () => {
  clear();
  props.value = "";
  trigger("change");
});
